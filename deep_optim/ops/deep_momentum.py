"""One step of a deep memory of gradients: an MLP with a linear shortcut, trained by L2 regression, and read.

    memory    m(k) = M k + W₁ h(k),   h(k) = s(√(r p) W₂ k) / √(r h)        keys k: the rows of U / ‖U‖_F, r ≥ p
    H  = ‖U‖_F h(U / ‖U‖_F)                                                 r × h, of the size of U
    [M | W₁] ← the two-sided delta rule on [M | W₁], written with [U | H]
    W₂ ← W₂ − hidden_lr ‖W₂‖ ∂/‖∂‖,   ∂ = ∂/∂W₂ ½ ‖m(K) − c I‖²             then scaled back to its norm √h
    D  = lookahead · U + decay · M                                          what is read: the linear part

Nested Learning, arXiv:2512.24695, Eq. 50 under Eq. 49's objective. Given W₂, the regression is linear in the features
[k, h(k)], so that everything `two_sided_delta` does for a linear memory holds for [M | W₁], and without hidden
features it is that rule bit for bit. The hidden part answers for what the features share with the keys ("explains it
away"), which changes what M keeps; only M is of the shape of the weights and is read. The factors make the arguments
of s about 1 and ‖H‖ about ‖U‖. c is the target for which one inner step writes U, as in `DeltaMomentum`; for W₂ it is
that of a memory without hidden features.
"""

import torch
from torch import Tensor

from .backend import Backend, use_triton
from .frobenius import frobenius_norm
from .mlp_memory import MLPMemory, mlp_memory_gradients, sigmoid
from .newton_schulz import working_dtype
from .one_stack import one_stack
from .two_sided_delta import (
    erasure,
    gram_bound,
    two_sided_delta,
    two_sided_delta_triton,
    write_and_read,
)


def deep_momentum(
    memory: MLPMemory,  # M [..., m, n]; tall: W₁ [..., m, h], W₂ [..., h, n]; wide: transposed [..., h, n], [..., m, h]
    written: Tensor,  # U [..., m, n]
    *,
    decay: float,
    inner_lr: float,
    inner_steps: int = 1,
    hidden_lr: float = 0.0,
    lookahead: float | None = 1.0,
    backend: Backend = "auto",
) -> tuple[MLPMemory, Tensor]:  # D [..., m, n]
    """Return the memory after one step, and what is read from it; see the module docstring for the equation.

    Scale-free: M, W₁ and D are proportional to U. For min(m, n) = p and max(m, n) = r it costs 2 r p h FLOPs for the
    features and what `two_sided_delta` costs at r × (p + h); training W₂ costs about as much again.

    Args:
        memory: the weights. A wide memory is kept as the transpose of a tall one, W₁ and W₂ too.
        written: what the memory is written with; its rows are the keys, its columns if it is wide.
        decay: how much of the memory survives where no key is like it.
        inner_lr: how far M and W₁ move towards what the inner steps make of them, on each side.
        inner_steps: gradient steps on each side's objective.
        hidden_lr: size of W₂'s step, relative to W₂; 0 leaves it as it was drawn.
        lookahead: how many times the write counts again in D; 1 is Nesterov's, None reads M as it is.
        backend: "auto", "reference" or "triton". "auto" takes Triton where anything is erased.
    """
    if _hidden_dim(memory, written) == 0:
        linear, read = two_sided_delta(
            memory.linear,
            written,
            decay=decay,
            short=inner_lr,
            long=inner_lr,
            inner_steps=inner_steps,
            lookahead=lookahead,
            backend=backend,
        )
        return memory._replace(linear=linear), read
    triton = use_triton(backend, *memory, written) and (backend == "triton" or inner_lr != 0)
    step = _deep_momentum_triton if triton else deep_momentum_reference
    return step(
        memory,
        written,
        decay=decay,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        hidden_lr=hidden_lr,
        lookahead=lookahead,
    )


