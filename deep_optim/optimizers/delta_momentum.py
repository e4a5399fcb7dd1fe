"""Delta momentum: a linear memory of gradients, trained by L2 regression.

    objective   ½ ‖M Kᵀ − c I‖²                                    keys K = φ(G), scaled to ‖KᵀK‖ = 1
    M   ← momentum · M − inner_lr · M KᵀK + φ(G)                   side="right": the keys are rows
    M   ← momentum · M − inner_lr · K KᵀM + φ(G)                   side="left": the keys are columns
    M   ← momentum · M − inner_lr · (M KᵀK + K KᵀM) + φ(G)         side="both"
    D   = φ(G) + momentum · M   if nesterov, else M
    W   ← (1 − lr · weight_decay) · W − lr · σ(D)

`Momentum` is the same memory under a dot-product objective, which has no erasing term: it adds every gradient, where
the delta rule first forgets what the memory already answers for these keys. Along an eigenvector of the Gram KᵀK
with eigenvalue λ ≤ 1 the memory survives by momentum − inner_lr · λ: directions in which gradients are loud every
step are remembered briefly, rare ones for long.
Nested Learning, arXiv:2512.24695, Eq. 48-49. As printed, Eq. 49 has no step size on the Gram and does not normalise
it, so that it vanishes for small gradients and diverges for large ones, on the paper's own example too. The target
c = s / inner_lr, where K = φ(G) / s, makes what is written φ(G) itself, so that inner_lr = 0 is `Momentum`; "both"
erases once for each side and writes once.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deep_optim.ops.backend import Backend
from deep_optim.ops.delta_rule import delta_rule
from deep_optim.ops.feature_map import FeatureMap, feature_map
from deep_optim.ops.newton_schulz import Coefficients
from deep_optim.ops.power_iteration import largest_eigenvalue

from .base import MemoryOptimizer
from .matrices import matrix_shape
from .output_map import OutputMap
from .validation import check_at_least, check_choice

Side = Literal["right", "left", "both"]
GramNorm = Literal["eigenvalue", "trace"]

_MARGIN = 1.5  # by how much the power iteration may underestimate an eigenvalue


class DeltaMomentum(MemoryOptimizer):
    """Momentum that overwrites instead of piling up.

    Keeps 4 bytes per parameter (8 with `output="adam"`), and min(m, n) numbers per m × n matrix for the power
    iteration. Costs 4 min(m, n) FLOPs per parameter and side before the output map, where Newton-Schulz costs about
    20 to 30 min(m, n).

    Args:
        params: parameters, named parameters, or groups of them; any shape.
        lr: step size of the weights. AdamW's usual values suit "newton_schulz" and "adam", SGD's suit "identity".
        momentum: how much of the memory survives a step that brings no key like it, 0 to 1. Higher than plain
            momentum's best, since the keys that do recur are forgotten faster.
        inner_lr: step size of the memory on its own regression, per side; 0 is plain momentum. Stable while its sum
            over the sides is below 1 + momentum; refused above two thirds of that, which leaves room for a power
            iteration that finds two thirds of the eigenvalue.
        weight_decay: decoupled, multiplied by `lr` as in AdamW.
        nesterov: read the memory with the same write added once more.
        side: which Gram erases: "right" (over the columns of G, the paper's), "left" (over its rows), or "both".
        gram_norm: what scales the Gram to at most 1: its largest "eigenvalue", or its "trace", which is gentler the
            more directions a gradient has, and for one sample the input-keyed rule exactly.
        feature_map: the keys, and what is written: "soft_rows" (rows of nearly equal length), "identity", "tanh" or
            "sign".
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
        backend: "auto", "reference" or "triton", for the delta rule.

    Raises:
        ValueError: for a value out of range, in the constructor or in any group.
        RuntimeError: for `differentiable`, for `fused` with `foreach`, for complex parameters or sparse gradients.

    Example:
        >>> optimizer = DeltaMomentum(model.parameters(), lr=1e-3)  # doctest: +SKIP
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        inner_lr: float = 0.5,
        weight_decay: float = 1e-2,
        nesterov: bool = True,
        side: Side = "both",
        gram_norm: GramNorm = "eigenvalue",
        feature_map: FeatureMap = "soft_rows",
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
        backend: Backend = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "inner_lr": inner_lr,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "side": side,
            "gram_norm": gram_norm,
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
            "backend": backend,
        }
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_at_least(group, 0.0, "inner_lr")
        check_choice(group, "side", get_args(Side))
        check_choice(group, "gram_norm", get_args(GramNorm))
        check_choice(group, "feature_map", get_args(FeatureMap))
        check_choice(group, "backend", get_args(Backend))
        limit = (1 + group["momentum"]) / _MARGIN / (2 if group["side"] == "both" else 1)
        if group["inner_lr"] > limit:
            raise ValueError(
                f"Invalid inner_lr value: {group['inner_lr']}, stable up to {limit:.3g} for side={group['side']!r} "
                f"and momentum={group['momentum']}"
            )

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = {"memory": torch.zeros_like(param)}
        if group["gram_norm"] == "eigenvalue":
            split, m, n = matrix_shape(param, group)
            # the same on every rank, so no share of a sharded parameter
            state["eigenvector"] = torch.zeros(split, 1, min(m, n), dtype=param.dtype, device=param.device)
        return state

    def features(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        return feature_map(grad, group["feature_map"])

    def update(self, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        key = self._keys(written, state, group)  # [B, m, n]
        kept = group["momentum"] * state["memory"]
        if group["side"] in ("right", "both"):
            kept = kept + self._erasure(state["memory"], key, group)
        if group["side"] in ("left", "both"):
            kept = kept + self._erasure(state["memory"].mT, key.mT, group).mT
        state["memory"] = kept + written
        return self.read(written, state["memory"], group)

    def _erasure(self, memory: Tensor, key: Tensor, group: dict[str, Any]) -> Tensor:
        """−inner_lr · M KᵀK: the delta rule without retention and without a value."""
        return delta_rule(memory, key, None, decay=0.0, rate=group["inner_lr"], backend=group["backend"])

    def _keys(self, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """The keys, scaled so that the Gram's largest eigenvalue, or its trace, is 1."""
        tiny = torch.finfo(written.dtype).tiny
        key = written / torch.linalg.matrix_norm(written, keepdim=True).clamp(min=tiny)
        if group["gram_norm"] == "trace":
            return key
        wide = key.shape[-2] < key.shape[-1]  # KᵀK and K Kᵀ share their eigenvalues: iterate on the smaller one
        eigenvalue, state["eigenvector"] = largest_eigenvalue(key.mT if wide else key, state["eigenvector"])
        return key * eigenvalue.clamp(min=tiny).rsqrt()
