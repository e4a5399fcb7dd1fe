"""The descent of the weights: against torch.optim.SGD with decoupled decay, and the kernel against the reference."""

import pytest
import torch

from deep_optim.ops import descend as module
from deep_optim.ops.backend import HAS_TRITON
from deep_optim.ops.descend import descend, descend_reference
from large_results import LargeResults
from test_delta_momentum_triton import unaligned

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

SHAPES = [(6, 4), (7,), (1, 1), (37, 70), (3, 5, 2), (64, 48)]


def make(shape, count=3, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator, dtype=dtype).to(device) for _ in range(count)]
    return params, torch.randn(count, *shape, generator=generator, dtype=dtype).to(device)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)])
def test_is_the_equation(lr):
    params, direction = make((4, 3), dtype=torch.float64)
    expected = [(1 - 0.1 * 0.2) * param - 0.1 * moved for param, moved in zip(params, direction, strict=True)]
    descend(params, direction, lr=lr, weight_decay=0.2)
    torch.testing.assert_close(params, expected)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.tensor([0.1])], ids=["number", "tensor", "one in a list"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_kernel_rounds_where_torch_rounds(shape, lr, weight_decay, triton_device, monkeypatch):
    """Bit for bit on a GPU; the interpreter has no fused product and sum. Its device is the CPU, whose rates are read
    before the launch, so that it is told not to."""
    monkeypatch.setattr(module, "on_device", lambda number, device: number)
    lr = lr.to(triton_device) if isinstance(lr, torch.Tensor) else lr
    (params, direction), (others, _) = make(shape, device=triton_device), make(shape, device=triton_device)
    kept = direction.clone()
    descend(params, direction, lr=lr, weight_decay=weight_decay, backend="triton")
    descend_reference(others, list(direction), lr, weight_decay)
    assert torch.equal(direction, kept)
    rtol = 0 if triton_device == "cuda" else 1e-6
    torch.testing.assert_close(params, others, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_directions_may_be_in_half_precision(dtype):
    (params, direction), (others, _) = make((6, 4)), make((6, 4))
    descend(params, direction.to(dtype), lr=0.1, weight_decay=0.2)
    descend(others, direction.to(dtype).float(), lr=0.1, weight_decay=0.2)
    assert all(map(torch.equal, params, others))


@needs_triton
def test_so_they_may_for_the_kernel(triton_device):
    (params, direction), (others, _) = make((6, 4), device=triton_device), make((6, 4), device=triton_device)
    descend(params, direction.half(), lr=0.1, weight_decay=0.2, backend="triton")
    descend_reference(others, list(direction.half()), 0.1, 0.2)
    torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-6)


@needs_triton
def test_takes_addresses_that_are_not_aligned(triton_device):
    (params, direction), (others, _) = make((6, 5), device=triton_device), make((6, 5), device=triton_device)
    params = [unaligned(param) for param in params]
    descend(params, direction, lr=0.1, weight_decay=0.2, backend="triton")
    descend_reference(others, list(direction), 0.1, 0.2)
    torch.testing.assert_close(params, others, rtol=1e-6, atol=1e-6)


@needs_triton
def test_nothing_is_made_and_autograd_hears_of_it(triton_device):
    params, direction = make((80, 90), device=triton_device)
    versions = [param._version for param in params]
    with LargeResults(80 * 90) as results:
        descend(params, direction, lr=0.1, weight_decay=0.2, backend="triton")
    results.assert_only(made=0)
    assert all(param._version > version for param, version in zip(params, versions, strict=True))


@needs_triton
def test_an_explicit_request_never_falls_back(triton_device):
    params, direction = make((6, 4), device=triton_device)
    before = [param.clone() for param in params]
    with pytest.raises(RuntimeError, match="contiguous"):
        descend([param.mT for param in params], direction, lr=0.1, weight_decay=0.0, backend="triton")
    with pytest.raises(RuntimeError, match="float64"):
        descend(params, direction.double(), lr=0.1, weight_decay=0.0, backend="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        descend(params, direction, lr=0.1, weight_decay=0.0, backend="cuda")
    with pytest.raises(RuntimeError, match="a direction"):
        descend(params, direction[:2], lr=0.1, weight_decay=0.0, backend="triton")
    with pytest.raises(RuntimeError, match="apart in memory"):
        descend([*params[:2], params[1]], direction, lr=0.1, weight_decay=0.0, backend="triton")
    assert all(map(torch.equal, params, before))
