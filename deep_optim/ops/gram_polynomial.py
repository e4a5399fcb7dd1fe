"""A polynomial of a Gram matrix by Horner's rule, two degrees at a time.

    T(G) = t₀ I + t₁ G + t₂ G² + …          every tᵢ a number per matrix, in float32
    P ← tᵢ I + tᵢ₊₁ G + P                    the sum of one stage; P is a multiple of G², or the product G² P before it

Only products are taken in the low precision of G. From Triton each sum is one launch, 6 bytes per entry where torch's
float32 passes make 34.
"""

import torch
from torch import Tensor

from .backend import HAS_TRITON, Backend, on_device_of, tl, triton, use_triton

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = {"BLOCK": 2048, "num_warps": 8}


def gram_polynomial(
    gram: Tensor,  # G [B, p, p]
    square: Tensor,  # G² [B, p, p], read where there are three coefficients or more
    coefficients: list[Tensor],  # [B, 1, 1] each, lowest degree first; two or more
    *,
    backend: Backend = "auto",
) -> Tensor:  # [B, p, p], the dtype of `gram`
    """Return T(G); see the module docstring. Costs a product of p × p matrices for every two degrees beyond three.

    Raises:
        ValueError: for fewer than two coefficients.
        RuntimeError: if "triton" was asked for where Triton cannot run.
    """
    if len(coefficients) < 2:
        raise ValueError(f"gram_polynomial takes two coefficients or more, got {len(coefficients)}")
    eager = backend == "triton" or not (gram.is_cpu or torch.compiler.is_compiling())
    triton = eager and use_triton(backend, gram, square, dtypes=_DTYPES)
    stage = _stage_triton if triton else stage_reference
    if triton:
        gram, square = gram.contiguous(), square.contiguous()
    coefficients = list(coefficients)
    factor = coefficients.pop() if len(coefficients) % 2 else None  # of G², the first P
    result = square
    while coefficients:
        linear, constant = coefficients.pop(), coefficients.pop()
        result = stage(result, gram, factor, linear, constant)
        if coefficients:
            result, factor = torch.bmm(square, result), torch.ones_like(constant)
    return result


def stage_reference(
    product: Tensor, gram: Tensor, factor: Tensor | None, linear: Tensor, constant: Tensor
) -> Tensor:  # all [B, p, p] or [B, 1, 1]
    """`constant` I + `linear` G + `factor` P, rounded once; no factor is a zero."""
    total = linear * gram  # float32 again, by the coefficient
    total.diagonal(dim1=-2, dim2=-1).add_(constant.squeeze(-1))
    if factor is not None:
        total.add_(factor * product)
    return total.to(gram.dtype)


if HAS_TRITON:
    from .addresses import block_of

    @triton.jit
    def _stage_kernel(  # type: ignore[no-untyped-def]
        product_ptr, gram_ptr, factor_ptr, linear_ptr, constant_ptr, out_ptr,
        p, FACTOR: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """BLOCK entries of one matrix."""
        size = tl.cast(p, tl.int64) * p
        batch, at, mask = block_of(size, BLOCK)
        result = tl.load(linear_ptr + batch) * tl.load(gram_ptr + batch * size + at, mask=mask, other=0.0).to(
            tl.float32
        )
        result += tl.where(at // p == at % p, tl.load(constant_ptr + batch), 0.0)
        if FACTOR:
            product = tl.load(product_ptr + batch * size + at, mask=mask, other=0.0).to(tl.float32)
            result += tl.load(factor_ptr + batch) * product
        tl.store(out_ptr + batch * size + at, result.to(out_ptr.dtype.element_ty), mask=mask)


def _stage_triton(product: Tensor, gram: Tensor, factor: Tensor | None, linear: Tensor, constant: Tensor) -> Tensor:
    out, p = torch.empty_like(gram), gram.shape[-1]
    factor, linear, constant = (
        factor if factor is None else factor.contiguous(),
        linear.contiguous(),
        constant.contiguous(),
    )
    with on_device_of(gram):
        _stage_kernel[(len(gram) * triton.cdiv(p * p, _BLOCK["BLOCK"]),)](
            product, gram, factor, linear, constant, out, p, FACTOR=factor is not None, **_BLOCK
        )
    return out
