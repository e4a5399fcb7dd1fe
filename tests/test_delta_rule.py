"""The delta rule against autograd, against its algebra, and Triton against the reference."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deep_optim.ops.backend import HAS_TRITON, use_triton
from deep_optim.ops.delta_rule import delta_rule

SHAPES = [(8, 8, 8), (3, 1, 5), (63, 17, 100), (2, 4, 65, 33, 70), (40, 90, 7)]  # (..., m, n, d), ragged


def make(shape, dtype=torch.float64, device="cpu"):
    *batch, m, n, d = shape
    rng = torch.Generator(device).manual_seed(42)
    return tuple(
        torch.randn(*batch, *size, generator=rng, dtype=dtype, device=device) for size in ((m, d), (n, d), (m, n))
    )


@pytest.mark.parametrize("with_value", [True, False], ids=["value", "erase"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_one_gradient_step_of_the_stated_objective(shape, with_value):
    """The equation is checked against autograd, not against a second copy of itself."""
    memory, key, value = make(shape)
    memory.requires_grad_()
    target = value if with_value else torch.zeros_like(value)
    (grad,) = torch.autograd.grad(0.5 * (memory @ key.mT - target).square().sum(), memory)
    out = delta_rule(memory, key, value if with_value else None, decay=0.9, rate=0.3, backend="reference")
    torch.testing.assert_close(out, 0.9 * memory - 0.3 * grad)


def test_recall_is_exact_after_one_step_on_orthonormal_keys():
    memory, key, value = make((6, 4, 10))
    key = torch.linalg.qr(key.mT).Q.mT
    torch.testing.assert_close(delta_rule(memory, key, value, backend="reference") @ key.mT, value)


def test_without_a_value_an_orthonormal_key_is_forgotten_and_the_rest_kept():
    memory, key, _ = make((6, 4, 10))
    key = torch.linalg.qr(key.mT).Q.mT
    out = delta_rule(memory, key, None, backend="reference")
    torch.testing.assert_close(out, memory - memory @ key.mT @ key)
    torch.testing.assert_close(out @ key.mT, torch.zeros(6, 4, dtype=out.dtype))


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("with_value", [True, False], ids=["value", "erase"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_matches_reference(shape, with_value, triton_device):
    memory, key, value = make(shape, torch.float32, triton_device)
    value = value if with_value else None
    out = delta_rule(memory, key, value, decay=0.9, rate=0.3, backend="triton")
    exact = (t.double() if t is not None else None for t in (memory, key, value))
    expected = delta_rule(*exact, decay=0.9, rate=0.3, backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)  # sums of 100 products of float32


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_triton_takes_any_strides(triton_device):
    memory, key, _ = make((33, 33, 20), torch.float32, triton_device)
    expected = delta_rule(memory.mT.contiguous(), key.mT.contiguous(), None, rate=0.1, backend="reference")
    torch.testing.assert_close(delta_rule(memory.mT, key.mT, None, rate=0.1, backend="triton"), expected)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_triton_takes_an_empty_stack(triton_device):
    memory, key, _ = make((0, 4, 3, 5), torch.float32, triton_device)
    assert delta_rule(memory, key, None, backend="triton").shape == (0, 4, 5)


@pytest.mark.parametrize("m, n, d", [(8, 8, 32), (32, 32, 8), (16, 4, 16), (8, 40, 8)])
def test_takes_the_cheaper_association(m, n, d):
    memory, key, _ = make((m, n, d))
    with FlopCounterMode(display=False) as counter:
        delta_rule(memory, key, None, backend="reference")
    assert counter.get_total_flops() == min(4 * m * n * d, 2 * d * d * (m + n))


def test_auto_takes_the_reference_on_the_cpu_and_where_gradients_are_needed():
    memory, key, value = make((3, 2, 4), torch.float32)
    assert not use_triton("auto", memory, key)
    out = delta_rule(memory.requires_grad_(), key, value)
    assert out.requires_grad


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_an_explicit_request_never_falls_back(triton_device, monkeypatch):
    memory, key, value = make((3, 2, 4), torch.float32, triton_device)
    with pytest.raises(RuntimeError, match="no backward"):
        delta_rule(memory.requires_grad_(), key, value, backend="triton")
    memory = memory.detach()
    with pytest.raises(RuntimeError, match="in_dtypes=False"):
        delta_rule(memory.double(), key.double(), None, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on_cuda=False"):
        delta_rule(memory.cpu(), key.cpu(), None, backend="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        delta_rule(memory, key, None, backend="cuda")
