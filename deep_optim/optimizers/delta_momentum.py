"""Delta momentum: a linear memory of gradients, trained by L2 regression.

    objective   ½ ‖M Kᵀ − c I‖²                                    keys K = φ(G), scaled to KᵀK ≤ I
    M   ← momentum · M − inner_lr · M KᵀK T + φ(G)                 side="right": the keys are rows
    M   ← momentum · M − inner_lr · K T KᵀM + φ(G)                 side="left": the keys are columns
    M   ← momentum · M − inner_lr · (M KᵀK T + K T KᵀM) + φ(G)     side="both"
    D   = lookahead · φ(G) + momentum · M   if nesterov, else M
    W   ← (1 − lr · weight_decay) · W − lr · σ(D)

T = I for one inner step; `deep_optim.ops.two_sided_delta` has it for more.

`Momentum` is the same memory under a dot-product objective, which has no erasing term: it adds every gradient, where
the delta rule first forgets what the memory already answers for these keys. Along an eigenvector of the Gram KᵀK
with eigenvalue λ ≤ 1 one inner step keeps momentum − inner_lr · λ of the memory: directions in which gradients are
loud every step are remembered briefly, rare ones for long. Several inner steps bring the memory nearer to the
regression's solution, where every direction that a gradient has is answered, and forgotten, alike.
Nested Learning, arXiv:2512.24695, Eq. 48-49. As printed, Eq. 49 has no step size on the Gram and does not normalise
it, so that it vanishes for small gradients and diverges for large ones, on the paper's own example too. The target
c = s / inner_lr, where K = φ(G) / s, makes what is written φ(G) itself, so that inner_lr = 0 is `Momentum`; "both"
erases once for each side and writes once, and so do several inner steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deep_optim.ops.backend import Backend, use_triton
from deep_optim.ops.delta_momentum import FUSED_FEATURES, DeltaRule
from deep_optim.ops.delta_momentum_triton import delta_momentum_triton
from deep_optim.ops.feature_map import FeatureMap, feature_map
from deep_optim.ops.newton_schulz import Coefficients
from deep_optim.ops.two_sided_delta import GramNorm, most_erased, two_sided_delta

from .base import MemoryOptimizer
from .matrices import has_memory, matrix_shape
from .output_map import OutputMap
from .sharding import local
from .validation import check_at_least, check_choice, check_count

Side = Literal["right", "left", "both"]

_MARGIN = 1.05  # for rounding, where Grams are multiplied in bfloat16
_MOST_STEPS = 6  # the coefficients of more cancel to below bfloat16's precision, and the memory may grow


class DeltaMomentum(MemoryOptimizer):
    """Momentum that overwrites instead of piling up.

    Keeps 4 bytes per parameter (8 with `output="adam"`). For an m × n matrix with m ≤ n it costs 8 m FLOPs per
    parameter (4 m or 6 m for one side) and a product of m × m matrices, three for three inner steps, before the output
    map, where Newton-Schulz costs 17 to 30 m per parameter in all.

    Args:
        params: parameters, named parameters, or groups of them; any shape.
        lr: step size of the weights. AdamW's usual values suit "newton_schulz" and "adam", SGD's suit "identity".
        momentum: how much of the memory survives a step that brings no key like it, 0 to 1. Higher than plain
            momentum's best, since the keys that do recur are forgotten faster.
        inner_lr: how far the memory moves towards what the inner steps make of it, per side; 0 is plain momentum.
            Stable while its sum over the sides is below 1 + momentum (a little less for several inner steps), and
            refused above.
        inner_steps: gradient steps on the regression per gradient, in closed form; 1 to 6.
        weight_decay: decoupled, multiplied by `lr` as in AdamW.
        nesterov: read the memory with the same write added `lookahead` times more.
        lookahead: 1 is Nesterov's. More weighs the gradient at hand more, which a memory that is long in its quiet
            directions can need.
        side: which Gram erases: "right" (over the columns of G, the paper's), "left" (over its rows), or "both".
        gram_norm: what scales the Gram to at most 1: a close bound on its largest "eigenvalue", or its "trace", which
            is gentler the more directions a gradient has, and for one sample the input-keyed rule exactly.
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
        kahan_sum: keep what rounding takes from bfloat16 and float16 weights, so that small updates are not lost, at
            2 bytes per parameter.
        backend: "auto", "reference" or "triton", for the step of the memory.

    Raises:
        ValueError: for a value out of range, in the constructor or in any group.
        RuntimeError: for `differentiable`, for `fused` with `foreach`, for complex parameters or sparse gradients, and
            at a step for parameters that `backend="triton"` cannot take, before anything is stepped.

    Example:
        >>> optimizer = DeltaMomentum(model.parameters(), lr=1e-3)  # doctest: +SKIP
    """

    in_place: ClassVar[tuple[str, ...]] = ("memory",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        inner_lr: float = 0.5,
        inner_steps: int = 1,
        weight_decay: float = 1e-2,
        nesterov: bool = True,
        lookahead: float = 1.0,
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
        kahan_sum: bool = False,
        backend: Backend = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "inner_lr": inner_lr,
            "inner_steps": inner_steps,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "lookahead": lookahead,
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
            "kahan_sum": kahan_sum,
            "backend": backend,
        }
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_at_least(group, 0.0, "inner_lr")
        check_read_and_steps(group)
        check_choice(group, "side", get_args(Side))
        check_choice(group, "gram_norm", get_args(GramNorm))
        check_choice(group, "feature_map", get_args(FeatureMap))
        check_choice(group, "backend", get_args(Backend))
        check_stable(group, sides=2 if group["side"] == "both" else 1)

    def check_gradients(self, group: dict[str, Any]) -> None:
        super().check_gradients(group)
        check_kernels(group)

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"memory": torch.zeros_like(param)}

    def features(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        return feature_map(grad, group["feature_map"])

    def update(self, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        rule = rule_of(group, written.shape)
        short, long = rule.short_and_long()
        state["memory"], direction = two_sided_delta(
            state["memory"],
            written,
            decay=rule.decay,
            short=short,
            long=long,
            inner_steps=rule.inner_steps,
            gram_norm=rule.gram_norm,
            lookahead=rule.lookahead,
            backend=group["backend"],
        )
        return direction

    def writes_in_place(self, group: dict[str, Any]) -> bool:
        return group["inner_lr"] != 0 and group["output"] != "adam" and group["feature_map"] in FUSED_FEATURES

    def write_in_place(self, grads: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> Tensor:
        return write_delta(grads, [state["memory"] for state in states], group)

    def step_in_place(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]
    ) -> None:
        """Without an output map, the same kernels take the weights along."""
        if group["output"] != "identity":
            super().step_in_place(params, grads, states, group)
            return
        memories, rule = [state["memory"] for state in states], rule_of(group, matrix_shape(params[0], group))
        delta_momentum_triton(params, grads, memories, rule, lr=group["lr"], weight_decay=group["weight_decay"])


def write_delta(grads: list[Tensor], memories: list[Tensor], group: Mapping[str, Any]) -> Tensor:
    """Write the features of the gradients into `memories` and read them [B, m, n], by kernels."""
    direction = delta_momentum_triton(None, grads, memories, rule_of(group, matrix_shape(grads[0], group)))
    assert direction is not None
    return direction


def rule_of(group: Mapping[str, Any], shape: Sequence[int]) -> DeltaRule:
    """Return what a group says of stacks or parameters of this shape."""
    stack, m, n = shape
    right, left = (group["inner_lr"] * (group["side"] in (side, "both")) for side in ("right", "left"))
    return DeltaRule(
        shape=(stack, m, n),
        decay=group["momentum"],
        right=right,
        left=left,
        inner_steps=group["inner_steps"],
        gram_norm=group["gram_norm"],
        features=group["feature_map"],
        lookahead=read_out(group),
        maximize=group["maximize"],
    )


def read_out(group: Mapping[str, Any]) -> float | None:
    """Return how many times the write counts again in what is read; None if the memory alone is read."""
    return group["lookahead"] if group["nesterov"] else None


def check_kernels(group: Mapping[str, Any]) -> None:
    """Refuse gradients that kernels asked for by name cannot write. Half precision reaches them in float32."""
    if group["backend"] != "triton":
        return
    for param in group["params"]:
        if param.grad is not None and has_memory(param, group):
            try:
                use_triton("triton", local(param.grad), dtypes=(torch.float32, torch.bfloat16, torch.float16))
            except RuntimeError as error:
                raise RuntimeError(
                    f"{error}, for a parameter of size {tuple(param.size())}; nothing has been stepped (backend='auto' "
                    "takes plain torch for such parameters)"
                ) from None


def check_read_and_steps(group: Mapping[str, Any]) -> None:
    """Refuse a read-out that is the memory alone, which has a name, and more steps than their polynomial bears."""
    if not 0.0 < group["lookahead"] < float("inf"):
        raise ValueError(f"Invalid lookahead value: {group['lookahead']} (nesterov=False reads the memory alone)")
    check_count(group, "inner_steps")
    if group["inner_steps"] > _MOST_STEPS:
        raise ValueError(f"Invalid inner_steps value: {group['inner_steps']}, expected 1 to {_MOST_STEPS}")


def check_stable(group: Mapping[str, Any], *, sides: int) -> None:
    """Refuse an inner_lr whose sum over the sides would let the memory grow by itself."""
    limit = (1 + group["momentum"]) / most_erased(group["inner_steps"]) / _MARGIN / sides
    if group["inner_lr"] > limit:
        raise ValueError(
            f"Invalid inner_lr value: {group['inner_lr']}, stable up to {limit:.3g} for sides={sides}, "
            f"inner_steps={group['inner_steps']} and momentum={group['momentum']}"
        )
