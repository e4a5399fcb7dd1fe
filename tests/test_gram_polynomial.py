"""Polynomials of a Gram matrix, by its eigenvalues; the kernel against the reference."""

import pytest
import torch

from deep_optim.ops.backend import HAS_TRITON
from deep_optim.ops.gram_polynomial import gram_polynomial

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def make(p, device="cpu", dtype=torch.float64, stack=3):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(stack, 2 * p, p, generator=generator, dtype=torch.float64)
    gram = rows.mT @ rows / (8 * p)
    return gram.to(device, dtype), torch.bmm(gram, gram).to(device, dtype)


def coefficients(count, device="cpu", dtype=torch.float64, stack=3):
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(count, stack, 1, 1, generator=generator, dtype=torch.float64).to(device, dtype)
    return list(drawn)


@pytest.mark.parametrize("count", range(2, 8))
def test_acts_on_eigenvalues(count):
    gram, square = make(5)
    values, vectors = torch.linalg.eigh(gram)
    powers = sum(c[..., 0] * values**degree for degree, c in enumerate(coefficients(count)))
    result = gram_polynomial(gram, square, coefficients(count))
    torch.testing.assert_close(result, vectors @ torch.diag_embed(powers) @ vectors.mT)


@needs_triton
@pytest.mark.parametrize("p", [1, 6, 50])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_the_kernel_is_as_exact_as_the_reference(p, count, triton_device):
    gram, square = make(p, triton_device, torch.float32)
    ours = gram_polynomial(gram, square, coefficients(count, triton_device, torch.float32), backend="triton")
    expected = gram_polynomial(*make(p), coefficients(count))
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@needs_triton
def test_the_square_is_not_read_where_the_degree_is_one(triton_device):
    gram, square = make(6, triton_device, torch.float32)
    line = coefficients(2, triton_device, torch.float32)
    torch.testing.assert_close(
        gram_polynomial(gram, torch.full_like(square, float("nan")), line, backend="triton"),
        gram_polynomial(gram, torch.full_like(square, float("nan")), line, backend="reference"),
    )


def test_the_operands_are_not_written():
    gram, square = make(4)
    kept = gram.clone(), square.clone()
    gram_polynomial(gram, square, coefficients(5))
    assert torch.equal(gram, kept[0]) and torch.equal(square, kept[1])


@needs_triton
def test_views_and_expanded_coefficients_are_read_as_what_they_are(triton_device):
    """A Gram is half of a wider product; a coefficient may be one for all."""
    gram, square = make(6, triton_device, torch.float32)
    wide = torch.cat([torch.zeros_like(gram), gram], -1)[..., 6:]
    shared = [torch.full((1, 1, 1), c, device=triton_device).expand(3, 1, 1) for c in (0.5, -2.0, 3.0)]
    ours = gram_polynomial(wide, square, shared, backend="triton")
    torch.testing.assert_close(ours, gram_polynomial(gram, square, shared, backend="reference"))


@needs_triton
@pytest.mark.parametrize("count", [2, 3, 4])
def test_half_precision_is_rounded_once(count, triton_device):
    gram, square = make(6, triton_device, torch.float16)
    numbers = coefficients(count, triton_device, torch.float32)
    ours, plain = (gram_polynomial(gram, square, numbers, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(ours, plain, rtol=2e-3, atol=2e-3)
    assert ours.dtype == torch.float16


def test_one_coefficient_is_refused():
    gram, square = make(4)
    with pytest.raises(ValueError, match="two coefficients"):
        gram_polynomial(gram, square, coefficients(1))
