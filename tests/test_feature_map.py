"""What every feature map promises, and what each is for."""

from typing import get_args

import pytest
import torch

from deep_optim.ops.feature_map import FeatureMap, feature_map

NAMES = get_args(FeatureMap)


def make(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 7), (7, 1), (3, 4, 6)], ids=str)
def test_is_scale_free_and_batched(name, shape):
    gradient = make(*shape)
    out = feature_map(gradient, name)
    torch.testing.assert_close(feature_map(gradient * 1e-9, name), out * 1e-9, rtol=1e-7, atol=0)
    if len(shape) == 3:
        torch.testing.assert_close(out[1], feature_map(gradient[1], name))


@pytest.mark.parametrize("name", NAMES)
def test_zero_stays_zero_and_nan_shows(name):
    assert torch.equal(feature_map(torch.zeros(2, 3, 4), name), torch.zeros(2, 3, 4))
    gradient = make(3, 4)
    gradient[1, 1] = float("nan")
    assert feature_map(gradient, name).isnan().any()


@pytest.mark.parametrize("columns", [5, 12], ids=["tall", "square"])
def test_soft_rows_keep_the_norm_and_every_direction(columns):
    gradient = make(12, columns) * torch.logspace(-1, 1, 12, dtype=torch.float64)[:, None]
    out = feature_map(gradient, "soft_rows")
    torch.testing.assert_close(out.norm(), gradient.norm())
    torch.testing.assert_close(out / out.norm(dim=1, keepdim=True), gradient / gradient.norm(dim=1, keepdim=True))


def test_soft_rows_in_closed_form():
    """Two rows of lengths 3 and 1: RMS √5, so they become 3 / (3 + 0.3 √5) to 1 / (1 + 0.3 √5)."""
    gradient = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    out = feature_map(gradient, "soft_rows")
    soft = 0.3 * 5**0.5
    torch.testing.assert_close(out[0, 0] / out[1, 1], torch.tensor(3 / (3 + soft) * (1 + soft), dtype=torch.float64))


def test_soft_rows_do_not_amplify_rows_that_are_almost_zero():
    gradient = make(12, 5)
    gradient[3] *= 1e-6
    out = feature_map(gradient, "soft_rows")
    assert out[3].norm() < 1e-5 * out.norm()


def test_tokens_run_along_the_longer_side():
    gradient = make(12, 5)
    torch.testing.assert_close(feature_map(gradient.mT, "soft_rows"), feature_map(gradient, "soft_rows").mT)


def test_tanh_and_sign_bound_the_entries_by_the_rms():
    gradient = make(12, 5)
    rms = gradient.square().mean().sqrt()
    torch.testing.assert_close(feature_map(gradient, "sign"), rms * gradient.sign())
    torch.testing.assert_close(feature_map(gradient, "tanh"), rms * torch.tanh(gradient / rms))


def test_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="feature_map: 'relu'"):
        feature_map(torch.zeros(2, 2), "relu")
