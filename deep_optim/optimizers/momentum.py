"""Momentum: a linear memory of gradients, trained by a dot-product objective.

    objective   −⟨M φ(G)ᵀ, I⟩
    M   ← momentum · M + φ(G)
    D   = φ(G) + momentum · M   if nesterov, else M
    W   ← (1 − lr · weight_decay) · W − lr · σ(D)

Each gradient is added to what the memory holds already; nothing is ever erased but by the common decay. That is what
sets it apart from `DeltaMomentum`, the same memory under an L2 objective. With σ = identity it is SGD with momentum,
with σ = Newton-Schulz it is Muon, with σ = adam it is AdamW.
Nested Learning, arXiv:2512.24695, Eq. 33-34 (the memory), 51 (φ), 52 (σ). The paper keeps −lr inside the memory and
adds M to the weights; here M is torch's buffer and the sign is torch's.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deep_optim.ops.feature_map import FeatureMap, feature_map
from deep_optim.ops.momentum import momentum_triton
from deep_optim.ops.newton_schulz import Coefficients

from .base import MemoryOptimizer
from .matrices import matrix_shape
from .output_map import OutputMap
from .validation import check_choice


class Momentum(MemoryOptimizer):
    """SGD with momentum, Muon or AdamW, by the choice of `output`: the baseline that the other memories extend.

    Keeps 4 bytes per parameter (8 with `output="adam"`). Five steps of Newton-Schulz cost 30 m FLOPs
    per parameter of a square matrix, and 17 m if one side is four times m, far below the forward and backward pass at
    usual batch sizes.

    Args:
        params: parameters, named parameters, or groups of them; any shape.
        lr: step size. AdamW's usual values suit "newton_schulz" and "adam", SGD's suit "identity".
        momentum: how much of the memory survives a step, 0 to 1. Muon's customary 0.95; in runs of
            hundreds of steps 0.8 to 0.9 was better.
        weight_decay: decoupled, multiplied by `lr` as in AdamW.
        nesterov: read the memory with the same write added once more.
        feature_map: what is written in place of the gradient: "identity", "soft_rows", "tanh" or "sign".
        output: "newton_schulz", "adam" or "identity". Under the first two, vectors and scalars are stepped by AdamW;
            under "identity" they have a memory like everything else.
        ns_steps: Newton-Schulz iterations.
        ns_coefficients: "muon" or "polar_express".
        adamw_betas: AdamW's decay rates, for what is no matrix; the second is also that of `output="adam"`.
        adamw_eps: AdamW's term in the denominator; likewise.
        foreach: use torch's foreach AdamW for what is no matrix.
        maximize: ascend instead.
        capturable: keep counters on the device, so that a CUDA graph can capture the step.
        differentiable: refused; the memories are written in place.
        fused: use torch's fused AdamW for what is no matrix; by default wherever torch has one.
        kahan_sum: keep what rounding takes from bfloat16 and float16 weights, so that small updates are not lost, at
            2 bytes per parameter.

    Raises:
        ValueError: for a value out of range, in the constructor or in any group.
        RuntimeError: for `differentiable`, for `fused` with `foreach`, for complex parameters or sparse gradients.

    Example:
        >>> optimizer = Momentum(model.parameters(), lr=1e-3)  # doctest: +SKIP
    """

    in_place: ClassVar[tuple[str, ...]] = ("memory",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 1e-2,
        nesterov: bool = True,
        feature_map: FeatureMap = "identity",
        output: OutputMap = "newton_schulz",
        ns_steps: int = 5,
        ns_coefficients: Coefficients = "muon",
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        *,
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
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "feature_map": feature_map,
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
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_choice(group, "feature_map", get_args(FeatureMap))

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"memory": torch.zeros_like(param)}

    def entrywise(self, group: dict[str, Any]) -> bool:
        return group["feature_map"] == "identity"

    def features(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        return feature_map(grad, group["feature_map"])

    def update(self, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        state["memory"] = (group["momentum"] * state["memory"]).add_(written)
        return self.read(written, state["memory"], group)

    def writes_in_place(self, group: dict[str, Any]) -> bool:
        return group["feature_map"] == "identity" and group["output"] != "adam"

    def write_in_place(self, grads: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> Tensor:
        return write_momentum(grads, states, group)


def write_momentum(grads: list[Tensor], states: list[dict[str, Tensor]], group: Mapping[str, Any]) -> Tensor:
    """Write the gradients themselves into "memory" and read it [B, m, n], by a kernel."""
    memories = [state["memory"] for state in states]
    split, m, n = matrix_shape(grads[0], group)
    direction = momentum_triton(grads, memories, group["momentum"], group["nesterov"], group["maximize"])
    return direction.reshape(split * len(grads), m, n)
