"""The two passes over a deep memory of gradients that are no plain matrix product, in Triton.

    K = U / ‖U‖_F,  Φ = [K | h(K)],  A = [M | W₁]          r rows, w = p + h columns
    `write_operands`   U, M, W₁ → [A | Φ] in low precision, decay · W₁ + ‖U‖ h(K) in float32
    in between         [B | G] = Φᵀ [A | Φ],   [Q | S] = (T / λ) [B | G]         p × p, in `two_sided_delta`
    `update_memory`    M′ = decay · M + U − rate · (A S + Φ Q),   D = lookahead · U + decay · M′,   W₁′ likewise

What is erased does not depend on the size of Φ, and [A | Φ] times [S; Q] is one product with one accumulator.
Bytes per entry of M, with w ≈ p: 12 for the first pass (U, M; A, Φ) and 20 for the second (A, Φ, M, U; M′, D). Nothing
of that size is in memory besides [A | Φ] and what is returned. A wide memory is read and written as the transpose of a
tall one, through strides. All is deterministic: no atomics, sums in a fixed order. Sizes that are multiples of 16 are
accessed 16 bytes at a time.
"""

import torch
from torch import Tensor

from .backend import HAS_TRITON, on_device_of, tl, triton
from .mlp_memory import SATURATED, MLPMemory

