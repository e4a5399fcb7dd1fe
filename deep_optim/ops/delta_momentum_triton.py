"""The three passes over gradients, memories and weights of a step of delta momentum, in Triton.

    K = U / ‖U‖_F,  U = w ∘ G                              r rows (tokens), p ≤ r columns; w: a factor per row
    `_squares`     G → Σⱼ gᵢⱼ² in float64                  from which come ‖G‖_F and w
    `_operands`    M, G → A = M and K in low precision
    in between     S = short · T KᵀK,  Q = long · T KᵀA    p × p, by torch
    `_step`        M ← decay · M + U − (A S + K Q)
                   D = lookahead · U + decay · M
                   W ← (1 − lr · weight_decay) · W − lr · D,   or D itself, for an output map

Every matrix is found by its address, in a table: nothing is stacked or taken apart. Bytes per parameter: 4 (G), 12
(M, G; A, K), 4 for each of S and Q, 2 for each of A and K in the last pass, and 20 there (G, M, W; M, W).
A wide matrix is read and written as the transpose of a tall one, through strides.

`_step` may write in place: a program reads M and W at its own tile alone, which no other program writes. What it needs
of whole rows it takes from A, K, S and Q, which the passes before it made and nothing writes any more. A product with
M itself would read rows that a neighbour may have written already.
The norm is known before anything is multiplied, as it must be: products of gradients of size 1e-30 or 1e30 leave
float32's range. All is deterministic: no atomics, sums in a fixed order. Rates are read at run time, on the device
where they are tensors, so that no value is compiled in or waited for. Sizes that are multiples of 16 are accessed 16
bytes at a time where all tensors are aligned.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .addresses import addresses, on_device
from .backend import HAS_TRITON, on_device_of, tl, triton
from .feature_map import _SOFTNESS, FeatureMap
from .symmetric_product import symmetric_product
from .two_sided_delta import GramNorm, erasing_polynomial, inverse_bound

if TYPE_CHECKING:  # which imports this module
    from .delta_momentum import DeltaRule

# The largest tiles for which the compiler spills no register on sm_80, sm_90 and sm_100 and that fit into the 99 KB of
# shared memory of the smallest GPUs with bfloat16; chosen by compiling, not by timing.
_SQUARES = {"BLOCK_R": 16, "BLOCK_P": 256, "num_warps": 4}
_FACTORS = {"BLOCK_R": 1024, "num_warps": 4}
_OPERANDS = {"BLOCK_R": 64, "BLOCK_P": 64, "num_warps": 4}
_LARGE = {"BLOCK_R": 128, "BLOCK_P": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
_SMALL = {"BLOCK_R": 64, "BLOCK_P": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}

if HAS_TRITON:
    from .addresses import matrix_at
    from .deep_momentum_triton import _halves, _tile

    @triton.jit
    def _factors(scale_ptr, batch, row_start, r, BLOCK_R: tl.constexpr):  # type: ignore[no-untyped-def]
        """The factor w of each row."""
        rows = row_start + tl.arange(0, BLOCK_R)
        return tl.load(scale_ptr + batch * r + rows, mask=rows < r, other=0.0)[:, None]

    @triton.jit
    def _squares_kernel(  # type: ignore[no-untyped-def]
        table_ptr, squares_ptr, r, p,
        WIDE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    ):  # fmt: skip
        """Σⱼ gᵢⱼ² of BLOCK_R rows."""
        tiles = tl.cdiv(r, BLOCK_R)
        program = tl.program_id(0).to(tl.int64)
        batch, row_start = program // tiles, program % tiles * BLOCK_R
        grad_ptr = matrix_at(table_ptr, batch, ALIGNED)
        acc = tl.zeros((BLOCK_R, BLOCK_P), dtype=tl.float64)  # where no square overflows or vanishes
        for col_start in range(0, p, BLOCK_P):
            start, at, mask = _tile(0, row_start, tl.cast(col_start, tl.int64), r, p, WIDE, BLOCK_R, BLOCK_P)
            grad = tl.load(grad_ptr + start + at, mask=mask, other=0.0).to(tl.float64)
            acc += grad * grad
        rows = row_start + tl.arange(0, BLOCK_R)
        tl.store(squares_ptr + batch * r + rows, tl.sum(acc, 1), mask=rows < r)

    @triton.jit
    def _factors_kernel(  # type: ignore[no-untyped-def]
        squares_ptr, norm_ptr, scale_ptr, r, softness,
        SOFT: tl.constexpr, SIGN: tl.constexpr, TINY: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        """‖G‖_F and w of one matrix: SIGN, or for soft rows 1 / (length + softness) brought back to ‖U‖_F = ‖G‖_F."""
        batch = tl.program_id(0).to(tl.int64)
        squares_ptr += batch * r
        acc = tl.zeros((BLOCK_R,), dtype=tl.float64)
        for start in range(0, r, BLOCK_R):
            rows = start + tl.arange(0, BLOCK_R)
            acc += tl.load(squares_ptr + rows, mask=rows < r, other=0.0)
        norm = tl.sqrt(tl.sum(acc))
        norm = tl.where(norm < TINY, tl.full((), TINY, tl.float64), norm)  # a NaN stays one
        tl.store(norm_ptr + batch, norm.to(tl.float32))
        kept = tl.full((), 1.0, tl.float64)
        if SOFT:
            acc = tl.zeros((BLOCK_R,), dtype=tl.float64)
            for start in range(0, r, BLOCK_R):
                rows = start + tl.arange(0, BLOCK_R)
                length = tl.sqrt(tl.load(squares_ptr + rows, mask=rows < r, other=0.0)) / norm
                acc += (length / (length + softness)) * (length / (length + softness))
            kept = tl.sqrt(tl.sum(acc))  # at least 0.76, but for a zero gradient
            kept = tl.where(kept < 0.5, tl.full((), 0.5, tl.float64), kept)
        for start in range(0, r, BLOCK_R):
            rows = start + tl.arange(0, BLOCK_R)
            weight = tl.full((BLOCK_R,), SIGN, tl.float64)
            if SOFT:
                length = tl.sqrt(tl.load(squares_ptr + rows, mask=rows < r, other=0.0)) / norm
                weight = SIGN / ((length + softness) * kept)
            tl.store(scale_ptr + batch * r + rows, weight.to(tl.float32), mask=rows < r)

    @triton.jit
    def _operands_kernel(  # type: ignore[no-untyped-def]
        table_ptr, norm_ptr, scale_ptr, operands_ptr, stack, r, p,
        WIDE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    ):  # fmt: skip
        """One tile of A and of K."""
        tiles_p = tl.cdiv(p, BLOCK_P)
        tiles = tl.cdiv(r, BLOCK_R) * tiles_p
        program = tl.program_id(0).to(tl.int64)
        batch, tile = program // tiles, program % tiles
        row_start, col_start = tile // tiles_p * BLOCK_R, tile % tiles_p * BLOCK_P
        start, at, mask = _tile(0, row_start, col_start, r, p, WIDE, BLOCK_R, BLOCK_P)
        memory = tl.load(matrix_at(table_ptr, stack + batch, ALIGNED) + start + at, mask=mask, other=0.0)
        grad = tl.load(matrix_at(table_ptr, batch, ALIGNED) + start + at, mask=mask, other=0.0)
        key = grad / tl.load(norm_ptr + batch) * _factors(scale_ptr, batch, row_start, r, BLOCK_R)
        start, at, _ = _tile(batch, row_start, col_start, r, p, WIDE, BLOCK_R, BLOCK_P)
        tl.store(operands_ptr + start + at, memory.to(operands_ptr.dtype.element_ty), mask=mask)
        start, at, _ = _tile(stack + batch, row_start, col_start, r, p, WIDE, BLOCK_R, BLOCK_P)
        tl.store(operands_ptr + start + at, key.to(operands_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _add_product(  # type: ignore[no-untyped-def]
        acc, left_ptr, right_ptr, left_batch, right_batch, row_start, col_start, r, p,
        WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """Add a tile of the product of an r × p and a p × p matrix."""
        for step in range(0, tl.cdiv(p, BLOCK_K)):
            inner = tl.cast(step, tl.int64) * BLOCK_K
            start, at, mask = _tile(left_batch, row_start, inner, r, p, WIDE, BLOCK_R, BLOCK_K)
            left = tl.load(left_ptr + start + at, mask=mask, other=0.0)
            start, at, mask = _tile(right_batch, inner, col_start, p, p, False, BLOCK_K, BLOCK_P)
            right = tl.load(right_ptr + start + at, mask=mask, other=0.0)
            acc = tl.dot(left, right, acc=acc)
        return acc

    @triton.jit
    def _descend_tile(  # type: ignore[no-untyped-def]
        erased, grad_ptr, memory_ptr, out_ptr, factors, row_start, col_start, r, p,
        lr, weight_decay, decay, lookahead,
        READ: tl.constexpr, DESCEND: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    ):  # fmt: skip
        """Write a tile of M and of W or D, given A S + K Q."""
        start, at, mask = _tile(0, row_start, col_start, r, p, WIDE, BLOCK_R, BLOCK_P)
        written = factors * tl.load(grad_ptr + start + at, mask=mask, other=0.0)
        memory = tl.load(memory_ptr + start + at, mask=mask, other=0.0)
        memory = decay * memory + written - erased
        tl.store(memory_ptr + start + at, memory, mask=mask)
        read = memory
        if READ:
            read = lookahead * written + decay * memory
        if DESCEND:
            param = tl.load(out_ptr + start + at, mask=mask, other=0.0)
            read = (1 - lr * weight_decay) * param - lr * read
        tl.store(out_ptr + start + at, read, mask=mask)

    @triton.jit
    def _step_kernel(  # type: ignore[no-untyped-def]
        table_ptr, operands_ptr, s_ptr, q_ptr, rate_ptr, scale_ptr, direction_ptr, lr,
        stack, r, p, weight_decay, decay, lookahead,
        READ: tl.constexpr, SHORT: tl.constexpr, LONG: tl.constexpr, DESCEND: tl.constexpr, LR_ON_DEVICE: tl.constexpr,
        WIDE: tl.constexpr, ALIGNED: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """One [BLOCK_R, BLOCK_P] tile of M and of W or D."""
        tiles_p = tl.cdiv(p, BLOCK_P)
        tiles = tl.cdiv(r, BLOCK_R) * tiles_p
        program = tl.program_id(0).to(tl.int64)  # one axis: the others end at 65535; int64: batch · r · p is large
        batch, tile = program // tiles, program % tiles
        row_start, col_start = tile // tiles_p * BLOCK_R, tile % tiles_p * BLOCK_P  # neighbours share rows of A and K
        if LR_ON_DEVICE:
            lr = tl.load(lr).to(tl.float32)
        acc = tl.zeros((BLOCK_R, BLOCK_P), dtype=tl.float32)
        if SHORT:
            acc = _add_product(
                acc, operands_ptr, s_ptr, batch, batch, row_start, col_start, r, p,
                WIDE, BLOCK_R, BLOCK_P, BLOCK_K,
            )  # fmt: skip
        if LONG:
            acc = _add_product(
                acc, operands_ptr, q_ptr, stack + batch, batch, row_start, col_start, r, p,
                WIDE, BLOCK_R, BLOCK_P, BLOCK_K,
            )  # fmt: skip
        acc *= tl.load(rate_ptr + batch)
        grad_ptr = matrix_at(table_ptr, batch, ALIGNED)
        memory_ptr = matrix_at(table_ptr, stack + batch, ALIGNED)
        out_ptr = matrix_at(table_ptr, 2 * stack + batch, ALIGNED) if DESCEND else direction_ptr + batch * r * p
        factors = _factors(scale_ptr, batch, row_start, r, BLOCK_R)
        # A quarter at a time: the registers do not hold whole tiles of G, M and W too.
        quarter: tl.constexpr = BLOCK_P // 4
        first, second = _halves(acc, BLOCK_R, BLOCK_P)
        quarters = _halves(first, BLOCK_R, BLOCK_P // 2) + _halves(second, BLOCK_R, BLOCK_P // 2)
        for i in tl.static_range(4):
            _descend_tile(
                quarters[i], grad_ptr, memory_ptr, out_ptr, factors, row_start, col_start + i * quarter, r, p,
                lr, weight_decay, decay, lookahead,
                READ, DESCEND, WIDE, BLOCK_R, quarter,
            )  # fmt: skip


def delta_momentum_triton(
    params: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    memories: Sequence[Tensor],
    rule: "DeltaRule",
    *,
    lr: float | Tensor = 0.0,
    weight_decay: float = 0.0,
) -> Tensor | None:  # D [B, m, n]
    """Write `memories` and `params`, or return D if there are none; all of them contiguous and in float32."""
    split, m, n = rule.shape
    p, r = sorted((m, n))
    table, aligned = addresses((*grads, *memories, *(params or ())), split)
    stack, device = split * len(grads), grads[0].device
    layout = {"WIDE": m < n, "ALIGNED": aligned}

    squares = torch.empty(stack, r, dtype=torch.float64, device=device)
    with on_device_of(squares):
        _squares_kernel[(stack * triton.cdiv(r, _SQUARES["BLOCK_R"]),)](table, squares, r, p, **layout, **_SQUARES)
    norm, factors = _norm_and_factors(squares, rule.features, rule.maximize)

    # The interpreter has no bfloat16: https://github.com/triton-lang/triton/issues/11584
    operands = torch.empty(2, stack, m, n, dtype=torch.bfloat16 if grads[0].is_cuda else torch.float32, device=device)
    tiles = triton.cdiv(r, _OPERANDS["BLOCK_R"]) * triton.cdiv(p, _OPERANDS["BLOCK_P"])
    with on_device_of(operands):
        _operands_kernel[(stack * tiles,)](table, norm, factors, operands, stack, r, p, **layout, **_OPERANDS)

    a, k = operands.mT if m < n else operands  # [B, r, p]
    short, long = rule.short_and_long()
    s, q, rate = _small_products(a, k, short, long, rule.inner_steps, rule.gram_norm)
    lr = on_device(lr, device)
    direction = torch.empty(stack, m, n, dtype=torch.float32, device=device) if params is None else None
    blocks = _LARGE if p > _SMALL["BLOCK_P"] else _SMALL
    tiles = triton.cdiv(r, blocks["BLOCK_R"]) * triton.cdiv(p, blocks["BLOCK_P"])
    with on_device_of(operands):
        _step_kernel[(stack * tiles,)](
            table, operands, s, q, rate, factors, direction, lr, stack, r, p,
            weight_decay, rule.decay, rule.lookahead or 0.0, READ=rule.lookahead is not None,
            SHORT=s is not None, LONG=q is not None, DESCEND=direction is None, LR_ON_DEVICE=isinstance(lr, Tensor),
            **layout, **blocks,
        )  # fmt: skip
    torch.autograd.graph.increment_version([*(params or ()), *memories])  # which kernels do not do
    return direction


def _norm_and_factors(squares: Tensor, features: FeatureMap, maximize: bool) -> tuple[Tensor, Tensor]:
    """Return ‖G‖_F [B], which is also ‖U‖_F, and w [B, r], from the sums of squares of the rows [B, r]."""
    stack, r = squares.shape
    norm = torch.empty(stack, dtype=torch.float32, device=squares.device)
    factors = torch.empty(stack, r, dtype=torch.float32, device=squares.device)
    with on_device_of(squares):
        _factors_kernel[(stack,)](
            squares, norm, factors, r, _SOFTNESS / r**0.5, SOFT=features == "soft_rows", SIGN=-1.0 if maximize else 1.0,
            TINY=torch.finfo(torch.float32).tiny, **_FACTORS,
        )  # fmt: skip
    return norm, factors


def _small_products(
    a: Tensor, k: Tensor, short: float, long: float, inner_steps: int, gram_norm: GramNorm
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # [B, p, p], [B, p, p], [B]
    """Return S = T KᵀK and Q = T KᵀA, None if short or long is 0, and the rate at which A S + K Q is erased."""
    gram = symmetric_product(k.mT) if short or inner_steps > 1 or gram_norm == "eigenvalue" else None
    s, q = gram if short else None, k.mT @ a if long else None
    rate = torch.full((len(k),), long or short, dtype=torch.float32, device=k.device)
    if gram is not None and inner_steps > 1:
        polynomial = erasing_polynomial(gram, inner_steps, gram_norm)
        s, q = (None if matrix is None else torch.bmm(polynomial, matrix) for matrix in (s, q))
    elif gram is not None and gram_norm == "eigenvalue":  # T is a number; by the trace, which is ‖K‖² = 1, it is 1
        rate = rate * inverse_bound(torch.bmm(gram, gram)).flatten()
    if s is not None and long and short != long:
        s = s * (short / long)
    return s, q, rate
