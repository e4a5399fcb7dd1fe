"""Delta momentum in place, on many parameters of one shape: the memory alone, or the weights too.

    U  = φ(G)                                                     what is written
    M  ← decay · M − short · M C T − long · K T KᵀM + U           the two-sided delta rule
    D  = lookahead · U + decay · M,  or M                         what is read
    W  ← (1 − lr · weight_decay) · W − lr · D                     if the output map is the identity

`two_sided_delta` returns M′ and D and leaves the rest to its caller: U is made, matrices are stacked before and taken
apart after, and each time all of them cross memory. These are the same steps by functions that may write: from Triton
no matrix is copied to stack it, U is never in memory, and M and W are written once.
Nested Learning, arXiv:2512.24695, Eq. 48-49.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .addresses import ADDRESSABLE, addressable
from .backend import Backend
from .delta_momentum_triton import delta_momentum_triton
from .feature_map import FeatureMap, feature_map
from .two_sided_delta import GramNorm, two_sided_delta_reference

FUSED_FEATURES: tuple[FeatureMap, ...] = ("identity", "soft_rows")  # a factor per token, where kernels read G


@dataclass(frozen=True)
class DeltaRule:
    """How parameters are read as matrices, and how their memories are written and read.

    Args:
        shape: (split, m, n) of each parameter.
        decay: how much of the memory survives where no key is like it.
        right: how far the memory moves on the objective whose keys are the rows of U.
        left: likewise for its columns.
        inner_steps: gradient steps on each objective.
        gram_norm: what scales the Gram to at most 1: a bound on its "eigenvalue", or its "trace".
        features: φ; Triton has `FUSED_FEATURES`.
        lookahead: how many times the write counts again in D; None reads D = M.
        maximize: ascend: U = φ(−G).
    """

    shape: tuple[int, int, int]
    decay: float
    right: float
    left: float
    inner_steps: int
    gram_norm: GramNorm
    features: FeatureMap
    lookahead: float | None
    maximize: bool

    def short_and_long(self) -> tuple[float, float]:
        """Return the rates along the short dimension, which is the second of a square, and along the long one."""
        return (self.right, self.left) if self.shape[1] >= self.shape[2] else (self.left, self.right)


def delta_momentum_step(
    params: Sequence[Tensor],  # W
    grads: Sequence[Tensor],  # G
    memories: Sequence[Tensor],  # M
    rule: DeltaRule,
    *,
    lr: float | Tensor,
    weight_decay: float,
    backend: Backend = "auto",
) -> None:
    """Write `params` and `memories`; see the module docstring for the equation, `two_sided_delta` for its cost.

    From Triton: 42 bytes per parameter on one side, 48 on both, and 4 bytes per parameter of working memory.

    Args:
        params: the weights, all of one size.
        grads: their gradients; not written.
        memories: one per parameter, and of its size.
        rule: how the memory is written and read.
        lr: step size of the weights; from a tensor on the device it is read there.
        weight_decay: decoupled, multiplied by `lr`.
        backend: "auto", "reference" or "triton". "auto" takes Triton where all are `addressable` and it has
            the features.

    Raises:
        RuntimeError: for "triton" where it cannot.
    """
    step = _implementation((*params, *memories), grads, rule, backend)
    step(params, grads, memories, rule, lr=lr, weight_decay=weight_decay)


def delta_momentum_read(
    grads: Sequence[Tensor],  # G
    memories: Sequence[Tensor],  # M
    rule: DeltaRule,
    *,
    backend: Backend = "auto",
) -> Tensor:  # D [B, m, n]
    """Write `memories` and return what is read, for an output map.

    Arguments, errors and cost are those of `delta_momentum_step`, of whose bytes it saves 4.
    """
    direction = _implementation(memories, grads, rule, backend)(None, grads, memories, rule)
    assert direction is not None
    return direction


def _implementation(
    written: Sequence[Tensor], read: Sequence[Tensor], rule: DeltaRule, backend: Backend
) -> Callable[..., Tensor | None]:
    if rule.features in FUSED_FEATURES and addressable(written, read, backend):
        return delta_momentum_triton
    if backend == "triton":
        raise RuntimeError(f"backend='triton' needs {ADDRESSABLE}, and features it has; got {rule.features!r}")
    return delta_momentum_reference


def delta_momentum_reference(
    params: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    memories: Sequence[Tensor],
    rule: DeltaRule,
    *,
    lr: float | Tensor = 0.0,
    weight_decay: float = 0.0,
) -> Tensor | None:  # D [B, m, n], without `params`
    """The equation as written; the ground truth that the other path is tested against."""
    memory, grad = (torch.cat([t.reshape(rule.shape) for t in tensors]) for tensors in (memories, grads))
    short, long = rule.short_and_long()
    memory, direction = two_sided_delta_reference(
        memory,
        feature_map(-grad if rule.maximize else grad, rule.features),
        decay=rule.decay,
        short=short,
        long=long,
        inner_steps=rule.inner_steps,
        gram_norm=rule.gram_norm,
        lookahead=rule.lookahead,
    )
    for kept, new in zip(memories, memory.split(rule.shape[0]), strict=True):
        kept.copy_(new.reshape(kept.shape))
    if params is None:
        return direction
    for param, moved in zip(params, direction.split(rule.shape[0]), strict=True):
        param.mul_(1 - lr * weight_decay).sub_(lr * moved.reshape(param.shape))
    return None
