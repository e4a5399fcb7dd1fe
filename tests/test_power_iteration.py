"""The largest eigenvalue of a Gram against torch.linalg, on streams made to mislead a warm start."""

import pytest
import torch

from deep_optim.ops.power_iteration import largest_eigenvalue


def true_eigenvalue(key):
    return torch.linalg.matrix_norm(key, 2, keepdim=True).square()


def gaussian(t, n, d):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(t), dtype=torch.float64)


def one_new_direction(t, n, d):
    """Rank one, every step orthogonal to the step before: a warm vector alone sees nothing."""
    key = torch.zeros(n, d, dtype=torch.float64)
    key[:, t % d] = 1.0
    return key


def two_of_nearly_equal_size(t, n, d):
    key = torch.zeros(n, d, dtype=torch.float64)
    key[0, t % d], key[1, (t + 1) % d] = 1.0, 0.99
    return key


def cancelling_columns(t, n, d):
    """Columns of both signs, so that a constant start vector would be orthogonal to the answer."""
    return gaussian(0, n, 1) * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(d)[:d] * (-1) ** t


@pytest.mark.parametrize("stream", [gaussian, one_new_direction, two_of_nearly_equal_size, cancelling_columns])
@pytest.mark.parametrize("shape", [(20, 6), (6, 6), (64, 40), (1, 4), (9, 1)], ids=str)
def test_is_within_a_third_from_below_at_every_step(stream, shape):
    """Two thirds of the eigenvalue is what the bound on inner_lr allows for."""
    if shape[0] < 2 and stream is two_of_nearly_equal_size:
        pytest.skip("needs two keys")
    vector = torch.zeros(1, shape[1], dtype=torch.float64)
    for t in range(12):
        key = stream(t, *shape)
        eigenvalue, vector = largest_eigenvalue(key, vector)
        assert 2 / 3 * true_eigenvalue(key) <= eigenvalue <= true_eigenvalue(key) * (1 + 1e-12)


def test_is_not_caught_by_an_eigenvector_of_the_wrong_block():
    """The largest diagonal entry may be alone in its block, and the largest eigenvalue spread over another."""
    key = torch.zeros(16, 16, dtype=torch.float64)
    key[0, 0], key[1:, 1:] = 1.5, 15**-0.5  # eigenvalues 2.25 and 15
    vector = torch.zeros(1, 16, dtype=torch.float64)
    for _ in range(3):
        eigenvalue, vector = largest_eigenvalue(key, vector)
        assert eigenvalue >= 2 / 3 * true_eigenvalue(key)
    torch.testing.assert_close(eigenvalue, true_eigenvalue(key))


def test_converges_on_a_repeated_key():
    key, vector = gaussian(0, 30, 8), torch.zeros(1, 8, dtype=torch.float64)
    for _ in range(60):
        eigenvalue, vector = largest_eigenvalue(key, vector)
    torch.testing.assert_close(eigenvalue, true_eigenvalue(key))
    torch.testing.assert_close(vector @ key.mT @ key, eigenvalue * vector, rtol=1e-4, atol=1e-4)


def test_zero_key_gives_zero_and_returns_the_vector():
    vector = torch.ones(2, 1, 5)
    key = torch.stack([torch.zeros(7, 5), torch.ones(7, 5)])
    eigenvalue, out = largest_eigenvalue(key, vector)
    assert eigenvalue[0] == 0 and torch.equal(out[0], vector[0])
    torch.testing.assert_close(eigenvalue[1], torch.tensor([[35.0]]))
