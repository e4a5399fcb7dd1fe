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
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backend import HAS_TRITON, on_device_of, tl, triton
from .feature_map import _SOFTNESS, FeatureMap
from .symmetric_product import symmetric_product
from .two_sided_delta import GramNorm, erasing_polynomial, times

if TYPE_CHECKING:  # which imports this module
    from .delta_momentum import DeltaRule

# The largest tiles for which the compiler spills no register on sm_80, sm_90 and sm_100 and that fit into the 99 KB of
# shared memory of the smallest GPUs with bfloat16; chosen by compiling, not by timing.
_SQUARES = {"BLOCK_R": 32, "BLOCK_P": 64, "num_warps": 4}
_OPERANDS = {"BLOCK_R": 64, "BLOCK_P": 64, "num_warps": 4}
_LARGE = {"BLOCK_R": 128, "BLOCK_P": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
_SMALL = {"BLOCK_R": 64, "BLOCK_P": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}

if HAS_TRITON:
    from .deep_momentum_triton import _halves, _tile

    @triton.jit
    def _matrix(table_ptr, index, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
        """The float32 matrix at an address of the table."""
        pointer = tl.load(table_ptr + index).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        return pointer

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
        grad_ptr = _matrix(table_ptr, batch, ALIGNED)
        acc = tl.zeros((BLOCK_R, BLOCK_P), dtype=tl.float64)  # where no square overflows or vanishes
        for col_start in range(0, p, BLOCK_P):
            start, at, mask = _tile(0, row_start, tl.cast(col_start, tl.int64), r, p, WIDE, BLOCK_R, BLOCK_P)
            grad = tl.load(grad_ptr + start + at, mask=mask, other=0.0).to(tl.float64)
            acc += grad * grad
        rows = row_start + tl.arange(0, BLOCK_R)
        tl.store(squares_ptr + batch * r + rows, tl.sum(acc, 1), mask=rows < r)

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
        memory = tl.load(_matrix(table_ptr, stack + batch, ALIGNED) + start + at, mask=mask, other=0.0)
        grad = tl.load(_matrix(table_ptr, batch, ALIGNED) + start + at, mask=mask, other=0.0)
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
        table_ptr, operands_ptr, s_ptr, q_ptr, scale_ptr, direction_ptr, lr,
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
        grad_ptr = _matrix(table_ptr, batch, ALIGNED)
        memory_ptr = _matrix(table_ptr, stack + batch, ALIGNED)
        out_ptr = _matrix(table_ptr, 2 * stack + batch, ALIGNED) if DESCEND else direction_ptr + batch * r * p
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
    table, aligned = _addresses((*grads, *memories, *(params or ())), split)
    stack, device = split * len(grads), grads[0].device
    layout = {"WIDE": m < n, "ALIGNED": aligned}

    squares = torch.empty(stack, r, dtype=torch.float64, device=device)
    with on_device_of(squares):
        _squares_kernel[(stack * triton.cdiv(r, _SQUARES["BLOCK_R"]),)](table, squares, r, p, **layout, **_SQUARES)
    norm, factors = _norm_and_factors(squares, rule.features)
    if rule.maximize:
        factors.neg_()

    # The interpreter has no bfloat16: https://github.com/triton-lang/triton/issues/11584
    operands = torch.empty(2, stack, m, n, dtype=torch.bfloat16 if grads[0].is_cuda else torch.float32, device=device)
    tiles = triton.cdiv(r, _OPERANDS["BLOCK_R"]) * triton.cdiv(p, _OPERANDS["BLOCK_P"])
    with on_device_of(operands):
        _operands_kernel[(stack * tiles,)](table, norm, factors, operands, stack, r, p, **layout, **_OPERANDS)

    a, k = operands.mT if m < n else operands  # [B, r, p]
    short, long = rule.short_and_long()
    s, q = _small_products(a, k, short, long, rule.inner_steps, rule.gram_norm)
    lr = _rate(lr)
    direction = torch.empty(stack, m, n, device=device) if params is None else None
    blocks = _LARGE if p > _SMALL["BLOCK_P"] else _SMALL
    tiles = triton.cdiv(r, blocks["BLOCK_R"]) * triton.cdiv(p, blocks["BLOCK_P"])
    with on_device_of(operands):
        _step_kernel[(stack * tiles,)](
            table, operands, s, q, factors, direction, lr, stack, r, p,
            weight_decay, rule.decay, rule.lookahead or 0.0, READ=rule.lookahead is not None,
            SHORT=s is not None, LONG=q is not None, DESCEND=direction is None, LR_ON_DEVICE=isinstance(lr, Tensor),
            **layout, **blocks,
        )  # fmt: skip
    torch.autograd.graph.increment_version([*(params or ()), *memories])  # which kernels do not do
    return direction


def _norm_and_factors(squares: Tensor, features: FeatureMap) -> tuple[Tensor, Tensor]:  # [B, r] -> [B, 1], [B, r]
    """Return ‖G‖_F, which is also ‖U‖_F, and w, from the sums of squares of the rows."""
    norm = squares.sum(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    if features == "identity":
        return norm.float(), torch.ones_like(squares, dtype=torch.float32)
    length = squares.sqrt() / norm
    weight = 1 / (length + _SOFTNESS / squares.shape[-1] ** 0.5)
    kept = torch.linalg.vector_norm(weight * length, dim=-1, keepdim=True)  # at least 0.76, but for a zero gradient
    return norm.float(), (weight / kept.clamp(min=0.5)).float()


def _small_products(
    a: Tensor, k: Tensor, short: float, long: float, inner_steps: int, gram_norm: GramNorm
) -> tuple[Tensor | None, Tensor | None]:  # [B, p, p]
    """Return short · T KᵀK and long · T KᵀA, each None if its factor is 0."""
    polynomial = gram = k.new_ones(1, 1, 1)  # T = 1 for one step by the trace of KᵀK, which is ‖K‖² = 1
    if short or inner_steps > 1 or gram_norm == "eigenvalue":
        gram = symmetric_product(k.mT)
    if inner_steps > 1 or gram_norm == "eigenvalue":
        polynomial = erasing_polynomial(gram, inner_steps, gram_norm)
    s = times(polynomial, gram).mul_(short) if short else None
    q = times(polynomial, k.mT @ a).mul_(long) if long else None
    return s, q


def _rate(lr: float | Tensor) -> float | Tensor:
    """Return a number, or a tensor of the device; one on the host is read there, which waits for nothing."""
    return lr.item() if isinstance(lr, Tensor) and not lr.is_cuda else lr


def _addresses(tensors: Sequence[Tensor], split: int) -> tuple[Tensor, bool]:
    """Return where each of `split` blocks of each tensor lies, and whether all are aligned to 16 bytes."""
    block = tensors[0].numel() // split * tensors[0].element_size()
    addresses = tuple(tensor.data_ptr() + i * block for tensor in tensors for i in range(split))
    aligned = all(address % 16 == 0 for address in addresses)
    device = tensors[0].device
    if device.type != "cuda":
        return _table(addresses, device), aligned
    if torch.cuda.is_current_stream_capturing():  # the table is the graph's own: made, and lost, with it
        return _table(addresses, device), aligned
    return _kept_table(addresses, device, torch.cuda.current_stream(device).cuda_stream), aligned


def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the addresses as a tensor; they reach the device as arguments of a kernel, for which nothing waits."""
    table = torch.zeros(len(addresses), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), addresses)
    return table


# Gradients come back at the same few places; a table is right for as long as its key is, whatever lies there. The
# stream is a part of the key: on another one nothing says that the table is written before it is read.
@lru_cache(maxsize=256)
def _kept_table(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _table(addresses, device)
