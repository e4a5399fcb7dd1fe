"""A whole step of delta momentum, memory and weights, in place on many parameters of one shape.

    U  = φ(G)                                                     what is written
    M  ← decay · M − short · M C T − long · K T KᵀM + U           the two-sided delta rule
    D  = lookahead · U + decay · M,  or M                         what is read
    W  ← (1 − lr · weight_decay) · W − lr · D

`two_sided_delta` returns M′ and D and leaves the rest to its caller: matrices are stacked before and taken apart after,
and M, D and W each cross memory several times more. This is the same step for an optimizer whose output map is the
identity, by a function that may write: from Triton no matrix is copied to stack it, and M and W are written once.
Nested Learning, arXiv:2512.24695, Eq. 48-49.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from .backend import Backend, use_triton
from .delta_momentum_triton import delta_momentum_triton
from .feature_map import FeatureMap, feature_map
from .two_sided_delta import GramNorm, two_sided_delta_reference


def delta_momentum_step(
    params: Sequence[Tensor],  # W
    grads: Sequence[Tensor],  # G
    memories: Sequence[Tensor],  # M
    *,
    shape: tuple[int, int, int],
    lr: float | Tensor,
    weight_decay: float,
    decay: float,
    right: float,
    left: float,
    inner_steps: int,
    gram_norm: GramNorm,
    features: FeatureMap,
    lookahead: float | None,
    maximize: bool,
    backend: Backend = "auto",
) -> None:
    """Write `params` and `memories`; see the module docstring for the equation, `two_sided_delta` for its cost.

    From Triton: 42 bytes per parameter on one side, 46 on both, and 4 bytes per parameter of working memory.

    Args:
        params: the weights, all of one size.
        grads: their gradients; not written.
        memories: one per parameter, and of its size.
        shape: (split, m, n), how each of them is read as matrices.
        lr: step size of the weights; from a tensor on the device it is read there.
        weight_decay: decoupled, multiplied by `lr`.
        decay: how much of the memory survives where no key is like it.
        right: how far the memory moves on the objective whose keys are the rows of U.
        left: likewise for its columns.
        inner_steps: gradient steps on each objective.
        gram_norm: what scales the Gram to at most 1: a bound on its "eigenvalue", or its "trace".
        features: φ; Triton has "identity" and "soft_rows".
        lookahead: how many times the write counts again in D; None reads D = M.
        maximize: ascend: U = φ(−G).
        backend: "auto", "reference" or "triton". "auto" takes Triton where all is `fusible`.

    Raises:
        RuntimeError: for "triton" where not all is.
    """
    triton = fusible((*params, *grads, *memories), features, backend)
    if backend == "triton" and not triton:
        raise RuntimeError(f"backend='triton' needs plain, contiguous tensors and features it has; got {features=}")
    step = delta_momentum_triton if triton else delta_momentum_reference
    tall = shape[1] >= shape[2]
    step(
        params,
        grads,
        memories,
        shape=shape,
        lr=lr,
        weight_decay=weight_decay,
        decay=decay,
        short=right if tall else left,
        long=left if tall else right,
        inner_steps=inner_steps,
        gram_norm=gram_norm,
        features=features,
        lookahead=lookahead,
        maximize=maximize,
    )


def fusible(tensors: Sequence[Tensor], features: FeatureMap, backend: Backend) -> bool:
    """Return whether to go by the addresses of these tensors, in kernels that have these features.

    Not under torch.compile, nor for subclasses such as DTensor or what is not contiguous. Of the features, "identity"
    and "soft_rows" are a factor per token, which the kernels apply wherever they read G.
    """
    plain = all(type(tensor) in (Tensor, Parameter) and tensor.is_contiguous() for tensor in tensors)
    known = features in ("identity", "soft_rows")
    return plain and known and not torch.compiler.is_compiling() and use_triton(backend, *tensors)


def delta_momentum_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    memories: Sequence[Tensor],
    *,
    shape: tuple[int, int, int],
    lr: float | Tensor,
    weight_decay: float,
    decay: float,
    short: float,
    long: float,
    inner_steps: int,
    gram_norm: GramNorm,
    features: FeatureMap,
    lookahead: float | None,
    maximize: bool,
) -> None:
    """The equation as written; the ground truth that the other path is tested against."""
    memory, grad = (torch.cat([t.reshape(shape) for t in tensors]) for tensors in (memories, grads))
    memory, direction = two_sided_delta_reference(
        memory,
        feature_map(-grad if maximize else grad, features),
        decay=decay,
        short=short,
        long=long,
        inner_steps=inner_steps,
        gram_norm=gram_norm,
        lookahead=lookahead,
    )
    for kept, new in zip(memories, memory.split(shape[0]), strict=True):
        kept.copy_(new.reshape(kept.shape))
    for param, moved in zip(params, direction.split(shape[0]), strict=True):
        param.mul_(1 - lr * weight_decay).sub_(lr * moved.reshape(param.shape))
