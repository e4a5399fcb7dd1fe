"""The coupled Newton iteration against the eigenvalue decomposition in float64."""

import pytest
import torch

from deep_optim.ops.inverse_sqrt import inverse_sqrt


def gram(m, rank, seed=0):
    factor = torch.randn(m, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.mT


@pytest.mark.parametrize("eps", [1e-3, 1e-6])
@pytest.mark.parametrize("m, rank", [(1, 1), (5, 9), (16, 16), (24, 3)])
def test_matches_the_eigenvalue_decomposition(m, rank, eps):
    """Singular matrices included: their null space has the ridge's eigenvalue."""
    matrix = gram(m, rank)
    values, vectors = torch.linalg.eigh(matrix + eps * matrix.diagonal().mean() * torch.eye(m, dtype=matrix.dtype))
    expected = (vectors * values.rsqrt()) @ vectors.mT
    torch.testing.assert_close(inverse_sqrt(matrix, eps=eps), expected, rtol=1e-6, atol=1e-6 * expected.abs().max())


@pytest.mark.parametrize("m, rank", [(32, 1), (128, 1), (256, 1), (256, 4), (256, 64)])
def test_low_rank_in_float32_stays_finite(m, rank):
    """Rounding leaves such a Gram with negative eigenvalues; what is well above the ridge is inverted all the same."""
    factor = torch.linalg.qr(torch.randn(m, rank, generator=torch.Generator().manual_seed(0))).Q
    root = inverse_sqrt(factor @ factor.mT)
    bound = (16 * torch.finfo(torch.float32).eps * (factor @ factor.mT).norm()) ** -0.5  # the ridge's own root
    assert torch.linalg.matrix_norm(root, 2) < 1.05 * bound
    torch.testing.assert_close(root @ factor, factor, rtol=0, atol=1e-3)


def test_float32_is_good_enough_to_precondition():
    """L^(−½) L L^(−½) is the identity on what is well above the ridge."""
    matrix = gram(20, 60)
    root = inverse_sqrt(matrix.float()).double()
    torch.testing.assert_close(root @ matrix @ root, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-3)


def test_scale_and_stack():
    stack = torch.stack([gram(6, 8), 1e8 * gram(6, 8), torch.zeros(6, 6, dtype=torch.float64)])
    out = inverse_sqrt(stack)
    torch.testing.assert_close(out[1], out[0] * 1e-4)
    assert torch.equal(out[2], torch.zeros_like(out[2]))


def test_nan_shows():
    matrix = gram(4, 4)
    matrix[0, 0] = float("nan")
    assert inverse_sqrt(matrix).isnan().any()
