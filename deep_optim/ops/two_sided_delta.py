"""The delta rule on both sides of a memory of gradients, several inner steps at once, by matrix products.

    K  = U / (‖U‖_F √λ),   C = KᵀK                        what is written, as r keys in its rows; r ≥ p
    λ  = ‖C²‖_F^{1/2} of U / ‖U‖_F                        at least its largest eigenvalue: C ≤ I
    R  = (I − η₁C) ⋯ (I − η_j C),   T = (I − R) C⁻¹       j inner steps; a polynomial of degree j − 1 in C
    M′ = decay · M − short · M C T − long · K T KᵀM + U
    D  = lookahead · U + decay · M′                       what is read

One gradient step of ½ ‖M Kᵀ‖² takes M C from the memory, and j steps of sizes η take M (I − R) = M C T; the mirrored
objective ½ ‖Kᵀ M‖² takes K T KᵀM. One step has η = 1. Several have the step sizes of Chebyshev's semi-iteration
for the eigenvalues in [0.2, 1], which it erases to within 1/T_j(1.5) (a ninth for j = 3), and quieter ones more than as
many steps of η = 1 would. The large products are KᵀK, KᵀM, M (C T) and K (T KᵀM), in bfloat16 where that is native; all
others are p × p, however many inner steps there are.
Nested Learning, arXiv:2512.24695, Eq. 48-49. The bound replaces a power iteration: it needs no state, never errs on
the unstable side, and C² is needed anyway. It exceeds the largest eigenvalue by a factor of rank^{1/4} at most.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from .backend import Backend, use_triton
from .deep_momentum_triton import update_memory, write_operands
from .frobenius import frobenius_norm
from .gram_polynomial import gram_polynomial
from .mlp_memory import MLPMemory
from .newton_schulz import working_dtype
from .one_stack import one_stack

GramNorm = Literal["eigenvalue", "trace"]

_LOWEST = 0.2  # of the eigenvalues that several inner steps aim to erase; below, they erase in proportion


def two_sided_delta(
    memory: Tensor,  # M [..., m, n]
    written: Tensor,  # U [..., m, n]
    *,
    decay: float,
    short: float,
    long: float,
    inner_steps: int = 1,
    gram_norm: GramNorm = "eigenvalue",
    lookahead: float | None = 1.0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:  # M′, D [..., m, n]
    """Return the memory after one step, and what is read from it; see the module docstring for the equation.

    Scale-free: M′ and D are proportional to M and U. Stable while `short` + `long` stay below
    (1 + `decay`) / `most_erased(inner_steps)`. For min(m, n) = p and max(m, n) = r it costs 8 r p² FLOPs for
    both sides (4 for `short` alone, 6 for `long` alone), and 2 p³ for the bound and for every p × p product.

    Args:
        memory: any stack of matrices. A wide one is handled as its transpose, without a copy.
        written: what the memory is written with; its rows are the keys, its columns if it is wide.
        decay: how much of the memory survives where no key is like it.
        short: step size of the objective that erases along the short dimension: the right Gram of a tall matrix.
        long: step size of the mirrored one, along the long dimension; 0 leaves a side out.
        inner_steps: gradient steps on each objective.
        gram_norm: what scales the Gram to at most 1: the bound on its largest "eigenvalue", or its "trace".
        lookahead: how many times the write counts again in D; 1 is Nesterov's, None reads D = M′.
        backend: "auto", "reference" or "triton". "auto" takes Triton where both sides erase; the kernels compute both.
    """
    if use_triton(backend, memory, written) and (backend == "triton" or (short and long)):
        *_, m, n = written.shape
        w1, w2 = ((0, n), (m, 0)) if m < n else ((m, 0), (0, n))  # no hidden features
        linear = MLPMemory(memory, *(memory.new_empty(*written.shape[:-2], *size) for size in (w1, w2)))
        after, _, read = two_sided_delta_triton(
            linear,
            written,
            decay=decay,
            short=short,
            long=long,
            inner_steps=inner_steps,
            gram_norm=gram_norm,
            lookahead=lookahead,
        )
        return after, read
    return two_sided_delta_reference(
        memory,
        written,
        decay=decay,
        short=short,
        long=long,
        inner_steps=inner_steps,
        gram_norm=gram_norm,
        lookahead=lookahead,
    )


def two_sided_delta_reference(
    memory: Tensor,
    written: Tensor,
    *,
    decay: float,
    short: float,
    long: float,
    inner_steps: int = 1,
    gram_norm: GramNorm = "eigenvalue",
    lookahead: float | None = 1.0,
) -> tuple[Tensor, Tensor]:
    """The equation as written; the ground truth that the other path is tested against."""
    key = (written / frobenius_norm(written)).to(working_dtype(written))
    erased = erasure(one_stack(memory), one_stack(key), short, long, inner_steps, gram_norm)
    return write_and_read(memory, written, erased, decay, lookahead)


def two_sided_delta_triton(
    memory: MLPMemory,  # M [..., m, n], W₁ and W₂ as in `deep_momentum`
    written: Tensor,  # U [..., m, n]
    *,
    decay: float,
    short: float,
    long: float,
    inner_steps: int,
    gram_norm: GramNorm,
    lookahead: float | None,
    scales: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, Tensor, Tensor]:  # M′, W₁′, D
    """The same rule for [M | W₁] written with [U | ‖U‖ h(U / ‖U‖)]; `deep_momentum_triton` has the passes it makes."""
    linear, w1, w2, flat = (one_stack(tensor).contiguous() for tensor in (*memory, written))
    # The interpreter has no bfloat16: https://github.com/triton-lang/triton/issues/11584
    dtype = torch.bfloat16 if written.is_cuda else torch.float32
    operands, w1 = write_operands(
        MLPMemory(linear, w1, w2), flat, frobenius_norm(flat), decay=decay, scales=scales, dtype=dtype
    )
    w = operands.shape[-1] // 2
    products = torch.bmm(operands[..., w:].mT, operands)  # ΦᵀA, ΦᵀΦ
    factors = times(erasing_polynomial(products[..., w:], inner_steps, gram_norm), products)  # Q, S
    if short != long:
        factors = torch.cat([long * factors[..., :w], short * factors[..., w:]], -1)
    rate = short if short == long else 1.0
    linear, read = update_memory(operands, factors, linear, flat, w1, decay=decay, rate=rate, lookahead=lookahead)
    return linear.reshape(written.shape), w1.reshape(memory.w1.shape), read.reshape(written.shape)


def write_and_read(
    memory: Tensor, written: Tensor, erased: Tensor | None, decay: float, lookahead: float | None
) -> tuple[Tensor, Tensor]:
    """Return M′ = decay · M + U − erased, and D."""
    memory = (decay * memory).add_(written)
    if erased is not None:
        memory.sub_(erased.reshape(memory.shape))
    return memory, memory if lookahead is None else (lookahead * written).add_(memory, alpha=decay)


def most_erased(inner_steps: int) -> float:
    """Return the largest eigenvalue of I − R over all 0 ≤ C ≤ I: 1, or a little more for several inner steps."""
    return 1.0 if inner_steps == 1 else 1 + 1 / math.cosh(inner_steps * math.acosh((1 + _LOWEST) / (1 - _LOWEST)))


def gram_bound(key: Tensor) -> Tensor:  # [..., r, p] -> [..., 1, 1]
    """Return ‖(KᵀK)²‖_F^{1/2}, at least the largest eigenvalue of KᵀK, for keys with ‖K‖_F = 1."""
    gram = key.mT @ key
    return torch.linalg.matrix_norm(gram @ gram, keepdim=True).sqrt()


def erasure(
    memory: Tensor,  # M [B, m, n]
    key: Tensor,  # K [B, m, n], of any size up to about 1; its dtype is that of the products
    short: float,
    long: float,
    inner_steps: int,
    gram_norm: GramNorm = "eigenvalue",
) -> Tensor | None:  # [B, m, n]
    """Return short · M C T + long · K T KᵀM, or None for nothing."""
    if not (short or long):
        return None
    wide = memory.shape[-2] < memory.shape[-1]
    memory = memory.to(key.dtype)
    if wide:
        key, memory = key.mT, memory.mT  # [B, r, p]
    gram = torch.bmm(key.mT, key)  # λ C [B, p, p]
    polynomial = erasing_polynomial(gram, inner_steps, gram_norm)
    right = [(memory, times(polynomial, gram).mul_(short))] if short else []
    left = [(key, times(polynomial, torch.bmm(key.mT, memory)).mul_(long))] if long else []
    # Products with r rows are taken in the layout of `memory`, or every later pass over them would transpose.
    products = [torch.bmm(b.mT, a.mT) if wide else torch.bmm(a, b) for a, b in right + left]
    return products[0] if len(products) == 1 else products[0].add_(products[1])


def erasing_polynomial(gram: Tensor, inner_steps: int, gram_norm: GramNorm) -> Tensor:  # [B, p, p]
    """Return T(C) / λ, where `gram` is λ C; [B, 1, 1] if it is constant."""
    square = torch.bmm(gram, gram) if gram_norm == "eigenvalue" or inner_steps > 2 else gram  # λ² C²
    scale = inverse_bound(square) if gram_norm == "eigenvalue" else inverse_trace(gram)  # 1 / λ
    coefficients = [c * scale ** (i + 1) for i, c in enumerate(_coefficients(inner_steps))]
    if inner_steps == 1:
        return coefficients[0].to(gram.dtype)
    return gram_polynomial(gram, square, coefficients)


def times(polynomial: Tensor, matrix: Tensor) -> Tensor:
    """Return the product with what `erasing_polynomial` returned."""
    return polynomial * matrix if polynomial.shape[-1] == 1 else torch.bmm(polynomial, matrix)


def inverse_bound(square: Tensor) -> Tensor:  # (KᵀK)² [..., p, p] -> [..., 1, 1], at least float32
    """Return 1/λ = ‖(KᵀK)²‖_F^{−1/2} = (Σ λᵢ⁴)^{−1/4}; 0 where K is 0."""
    exact = torch.promote_types(square.dtype, torch.float32)
    norm = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True, dtype=exact)
    return torch.where(norm > 0, norm.rsqrt(), 0.0)


def inverse_trace(gram: Tensor) -> Tensor:  # KᵀK [..., p, p] -> [..., 1, 1], at least float32
    """Return 1 / tr KᵀK; 0 where K is 0."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.promote_types(gram.dtype, torch.float32))
    return torch.where(trace > 0, trace.reciprocal(), 0.0)[..., None, None]


def _coefficients(inner_steps: int) -> tuple[float, ...]:
    """Of T = (I − Π (I − ηᵢ C)) / C in powers of C, lowest first."""
    residual = [1.0]
    for i in range(inner_steps):
        angle = (2 * i + 1) * math.pi / (2 * inner_steps)
        step = 1.0 if inner_steps == 1 else 2 / (1 + _LOWEST + (1 - _LOWEST) * math.cos(angle))
        residual = [a - step * b for a, b in zip([*residual, 0.0], [0.0, *residual], strict=True)]
    return tuple(-c for c in residual[1:])