# The largest tiles for which the compiler spills no register on sm_80, sm_90 and sm_100 and that fit into the 99 KB of
# shared memory of the smallest GPUs with bfloat16; chosen by compiling, not by timing.
_OPERANDS = {"BLOCK_R": 64, "BLOCK_P": 32, "num_warps": 4, "num_stages": 2}
_LARGE = {"BLOCK_R": 128, "BLOCK_P": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
_SMALL = {"BLOCK_R": 64, "BLOCK_P": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}

if HAS_TRITON:

    @triton.jit
    def _strides(r, columns, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
        """From one row to the next and from one column to the next, in a tall matrix or in its transpose."""
        if WIDE:
            return 1, r
        else:
            return columns, 1

    @triton.jit
    def _tile(  # type: ignore[no-untyped-def]
        batch, row_start, col_start, r, columns, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
    ):
        """Where a tile of a stack [B, r, columns] starts (int64), its entries from there on, and which exist."""
        rows, cols = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_C)[None, :]
        row, col = _strides(r, columns, WIDE)
        start = batch * r * columns + row_start * row + col_start * col
        mask = (rows < tl.cast(r - row_start, tl.int32)) & (cols < tl.cast(columns - col_start, tl.int32))
        return start, rows * row + cols * col, mask

    @triton.jit
    def _write_operands_kernel(  # type: ignore[no-untyped-def]
        memory_ptr, w1_ptr, w2_ptr, written_ptr, norm_ptr, operands_ptr, w1_out_ptr,
        r, p, h, decay, inside, outside,
        SATURATED: tl.constexpr, WIDE: tl.constexpr, HIDDEN: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """BLOCK_R rows of [A | Φ]: BLOCK_H of the hidden columns, and with the first of them all of M and K."""
        w = p + h
        tiles_h = tl.cdiv(h, BLOCK_H) if HIDDEN else 1
        tiles = tl.cdiv(r, BLOCK_R) * tiles_h
        program = tl.program_id(0).to(tl.int64)  # one axis: the others end at 65535; int64: batch · r · p is large
        batch, tile = program // tiles, program % tiles
        row_start, hidden_start = tile // tiles_h * BLOCK_R, tile % tiles_h * BLOCK_H
        norm = tl.load(norm_ptr + batch)
        acc = tl.zeros((BLOCK_R, BLOCK_H), dtype=tl.float32)
        for col_start in range(0, p, BLOCK_P):
            start, at, mask = _tile(batch, row_start, tl.cast(col_start, tl.int64), r, p, WIDE, BLOCK_R, BLOCK_P)
            key = tl.load(written_ptr + start + at, mask=mask, other=0.0) / norm
            once = mask & (hidden_start == 0)
            memory = tl.load(memory_ptr + start + at, mask=once, other=0.0)
            start, at, _ = _tile(batch, row_start, tl.cast(col_start, tl.int64), r, 2 * w, WIDE, BLOCK_R, BLOCK_P)
            tl.store(operands_ptr + start + at, memory.to(operands_ptr.dtype.element_ty), mask=once)
            start, at, _ = _tile(batch, row_start, tl.cast(w + col_start, tl.int64), r, 2 * w, WIDE, BLOCK_R, BLOCK_P)
            tl.store(operands_ptr + start + at, key.to(operands_ptr.dtype.element_ty), mask=once)
            if HIDDEN:  # W₂ᵀ [p, h] is the transpose of what a tall memory has, and what a wide one has
                start, at, mask = _tile(
                    batch, tl.cast(col_start, tl.int64), hidden_start, p, h, not WIDE, BLOCK_P, BLOCK_H
                )
                w2 = tl.load(w2_ptr + start + at, mask=mask, other=0.0)
                acc = tl.dot(key, w2, acc=acc, input_precision="tf32x3")  # as exact as float32
        if HIDDEN:
            z = tl.clamp(inside * acc, -SATURATED, SATURATED)  # a NaN shows in K
            feature = outside * z * tl.rsqrt(1 + z * z)  # h(k)
            start, at, mask = _tile(batch, row_start, hidden_start, r, h, WIDE, BLOCK_R, BLOCK_H)
            w1 = tl.load(w1_ptr + start + at, mask=mask, other=0.0)
            tl.store(w1_out_ptr + start + at, decay * w1 + norm * feature, mask=mask)
            start, at, _ = _tile(batch, row_start, p + hidden_start, r, 2 * w, WIDE, BLOCK_R, BLOCK_H)
            tl.store(operands_ptr + start + at, w1.to(operands_ptr.dtype.element_ty), mask=mask)
            start, at, _ = _tile(batch, row_start, w + p + hidden_start, r, 2 * w, WIDE, BLOCK_R, BLOCK_H)
            tl.store(operands_ptr + start + at, feature.to(operands_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _erased(  # type: ignore[no-untyped-def]
        operands_ptr, factors_ptr, batch, row_start, col_start, r, w,
        WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """A [BLOCK_R, BLOCK_C] tile of A S + Φ Q, from [A | Φ] and [Q | S]."""
        steps = tl.cdiv(w, BLOCK_K)
        acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        for step in range(0, 2 * steps):
            second = tl.cast(step >= steps, tl.int64)  # first A S, then Φ Q
            inner = (step - second * steps) * BLOCK_K
            start, at, _ = _tile(batch, row_start, second * w + inner, r, 2 * w, WIDE, BLOCK_R, BLOCK_K)
            _, _, mask = _tile(batch, row_start, inner, r, w, WIDE, BLOCK_R, BLOCK_K)
            left = tl.load(operands_ptr + start + at, mask=mask, other=0.0)
            start, at, _ = _tile(batch, inner, (1 - second) * w + col_start, w, 2 * w, False, BLOCK_K, BLOCK_C)
            _, _, mask = _tile(batch, inner, col_start, w, w, False, BLOCK_K, BLOCK_C)
            right = tl.load(factors_ptr + start + at, mask=mask, other=0.0)
            acc = tl.dot(left, right, acc=acc)
        return acc

    @triton.jit
    def _halves(tile, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
        """The left and the right half of the columns of a tile."""
        return tl.split(tl.permute(tl.reshape(tile, (BLOCK_R, 2, BLOCK_C // 2)), (0, 2, 1)))

    @triton.jit
    def _read_tile(  # type: ignore[no-untyped-def]
        erased, memory_ptr, written_ptr, memory_out_ptr, read_ptr, batch, row_start, col_start, r, p,
        decay, rate, lookahead,
        READ: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """A tile of M′ and D, given A S + Φ Q."""
        start, at, mask = _tile(batch, row_start, col_start, r, p, WIDE, BLOCK_R, BLOCK_C)
        memory = tl.load(memory_ptr + start + at, mask=mask, other=0.0)
        written = tl.load(written_ptr + start + at, mask=mask, other=0.0)
        memory = decay * memory + written - rate * erased
        tl.store(memory_out_ptr + start + at, memory, mask=mask)
        if READ:
            tl.store(read_ptr + start + at, lookahead * written + decay * memory, mask=mask)

    @triton.jit
    def _update_memory_kernel(  # type: ignore[no-untyped-def]
        operands_ptr, factors_ptr, memory_ptr, written_ptr, memory_out_ptr, read_ptr, w1_out_ptr,
        r, p, h, decay, rate, lookahead,
        READ: tl.constexpr, WIDE: tl.constexpr, HIDDEN: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """One [BLOCK_R, BLOCK_P] tile of M′ and D, or one [BLOCK_R, BLOCK_H] tile of W₁′."""
        w = p + h
        tiles_p = tl.cdiv(p, BLOCK_P)
        tiles_c = tiles_p + (tl.cdiv(h, BLOCK_H) if HIDDEN else 0)
        tiles = tl.cdiv(r, BLOCK_R) * tiles_c
        program = tl.program_id(0).to(tl.int64)
        batch, tile = program // tiles, program % tiles
        row_start, tile_c = tile // tiles_c * BLOCK_R, tile % tiles_c  # neighbours share their rows of [A | Φ]
        if tile_c < tiles_p:
            col_start = tile_c * BLOCK_P
            acc = _erased(operands_ptr, factors_ptr, batch, row_start, col_start, r, w, WIDE, BLOCK_R, BLOCK_P, BLOCK_K)
            # A quarter at a time: the registers do not hold whole tiles of M and U too.
            quarter: tl.constexpr = BLOCK_P // 4
            first, second = _halves(acc, BLOCK_R, BLOCK_P)
            quarters = _halves(first, BLOCK_R, BLOCK_P // 2) + _halves(second, BLOCK_R, BLOCK_P // 2)
            for i in tl.static_range(4):
                _read_tile(
                    quarters[i], memory_ptr, written_ptr, memory_out_ptr, read_ptr,
                    batch, row_start, col_start + i * quarter, r, p, decay, rate, lookahead,
                    READ, WIDE, BLOCK_R, quarter,
                )  # fmt: skip
        elif HIDDEN:
            hidden_start = (tile_c - tiles_p) * BLOCK_H
            erased = _erased(
                operands_ptr, factors_ptr, batch, row_start, p + hidden_start, r, w, WIDE, BLOCK_R, BLOCK_H, BLOCK_K
            )
            start, at, mask = _tile(batch, row_start, hidden_start, r, h, WIDE, BLOCK_R, BLOCK_H)
            w1 = tl.load(w1_out_ptr + start + at, mask=mask, other=0.0)  # decay · W₁ + H
            tl.store(w1_out_ptr + start + at, w1 - rate * erased, mask=mask)


def write_operands(
    memory: MLPMemory,  # of contiguous stacks [B, ., .]; wide: transposed
    written: Tensor,  # U [B, m, n]
    norm: Tensor,  # ‖U‖_F [B, 1, 1]
    *,
    decay: float,
    scales: tuple[float, float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return [A | Φ] [B, r, 2 w] in `dtype`, transposed in memory if U is wide, and decay · W₁ + ‖U‖ h(K).

    Args:
        memory: the weights.
        written: what the memory is written with.
        norm: what brings the keys to unit norm.
        decay: how much of W₁ survives.
        scales: the factors in h(k), of the argument and of the value.
        dtype: of the operands.
    """
    linear, w1, w2 = memory
    wide = written.shape[-2] < written.shape[-1]
    (p, r), h = sorted(written.shape[-2:]), w1.shape[-2 if wide else -1]
    size = (len(written), 2 * (p + h), r) if wide else (len(written), r, 2 * (p + h))
    operands, w1_out = torch.empty(size, dtype=dtype, device=written.device), torch.empty_like(w1)
    block_h = _block(h)
    programs = len(written) * triton.cdiv(r, _OPERANDS["BLOCK_R"]) * max(triton.cdiv(h, block_h), 1)
    if programs:
        with on_device_of(written):
            _write_operands_kernel[(programs,)](
                linear, w1, w2, written, norm, operands, w1_out, r, p, h, decay, *scales,
                SATURATED=SATURATED, WIDE=wide, HIDDEN=h > 0, BLOCK_H=block_h, **_OPERANDS,
            )  # fmt: skip
    return operands.mT if wide else operands, w1_out


def update_memory(
    operands: Tensor,  # [A | Φ] [B, r, 2 w]
    factors: Tensor,  # [Q | S] [B, w, 2 w]
    linear: Tensor,  # M [B, m, n]
    written: Tensor,  # U [B, m, n]
    w1_out: Tensor,  # decay · W₁ + H [B, r, h], or [B, h, r]
    *,
    decay: float,
    rate: float,
    lookahead: float | None,
) -> tuple[Tensor, Tensor]:
    """Return M′ and D, and subtract from `w1_out` what is erased of it; see the module docstring."""
    wide = written.shape[-2] < written.shape[-1]
    (p, r), h = sorted(written.shape[-2:]), w1_out.shape[-2 if wide else -1]
    memory_out = torch.empty_like(linear)
    read = memory_out if lookahead is None else torch.empty_like(linear)
    block_h = _block(h)
    tiles = _LARGE if p > _SMALL["BLOCK_P"] else _SMALL
    programs = len(written) * triton.cdiv(r, tiles["BLOCK_R"])
    programs *= triton.cdiv(p, tiles["BLOCK_P"]) + triton.cdiv(h, block_h)
    if programs:
        with on_device_of(written):
            _update_memory_kernel[(programs,)](
                operands, factors, linear, written, memory_out, read, w1_out, r, p, h, decay, rate, lookahead or 0.0,
                READ=lookahead is not None, WIDE=wide, HIDDEN=h > 0, BLOCK_H=block_h, **tiles,
            )  # fmt: skip
    return memory_out, read


def _block(hidden_dim: int) -> int:
    """How many hidden features a program takes: at least what a tensor core does."""
    return min(max(triton.next_power_of_2(hidden_dim), 16), 64)
