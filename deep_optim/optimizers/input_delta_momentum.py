"""Input-keyed delta momentum: a linear memory from layer inputs to their errors, trained by L2 regression.

    objective   ½ E ‖M x̂ − c δ‖²                   keys x̂: the layer's inputs, each at length 1; G = E δ xᵀ
    M   ← momentum · M − inner_lr · M Σ + G         Σ = E x̂ x̂ᵀ
    D   = G + momentum · M   if nesterov, else M
    W   ← (1 − lr · weight_decay) · W − lr · σ(D)

`DeltaMomentum` is the same rule with keys that it takes from the gradient, where the ones of large error count more;
here every token counts alike, and directions that every input has are forgotten fast, whatever their errors. For
constant G and Σ the memory settles at G (Σ + μ I)⁻¹ / inner_lr, μ = (1 − momentum) / inner_lr: a gradient divided by
the inputs' second moment, without an inverse. inner_lr = 0 is `Momentum` bit for bit.
Nested Learning, arXiv:2512.24695, Eq. 34 and 37 with the L2 objective, which the paper does not write out; worked out
and tried at scale by Hong and Qu, arXiv:2608.19491. The write is the ordinary gradient and not E δ x̂ᵀ: behind a norm
the inputs have nearly one length, which only scales the memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deep_optim.capture import InputCapture
from deep_optim.ops.newton_schulz import Coefficients

from .input_keyed import InputKeyedOptimizer, Missing
from .output_map import OutputMap
from .validation import check_at_least


class InputDeltaMomentum(InputKeyedOptimizer):
    """Momentum that forgets the directions in which its layer's inputs are loud.

    Keeps 4 bytes per parameter (8 with `output="adam"`), and from the forward pass to the step what `capture_inputs`
    keeps. For an m × n matrix and N sampled tokens it costs 2 n FLOPs per parameter, or 4 N where N is no more
    than n and this is less, before the output map.

    Args:
        params: parameters, named parameters, or groups of them; any shape.
        lr: step size of the weights. AdamW's usual values suit "newton_schulz" and "adam", SGD's suit "identity".
        momentum: how much of the memory survives a step in a direction that no input has, 0 to 1.
        inner_lr: step size of the memory on its regression; 0 is plain momentum. Below 1 + momentum, where the memory
            would grow by itself, and refused from there: Σ has trace 1, so no eigenvalue above 1.
        weight_decay: decoupled, multiplied by `lr` as in AdamW.
        nesterov: read the memory with the same write added once more.
        missing: what a matrix with a gradient and without captured inputs does: "error", or "gradient", which takes the
            gradient's Gram at trace 1, as `DeltaMomentum` does on its right side with `gram_norm="trace"`.
        output: "newton_schulz", "adam" or "identity". Under the first two, vectors and scalars are stepped by AdamW;
            under "identity" they have a memory like everything else, keyed by the gradient.
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
        >>> optimizer = InputDeltaMomentum(model.parameters(), lr=1e-3, inputs=capture_inputs(model))  # doctest: +SKIP
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        inner_lr: float = 0.5,
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
            "inner_lr": inner_lr,
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
        check_at_least(group, 0.0, "inner_lr")
        if not group["inner_lr"] < 1 + group["momentum"]:
            raise ValueError(
                f"Invalid inner_lr value: {group['inner_lr']}, stable below {1 + group['momentum']:.3g} "
                f"for momentum={group['momentum']}"
            )

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"memory": torch.zeros_like(param)}

    def update(self, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        memory = group["momentum"] * state["memory"]
        if group["inner_lr"]:
            memory.sub_(self.times_keys(state["memory"], written, state), alpha=group["inner_lr"])
        state["memory"] = memory.add_(written)
        return self.read(written, memory, group)
