"""Delta gradient descent: momentum beside a decay that acts along the layer's inputs.

    M   ← momentum · M + G
    D   = G + momentum · M   if nesterov, else M
    W   ← W (I − lr · rho · Σ) − lr · σ(D)          Σ = E x̂ x̂ᵀ: the layer's inputs, each at length 1

and `weight_decay` beside it. Weight decay shrinks W in every direction alike; this shrinks only what the layer answers
to inputs that it has seen, and leaves alone what it holds for others. rho = 0 is `Momentum` bit for bit.
Nested Learning, arXiv:2512.24695, Eq. 56-57: a step of L2 regression on ½ ‖W x − u‖², u = −∂L/∂y, in place of the dot
product whose step is gradient descent. Printed, rho is 1, for weights inside a model that are rewritten at every token
(`deep_optim.ops.dgd`). In training that is a penalty ½ E ‖W x̂‖², under which least squares comes out at half of its
solution, 1/(1 + rho) of it in general. Here rho is small and, as weight decay in AdamW, outside the memory and σ.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deep_optim.capture import InputCapture
from deep_optim.ops.newton_schulz import Coefficients

from .input_keyed import InputKeyedOptimizer, Missing
from .matrices import matrix_shape
from .output_map import OutputMap
from .stacks import matrices
from .validation import check_at_least


class DGD(InputKeyedOptimizer):
    """Momentum with a weight decay along the directions of the layer's inputs.

    Keeps 4 bytes per parameter (8 with `output="adam"`), and from the forward pass to the step what `capture_inputs`
    keeps. For an m × n matrix and N sampled tokens the decay costs 2 n FLOPs per parameter, or 4 N where N is no
    more than n and this is less; the rest is `Momentum`.

    Args:
        params: parameters, named parameters, or groups of them; any shape.
        lr: step size of the weights. AdamW's usual values suit "newton_schulz" and "adam", SGD's suit "identity".
        momentum: how much of the memory survives a step, 0 to 1.
        rho: the decay along the inputs, multiplied by `lr`; 0 is plain momentum. The trace of Σ is 1, so that in all
            directions together it takes as much as `weight_decay=rho` takes in one.
        weight_decay: decoupled, multiplied by `lr` as in AdamW.
        nesterov: read the memory with the same write added once more.
        missing: what a matrix with a gradient and without captured inputs does: "error", or "gradient", which takes the
            gradient's Gram at trace 1 for Σ.
        output: "newton_schulz", "adam" or "identity". Under the first two, vectors and scalars are stepped by AdamW;
            under "identity" they have a memory like everything else, and decay along the gradient.
        ns_steps: Newton-Schulz iterations.
        ns_coefficients: "muon" or "polar_express".
        adamw_betas: AdamW's decay rates, for what is no matrix; the second is also that of `output="adam"`.
        adamw_eps: AdamW's term in the denominator; likewise.
        inputs: what `capture_inputs(model)` returned; what it holds of these parameters is used up by each step.
        foreach: use torch's foreach AdamW for what is no matrix.
        maximize: ascend instead.
        capturable: keep counters on the device, so that a CUDA graph can capture the step.
        differentiable: refused; the memories are written in place.
        fused: use torch's fused AdamW for what is no matrix; by default wherever torch has one.
        kahan_sum: keep what rounding takes from bfloat16 and float16 weights, so that small updates are not lost, at
            2 bytes per parameter.

    Raises:
        TypeError: if `inputs` is something else.
        ValueError: for a value out of range, in the constructor or in any group.
        RuntimeError: for `differentiable`, for `fused` with `foreach`, for complex parameters or sparse gradients, and
            at a step without inputs under `missing="error"`, before anything is stepped.

    Example:
        >>> optimizer = DGD(model.parameters(), lr=1e-3, inputs=capture_inputs(model))  # doctest: +SKIP
    """

    reads_weights: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        rho: float = 0.1,
        weight_decay: float = 1e-2,
        nesterov: bool = True,
        missing: Missing = "error",
        output: OutputMap = "newton_schulz",
        ns_steps: int = 5,
        ns_coefficients: Coefficients = "muon",
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        *,
        inputs: InputCapture | None = None,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        kahan_sum: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "rho": rho,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "missing": missing,
            "output": output,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "kahan_sum": kahan_sum,
        }
        super().__init__(params, defaults, inputs)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_at_least(group, 0.0, "rho")

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"memory": torch.zeros_like(param)}

    def update(self, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        state["memory"] = (group["momentum"] * state["memory"]).add_(written)
        return self.read(written, state["memory"], group)

    def pull(
        self, params: list[Tensor], written: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> Tensor | None:
        if not group["rho"]:
            return None
        weights = matrices(params, matrix_shape(params[0], group), written.dtype)
        return group["rho"] * self.times_keys(weights, written, state)  # W Σ of the old weights
