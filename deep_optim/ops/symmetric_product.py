"""The product of a matrix with its own transpose, half of which is computed and half mirrored.

    S = α X Xᵀ + β C + δ I        C symmetric, S symmetric to the last bit

Both products of a Newton-Schulz iteration but the last have this form: the Gram X Xᵀ, and c A² + b A + a I, where
A² = A Aᵀ for the symmetric A. A general matrix product computes every entry above the diagonal a second time. Here only
the tiles on and below the diagonal have a program, t (t + 1) / 2 of t², and each writes its transpose too.
Xᵀ X is the product of X.mT: strides are read as they are, so that nothing is copied to transpose it.
Accumulated in float32; float32 operands are multiplied by tf32x3, which is as exact as float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import HAS_TRITON, Backend, on_device_of, tl, triton, use_triton
from .one_stack import one_stack

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Worth(NamedTuple):
    """From where on the kernel is taken: matrices in the stack, their rows, FLOPs of the whole product."""

    stack: int
    rows: int
    flops: float


# Where the kernel won over cuBLAS on an H100, in half precision, on every shape that was timed: `python -m benchmarks
# kernels --device cuda --kernels gram,square`. Without a matrix to add cuBLAS has the better tiles, and the ones on the
# diagonal, half of them wasted, weigh too much unless there are many. With one cuBLAS copies it first: there the kernel
# won on all stacks, and lost on a single matrix of 2048 rows.
_PLAIN = Worth(stack=1, rows=2048, flops=4e11)
_ADDING = Worth(stack=4, rows=768, flops=1e10)
_TIMED = (torch.bfloat16, torch.float16)

# The largest tiles for which the compiler spills no register on sm_80, sm_90 and sm_100 and that fit into the 99 KB of
# shared memory of the smallest GPUs with bfloat16; chosen by compiling, not by timing.
_LARGE = {"BLOCK": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
_SMALL = {"BLOCK": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
_SINGLE = {"BLOCK": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}  # float32
_FILLED = 132  # programs that leave no multiprocessor of an H100 idle; with fewer large tiles, small ones are taken


def symmetric_product(
    x: Tensor,  # X [..., m, n]
    *,
    add: Tensor | None = None,  # C [..., m, m]
    alpha: float = 1.0,
    beta: float = 1.0,
    diagonal: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:  # S [..., m, m], the dtype of `x`
    """Return α X Xᵀ + β C + δ I; see the module docstring. Pass X.mT for Xᵀ X.

    Costs about m² n FLOPs where Triton computes it, and 2 m² n where torch does. From Triton S equals its transpose
    bit for bit, from torch up to rounding.

    Args:
        x: any stack of matrices, with any strides; float32, bfloat16 or float16 for Triton.
        add: C, of the dtype of `x`; it has to be symmetric, since only its lower triangle is sure to be read.
        alpha: factor of the product.
        beta: factor of `add`; without one it has no meaning.
        diagonal: δ; added before the result is rounded from Triton, and after it from torch.
        backend: "auto", "reference" or "triton". "auto" takes Triton on CUDA for large products in half precision,
            from where on it was measured to be faster.
    """
    tensors = (x,) if add is None else (x, add)
    # On a CPU Newton-Schulz asks ten times a step.
    triton = not (backend == "auto" and x.is_cpu) and use_triton(backend, *tensors, dtypes=_DTYPES)
    if backend == "auto" and triton:
        triton = _pays(x, adding=add is not None)
    step = _symmetric_product_triton if triton else symmetric_product_reference
    return step(x, add, alpha, beta, diagonal)


def _pays(x: Tensor, *, adding: bool) -> bool:
    """Return whether the kernel is known to be the faster one."""
    m, n = x.shape[-2:]
    worth = _ADDING if adding else _PLAIN
    large = x.numel() >= worth.stack * m * n and m >= worth.rows and 2 * x.numel() * m >= worth.flops
    return large and x.dtype in _TIMED


def symmetric_product_reference(x: Tensor, add: Tensor | None, alpha: float, beta: float, diagonal: float) -> Tensor:
    """The equation as written; the ground truth that the other path is tested against."""
    flat = one_stack(x)
    if add is None:
        product = torch.bmm(flat, flat.mT)
        product = product if alpha == 1 else alpha * product
    else:
        product = torch.baddbmm(one_stack(add), flat, flat.mT, beta=beta, alpha=alpha)
    if diagonal:
        product.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return product.reshape(*x.shape[:-1], x.shape[-2])


if HAS_TRITON:

    @triton.jit
    def _symmetric_product_kernel(  # type: ignore[no-untyped-def]
        x_ptr, add_ptr, out_ptr,
        m, n, x_batch, x_row, x_col, alpha, beta, diagonal,
        ADD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """One [BLOCK, BLOCK] tile on or below the diagonal, and its mirror image."""
        side = tl.cdiv(m, BLOCK)
        tiles = side * (side + 1) // 2
        program = tl.program_id(0)  # one axis: the others end at 65535
        batch, tile = (program // tiles).to(tl.int64), program % tiles  # int64: batch · m · n is large
        # Row i of the triangle starts at tile i (i + 1) / 2. The root is at least 0.7 / i away from where it would
        # round to another row: right for 1000 rows of tiles, even of an approximate root.
        i = (tl.sqrt(2.0 * tile + 1.0) - 0.5).to(tl.int32)
        j = tile - i * (i + 1) // 2
        rows = i * BLOCK + tl.arange(0, BLOCK)
        cols = j * BLOCK + tl.arange(0, BLOCK)
        inner = tl.arange(0, BLOCK_K)
        x_ptr += batch * x_batch
        left_ptrs = x_ptr + rows[:, None].to(tl.int64) * x_row + inner[None, :].to(tl.int64) * x_col
        right_ptrs = x_ptr + cols[None, :].to(tl.int64) * x_row + inner[:, None].to(tl.int64) * x_col
        acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for start in range(0, n, BLOCK_K):
            left = tl.load(left_ptrs, mask=(rows[:, None] < m) & (inner[None, :] < n - start), other=0.0)
            right = tl.load(right_ptrs, mask=(cols[None, :] < m) & (inner[:, None] < n - start), other=0.0)
            acc = tl.dot(left, right, acc=acc, input_precision="tf32x3")
            left_ptrs += BLOCK_K * tl.cast(x_col, tl.int64)
            right_ptrs += BLOCK_K * tl.cast(x_col, tl.int64)
        at = batch * m * m + rows[:, None].to(tl.int64) * m + cols[None, :]
        mask = (rows[:, None] < m) & (cols[None, :] < m)
        result = alpha * acc
        if ADD:
            result += beta * tl.load(add_ptr + at, mask=mask, other=0.0).to(tl.float32)
        result = tl.where(rows[:, None] == cols[None, :], result + diagonal, result)
        result = result.to(out_ptr.dtype.element_ty)
        mirrored = tl.trans(result)
        if i == j:  # the two halves of this tile may have been summed in different orders
            result = tl.where(rows[:, None] >= cols[None, :], result, mirrored)
        tl.store(out_ptr + at, result, mask=mask)
        if i != j:
            at = batch * m * m + cols[:, None].to(tl.int64) * m + rows[None, :]
            tl.store(out_ptr + at, mirrored, mask=(cols[:, None] < m) & (rows[None, :] < m))


def _symmetric_product_triton(x: Tensor, add: Tensor | None, alpha: float, beta: float, diagonal: float) -> Tensor:
    m, n = x.shape[-2:]
    flat = one_stack(x)
    out = x.new_empty(*x.shape[:-2], m, m)
    tiles = _tiles(len(flat), m, x.dtype)
    programs = len(flat) * _triangle(m, tiles["BLOCK"])
    if programs:
        add = None if add is None else add.contiguous()
        with on_device_of(flat):
            _symmetric_product_kernel[(programs,)](
                flat, add, out, m, n, *flat.stride(), alpha, beta, diagonal, ADD=add is not None, **tiles
            )
    return out


def _tiles(batch: int, m: int, dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:
        return _SINGLE
    return _LARGE if batch * _triangle(m, _LARGE["BLOCK"]) >= _FILLED else _SMALL


def _triangle(m: int, block: int) -> int:
    """How many tiles lie on or below the diagonal."""
    side = -(-m // block)
    return side * (side + 1) // 2