def deep_momentum_reference(
    memory: MLPMemory,
    written: Tensor,
    *,
    decay: float,
    inner_lr: float,
    inner_steps: int,
    hidden_lr: float,
    lookahead: float | None,
) -> tuple[MLPMemory, Tensor]:
    """The equation as written; the ground truth that the other path is tested against."""
    wide = written.shape[-2] < written.shape[-1]
    dim = -2 if wide else -1  # where the features of a key lie
    norm = frobenius_norm(written)
    key = (written / norm).to(working_dtype(written))
    hidden = hidden_part(memory.w2, key)  # h(K), of the layout of W₁
    both = torch.cat([memory.linear.to(key.dtype), memory.w1.to(key.dtype)], dim)  # [M | W₁]
    features = torch.cat([key, hidden.to(key.dtype)], dim)
    erased = erasure(one_stack(both), one_stack(features), inner_lr, inner_lr, inner_steps)
    sizes = [key.shape[dim], hidden.shape[dim]]
    from_linear, from_w1 = (None, None) if erased is None else erased.reshape(both.shape).split(sizes, dim)
    linear, read = write_and_read(memory.linear, written, from_linear, decay, lookahead)
    w1, _ = write_and_read(memory.w1, norm * hidden, from_w1, decay, None)
    return MLPMemory(linear, w1, _train_hidden(memory, written, wide, inner_lr, hidden_lr)), read


def _deep_momentum_triton(
    memory: MLPMemory,
    written: Tensor,
    *,
    decay: float,
    inner_lr: float,
    inner_steps: int,
    hidden_lr: float,
    lookahead: float | None,
) -> tuple[MLPMemory, Tensor]:
    wide = written.shape[-2] < written.shape[-1]
    linear, w1, read = two_sided_delta_triton(
        memory,
        written,
        decay=decay,
        short=inner_lr,
        long=inner_lr,
        inner_steps=inner_steps,
        gram_norm="eigenvalue",
        lookahead=lookahead,
        scales=_scales(written, _hidden_dim(memory, written)),
    )
    return MLPMemory(linear, w1, _train_hidden(memory, written, wide, inner_lr, hidden_lr)), read


def _hidden_dim(memory: MLPMemory, written: Tensor) -> int:
    return memory.w1.shape[-2 if written.shape[-2] < written.shape[-1] else -1]


def _scales(written: Tensor, hidden_dim: int) -> tuple[float, float]:
    """√(r p), which brings the entries of a key to about 1, and 1/√(r h), which brings ‖h(K)‖ to about 1."""
    m, n = written.shape[-2:]
    return (m * n) ** 0.5, (max(m, n) * max(hidden_dim, 1)) ** -0.5


def hidden_part(w2: Tensor, key: Tensor) -> Tensor:
    """Return h(K) for keys with ‖K‖_F = 1: [..., m, h] for tall keys [..., m, n], [..., h, n] for wide ones."""
    wide = key.shape[-2] < key.shape[-1]
    inside, outside = _scales(key, w2.shape[-1 if wide else -2])
    weights = w2.to(key.dtype)
    z = weights.mT @ key if wide else key @ weights.mT
    return outside * sigmoid(inside * z.to(w2.dtype))


def _train_hidden(memory: MLPMemory, written: Tensor, wide: bool, inner_lr: float, hidden_lr: float) -> Tensor:
    """One normalised gradient step of W₂, by the gradients of `mlp_memory`, whose features have no factors."""
    if not (hidden_lr and inner_lr):
        return memory.w2
    linear, w1, w2 = (weight.mT if wide else weight for weight in memory)
    inside, outside = _scales(written, w2.shape[-2])
    norm = frobenius_norm(written)
    key = (written.mT if wide else written) / norm  # [..., r, p]
    target = gram_bound(key) * norm  # inner_lr · c
    scale = inner_lr * (frobenius_norm(linear) + frobenius_norm(w1)) + target  # answers and target of size 1 at most
    share = inner_lr / scale
    plain = MLPMemory(linear * share, outside * w1 * share, inside * w2)  # m(k) = M k + (W₁/√(r h)) s((√(r p) W₂) k)
    gradient = mlp_memory_gradients(plain, key, target / scale).w2
    size = torch.linalg.matrix_norm(w2, keepdim=True)
    moved = w2 - gradient / frobenius_norm(gradient) * (hidden_lr * size)
    moved = moved / frobenius_norm(moved) * size
    return moved.mT if wide else moved
