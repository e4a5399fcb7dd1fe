"""The Frobenius norm of a matrix of any size: what everything scale-free here is divided by.

    ‖M‖_F = √(Σᵢⱼ mᵢⱼ²)        in float64, where the squares of no float32 number overflow or vanish

From Triton one pass and two launches for a whole stack: sums over tiles, then the sums of those, in a fixed order.
"""

import torch
from torch import Tensor

from .backend import HAS_TRITON, Backend, on_device_of, tl, triton, use_triton
from .one_stack import one_stack

_SAFE = (1e-14, 1e18)  # a float32 norm between these has lost no square to underflow or overflow
_TILE = {"BLOCK": 2048, "BLOCKS": 4, "num_warps": 8}


def frobenius_norm(matrix: Tensor, *, backend: Backend = "auto") -> Tensor:  # [..., m, n] -> [..., 1, 1]
    """Return ‖M‖_F, at least the smallest normal number, so that it can divide; a NaN or an infinity shows.

    Args:
        matrix: any stack of matrices.
        backend: "auto", "reference" or "triton". "auto" takes Triton for contiguous stacks on CUDA.
    """
    if matrix.is_cpu and backend == "auto":  # most calls, and the quickest to answer
        return frobenius_norm_reference(matrix)
    fits = matrix.is_contiguous() and not torch.compiler.is_compiling()
    if (fits or backend == "triton") and use_triton(backend, matrix) and matrix.numel():
        return _frobenius_norm_triton(matrix.contiguous())
    return frobenius_norm_reference(matrix)


def frobenius_norm_reference(matrix: Tensor) -> Tensor:
    """The equation as written. A CPU would make a float64 copy for it: there float32 is tried first."""
    if matrix.is_cpu and matrix.dtype == torch.float32 and matrix.numel() and not torch.compiler.is_compiling():
        rows = torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)  # a sum of millions would lose four digits
        norm = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
        low, high = torch.aminmax(norm)
        if low > _SAFE[0] and high < _SAFE[1]:
            return norm
    exact = matrix.dtype if matrix.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    norm = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=exact).to(matrix.dtype)
    return norm.clamp(min=torch.finfo(matrix.dtype).tiny)


if HAS_TRITON:

    @triton.jit
    def _squares_kernel(  # type: ignore[no-untyped-def]
        matrix_ptr, sums_ptr, size, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
    ):
        """Σ m² over BLOCKS · BLOCK entries of one matrix."""
        tiles = tl.cdiv(size, BLOCKS * BLOCK)
        program = tl.program_id(0).to(tl.int64)  # int64: stack · size is large
        start = program % tiles * (BLOCKS * BLOCK)
        matrix_ptr += program // tiles * size
        acc = tl.zeros((BLOCK,), dtype=tl.float64)
        for i in tl.static_range(BLOCKS):  # unrolled: all loads are under way at once
            at = start + i * BLOCK + tl.arange(0, BLOCK)
            entry = tl.load(matrix_ptr + at, mask=at < size, other=0.0).to(tl.float64)
            acc += entry * entry
        tl.store(sums_ptr + program, tl.sum(acc))

    @triton.jit
    def _norm_kernel(sums_ptr, norm_ptr, tiles, TINY: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """The root of the sums of one matrix, at least TINY."""
        batch = tl.program_id(0).to(tl.int64)
        acc = tl.zeros((BLOCK,), dtype=tl.float64)
        for start in range(0, tiles, BLOCK):
            at = start + tl.arange(0, BLOCK)
            acc += tl.load(sums_ptr + batch * tiles + at, mask=at < tiles, other=0.0)
        norm = tl.sqrt(tl.sum(acc)).to(tl.float32)
        tl.store(norm_ptr + batch, tl.where(norm < TINY, TINY, norm))  # a NaN is less than nothing


def _frobenius_norm_triton(matrix: Tensor) -> Tensor:
    flat = one_stack(matrix)
    stack, size = len(flat), flat[0].numel()
    tiles = triton.cdiv(size, _TILE["BLOCK"] * _TILE["BLOCKS"])
    sums = torch.empty(stack, tiles, dtype=torch.float64, device=matrix.device)
    norm = torch.empty(*matrix.shape[:-2], 1, 1, dtype=matrix.dtype, device=matrix.device)
    with on_device_of(matrix):
        _squares_kernel[(stack * tiles,)](flat, sums, size, **_TILE)
        _norm_kernel[(stack,)](sums, norm, tiles, TINY=torch.finfo(matrix.dtype).tiny, BLOCK=256, num_warps=4)
    return norm
