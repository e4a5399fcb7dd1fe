"""A linear memory written in place: against torch.optim.SGD, and the kernel against the reference bit for bit."""

import pytest
import torch

from deep_optim.ops.backend import HAS_TRITON, use_triton
from deep_optim.ops.momentum import momentum_read
from large_results import LargeResults
from test_delta_momentum_triton import unaligned

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

SHAPES = [(6, 4), (7,), (1, 1), (37, 70), (3, 5, 2), (64, 48)]  # the last of 1.5 tiles


def make(shape, count=3, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator, dtype=dtype).to(device) for _ in range(count)] for _ in range(2)]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_what_is_read_is_what_sgd_descends_along(nesterov, maximize):
    """Three steps of torch.optim.SGD, in float64, from what it has taken from the weights."""
    params = [torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.float64)) for _ in range(2)]
    memories = [torch.zeros(4, 3, dtype=torch.float64) for _ in range(2)]
    sgd = torch.optim.SGD(params, lr=0.5, momentum=0.9, nesterov=nesterov, maximize=maximize)
    for step in range(3):
        grads = [torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) for _ in params]
        before = [param.detach().clone() for param in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        sgd.step()
        read = momentum_read(grads, memories, decay=0.9, nesterov=nesterov, maximize=maximize)
        moved = torch.stack([(old - param.detach()) / 0.5 for old, param in zip(before, params, strict=True)])
        torch.testing.assert_close(read.reshape(2, 4, 3), moved)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nesterov, maximize", [(True, False), (False, True), (True, True)])
def test_the_kernel_rounds_where_torch_rounds(shape, nesterov, maximize, triton_device):
    """Bit for bit on a GPU; the interpreter has no fused product and sum, which the read-out is by torch."""
    (grads, memories), (_, others) = make(shape, device=triton_device), make(shape, device=triton_device)
    kept = [grad.clone() for grad in grads]
    options = dict(decay=0.9, nesterov=nesterov, maximize=maximize)
    read = momentum_read(grads, memories, backend="triton", **options)
    expected = momentum_read(grads, others, backend="reference", **options)
    assert read.shape == (3, grads[0].numel()) and all(map(torch.equal, grads, kept))
    assert all(map(torch.equal, memories, others))
    rtol = 0 if triton_device == "cuda" else 1e-6
    torch.testing.assert_close(read, expected, rtol=rtol, atol=rtol)


@needs_triton
def test_takes_addresses_that_are_not_aligned(triton_device):
    (grads, memories), (_, others) = make((6, 5), device=triton_device), make((6, 5), device=triton_device)
    grads, memories = [unaligned(grad) for grad in grads], [unaligned(memory) for memory in memories]
    momentum_read(grads, memories, decay=0.9, backend="triton")
    momentum_read(grads, others, decay=0.9, backend="reference")
    assert all(map(torch.equal, memories, others))


@needs_triton
def test_nothing_is_made_but_what_is_returned_and_autograd_hears_of_the_rest(triton_device):
    grads, memories = make((80, 90), device=triton_device)
    versions = [memory._version for memory in memories]
    with LargeResults(80 * 90) as results:
        momentum_read(grads, memories, decay=0.9, backend="triton")
    results.assert_only(made=1)
    assert all(memory._version > version for memory, version in zip(memories, versions, strict=True))


@needs_triton
def test_an_explicit_request_never_falls_back(triton_device):
    grads, memories = make((6, 4), device=triton_device)
    with pytest.raises(RuntimeError, match="contiguous"):
        momentum_read([grad.mT for grad in grads], memories, decay=0.9, backend="triton")
    with pytest.raises(RuntimeError, match="float32"):
        momentum_read(grads, [memory.double() for memory in memories], decay=0.9, backend="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        momentum_read(grads, memories, decay=0.9, backend="cuda")


@needs_triton
def test_memories_of_another_size_are_never_written_by_address(triton_device):
    """As after a parameter was resized: the kernel would write beyond the end."""
    grads, _ = make((12, 4), device=triton_device)
    _, memories = make((6, 4), device=triton_device)
    with pytest.raises(RuntimeError, match="one size"):
        momentum_read(grads, memories, decay=0.9, backend="triton")


@needs_triton
def test_memories_that_share_memory_are_not_written_in_parallel(triton_device):
    """Views of one buffer side by side are, whatever gradients share; those that overlap are written one by one."""
    buffer = torch.zeros(72, device=triton_device)
    grads = [torch.ones(6, 4, device=triton_device)] * 2
    view = lambda start: buffer[start : start + 24].view(6, 4)  # noqa: E731
    momentum_read(grads, [view(24), view(0)], decay=0.5, backend="triton")
    assert buffer.tolist() == [1.0] * 48 + [0.0] * 24
    for start in (0, 1, 23):
        with pytest.raises(RuntimeError, match="apart in memory"):
            momentum_read(grads, [view(start), view(0)], decay=0.5, backend="triton")
    momentum_read(grads, [view(24), view(36)], decay=0.5)
    assert buffer.tolist() == [1.0] * 24 + [1.5] * 12 + [1.75] * 12 + [1.0] * 12 + [0.0] * 12


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_is_read_is_float32_whatever_the_default_is(dtype, triton_device):
    grads, memories = make((6, 4), device=triton_device)
    torch.set_default_dtype(dtype)
    try:
        assert momentum_read(grads, memories, decay=0.9, backend="triton").dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_environment_can_turn_the_kernels_off(monkeypatch):
    """Wherever nobody asks for them: on a GPU whose host has no compiler."""
    tensor = torch.zeros(3)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    assert use_triton("auto", tensor) == HAS_TRITON
    monkeypatch.setenv("DEEP_OPTIM_TRITON", "0")
    assert not use_triton("auto", tensor)
