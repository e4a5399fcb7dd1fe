"""Preconditioned momentum: a linear memory that is written with P(G) instead of G.

    objective   −⟨M Gᵀ, P⟩
    M   ← momentum · M + P(G)
    D   = P(G) + momentum · M   if nesterov, else M
    W   ← (1 − lr · weight_decay) · W − lr · σ(D)

    identity         P(G) = G
    diagonal         P(G) = G / (√v̂ + ε),       v ← β v + (1 − β) G²
    shampoo          P(G) = (L̂ + ρ I)^(−½) G,   L ← β L + (1 − β) G Gᵀ,   root refreshed every few steps
    newton_schulz    P(G) = NS(G)

The preconditioner gives the memory other values for the same keys. It acts before the average over time, where an
output map (`Momentum(output=...)`) acts after it: a loud step counts no more than a quiet one.
Nested Learning, arXiv:2512.24695, Eq. 46-47, where P is an m × m matrix on the left and left open.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deep_optim.ops.inverse_sqrt import inverse_sqrt
from deep_optim.ops.newton_schulz import Coefficients, newton_schulz

from .base import MemoryOptimizer
from .counters import beside, weight_seen
from .matrices import matrix_shape
from .output_map import OutputMap
from .validation import check_at_least, check_choice

Preconditioner = Literal["identity", "diagonal", "shampoo", "newton_schulz"]

_RIDGE = 1e-2  # of the mean eigenvalue: a direction that is new since the last refresh is amplified at most tenfold


class PreconditionedMomentum(MemoryOptimizer):
    """Momentum over preconditioned gradients; with the defaults, Newton-Schulz over RMS-normalised gradients.

    Keeps 4 bytes per parameter, plus 4 for "diagonal", or 8 m² per m × n matrix for "shampoo". "newton_schulz" costs
    one Newton-Schulz more per step; "shampoo" costs 4 m FLOPs per parameter, and about 130 m³ in float64 per matrix
    each time the root is refreshed.

    Args:
        params: parameters, named parameters, or groups of them; any shape.
        lr: step size. AdamW's usual values suit "newton_schulz" and "adam". Under "identity" the step is
            1 / (1 − momentum) times that of the preconditioned gradient.
        momentum: how much of the memory survives a step, 0 to 1.
        weight_decay: decoupled, multiplied by `lr` as in AdamW.
        nesterov: read the memory with the same write added once more.
        preconditioner: "diagonal", "shampoo", "newton_schulz" or "identity" (which is `Momentum`).
        precondition_beta: decay rate of the preconditioner's statistics.
        precondition_interval: steps between two refreshes of Shampoo's root. Under torch.compile or `capturable` the
            host cannot decide, and the root is computed every step, though used as often.
        output: "newton_schulz", "adam" or "identity". Under the first two, vectors and scalars are stepped by AdamW;
            under "identity" they have a memory like everything else.
        ns_steps: Newton-Schulz iterations.
        ns_coefficients: "muon" or "polar_express".
        adamw_betas: AdamW's decay rates, for what is no matrix; the second is also that of `output="adam"`.
        adamw_eps: AdamW's term in the denominator; likewise, and that of "diagonal".
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
        >>> optimizer = PreconditionedMomentum(model.parameters(), lr=1e-3)  # doctest: +SKIP
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 1e-2,
        nesterov: bool = True,
        preconditioner: Preconditioner = "diagonal",
        precondition_beta: float = 0.99,
        precondition_interval: int = 10,
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
            "preconditioner": preconditioner,
            "precondition_beta": precondition_beta,
            "precondition_interval": precondition_interval,
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
        check_choice(group, "preconditioner", get_args(Preconditioner))
        check_at_least(group, 1, "precondition_interval")
        if not 0.0 <= group["precondition_beta"] < 1.0:
            raise ValueError(f"Invalid precondition_beta value: {group['precondition_beta']}")

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = {"memory": torch.zeros_like(param)}
        if group["preconditioner"] == "diagonal":
            state |= {
                "preconditioner.exp_avg_sq": torch.zeros_like(param),
                "step": torch.zeros((), dtype=torch.float32),
            }
        if group["preconditioner"] == "shampoo":
            split, m, _ = matrix_shape(param, group)
            square = torch.zeros(split, m, m, dtype=param.dtype, device=param.device)  # the same on every rank
            state |= {
                "preconditioner.gram": square,
                "preconditioner.root": square.clone(),
                "step": torch.zeros((), dtype=torch.float32),
            }
        return state

    def entrywise(self, group: dict[str, Any]) -> bool:
        return group["preconditioner"] in ("identity", "diagonal")

    def features(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        kind, beta = group["preconditioner"], group["precondition_beta"]
        if kind == "diagonal":
            second = (beta * state["preconditioner.exp_avg_sq"]).addcmul_(grad, grad, value=1 - beta)
            state["preconditioner.exp_avg_sq"] = second
            seen = beside(weight_seen(beta, state["step"].to(grad.dtype)), grad)  # [B, 1, 1]
            return grad / ((second / seen).sqrt() + group["adamw_eps"])
        if kind == "shampoo":
            gram = state["preconditioner.gram"].lerp(grad @ grad.mT, 1 - beta)  # [B, m, m]
            state["preconditioner.gram"] = gram
            due = (state["step"] - 1) % group["precondition_interval"] == 0  # [B, 1, 1]
            if torch.compiler.is_compiling() or group["capturable"] or due.any():  # else the host may decide
                seen = beside(weight_seen(beta, state["step"].to(grad.dtype)), grad)
                root = inverse_sqrt(gram / seen, eps=_RIDGE)
                state["preconditioner.root"] = torch.where(beside(due, grad), root, state["preconditioner.root"])
            return state["preconditioner.root"] @ grad
        if kind == "newton_schulz":
            return newton_schulz(grad, steps=group["ns_steps"], coefficients=group["ns_coefficients"])
        return grad

    def update(self, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        state["memory"] = (group["momentum"] * state["memory"]).add_(written)
        return self.read(written, state["memory"], group)
