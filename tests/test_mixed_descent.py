"""The end of M3's step: rows and weights against the equation in float64, and the kernels against the reference."""

import pytest
import torch

from deep_optim.ops import descend
from deep_optim.ops.backend import HAS_TRITON
from deep_optim.ops.mixed_descent import mixed_descent, mixed_squares
from large_results import LargeResults
from test_delta_momentum_triton import unaligned

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

# count, split, m, n: ragged; one row, one column; more than one block of a row and of a matrix
SHAPES = [(2, 1, 6, 4), (1, 3, 5, 7), (2, 2, 1, 9), (2, 1, 9, 1), (1, 1, 3, 1500)]


def make(shape, device="cpu", dtype=torch.float32):
    count, split, m, n = shape
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)  # noqa: E731
    params, slow = ([draw(split * m, n) for _ in range(count)] for _ in range(2))
    fast, weight = draw(count * split, m, n), draw(count * split, m, 1)
    share = torch.linspace(0.1, 0.9, count * split, dtype=torch.float64).to(device, dtype)[:, None, None]
    return params, fast, slow, share, weight


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_equation(shape):
    params, fast, slow, share, weight = make(shape, dtype=torch.float64)
    answers = torch.stack(slow).reshape(fast.shape)
    mixed = (1 - share) * fast + share * answers
    torch.testing.assert_close(mixed_squares(fast, slow, share), (mixed**2).sum(-1, keepdim=True))
    expected = (1 - 0.1 * 0.2) * torch.stack(params).reshape(fast.shape) - 0.1 * weight * mixed
    mixed_descent(params, fast, slow, share, weight, lr=0.1, weight_decay=0.2)
    torch.testing.assert_close(torch.stack(params).reshape(fast.shape), expected)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("half", [False, True])
def test_the_kernels_are_as_exact_as_float32(shape, lr, half, triton_device, monkeypatch):
    monkeypatch.setattr(descend, "on_device", lambda number, device: number)  # whose device is the interpreter's CPU
    lr = lr.to(triton_device) if isinstance(lr, torch.Tensor) else lr
    params, fast, slow, share, weight = make(shape, triton_device)
    fast = fast.half() if half else fast
    others, _, slower, shares, weights = make(shape, dtype=torch.float64)
    squares = mixed_squares(fast, slow, share, backend="triton")
    mixed_descent(params, fast, slow, share, weight, lr=lr, weight_decay=0.2, backend="triton")
    exact = fast.cpu().double()
    torch.testing.assert_close(squares.cpu().double(), mixed_squares(exact, slower, shares), rtol=1e-5, atol=1e-5)
    mixed_descent(others, exact, slower, shares, weights, lr=0.1, weight_decay=0.2)
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param.cpu().double(), other, rtol=1e-5, atol=1e-5)


@needs_triton
def test_takes_addresses_that_are_not_aligned(triton_device):
    params, fast, slow, share, weight = make((2, 1, 6, 5), triton_device)
    others = [param.clone() for param in params]
    moved = [unaligned(param) for param in params]
    mixed_descent(moved, fast, [unaligned(s) for s in slow], share, weight, lr=0.1, weight_decay=0.2, backend="triton")
    mixed_descent(others, fast, slow, share, weight, lr=0.1, weight_decay=0.2, backend="reference")
    torch.testing.assert_close(moved, others)


@needs_triton
def test_no_update_is_in_memory_and_autograd_hears_of_it(triton_device):
    params, fast, slow, share, weight = make((2, 1, 80, 90), triton_device)
    versions = [param._version for param in params]
    with LargeResults(80 * 90) as results:
        mixed_squares(fast, slow, share, backend="triton")
        mixed_descent(params, fast, slow, share, weight, lr=0.1, weight_decay=0.2, backend="triton")
    results.assert_only(made=0)
    assert all(param._version > version for param, version in zip(params, versions, strict=True))


@needs_triton
def test_what_does_not_fit_together_is_refused(triton_device):
    params, fast, slow, share, weight = make((2, 1, 6, 4), triton_device)
    before = [param.clone() for param in params]
    for arguments in (
        (fast, slow[:1], share),
        (fast, slow, share[:1]),
        (fast.double(), slow, share),
        (fast.mT, slow, share),
    ):
        with pytest.raises(RuntimeError, match="share for each"):
            mixed_squares(*arguments, backend="triton")
        with pytest.raises(RuntimeError, match="share for each"):
            mixed_descent(params, *arguments, weight, lr=0.1, weight_decay=0.0, backend="triton")
    with pytest.raises(RuntimeError, match="apart in memory"):
        mixed_descent(params[:1] * 2, fast, slow, share, weight, lr=0.1, weight_decay=0.0, backend="triton")
    mixed_squares(fast, slow[:1] * 2, share, backend="triton")  # only reads them
    assert all(map(torch.equal, params, before))
