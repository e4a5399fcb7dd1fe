"""The MLP memory against autograd, against its algebra, and against the delta rule."""

import pytest
import torch

from deep_optim.ops.delta_rule import delta_rule
from deep_optim.ops.mlp_memory import (
    MLPMemory,
    hidden_features,
    mlp_memory_gradients,
    mlp_memory_step,
    read_mlp_memory,
)

# (..., m, n, d, h)
SHAPES = [(8, 8, 8, 4), (3, 1, 5, 2), (63, 17, 30, 9), (2, 4, 13, 33, 7, 3), (9, 9, 4, 1), (6, 6, 5, 0)]


def make(shape, dtype=torch.float64):
    *batch, m, n, d, h = shape
    rng = torch.Generator().manual_seed(42)
    sizes = ((m, d), (m, h), (h, d), (n, d), (m, n))
    linear, w1, w2, key, value = (torch.randn(*batch, *size, generator=rng, dtype=torch.float64) for size in sizes)
    return MLPMemory(linear.to(dtype), w1.to(dtype), w2.to(dtype)), key.to(dtype), value.to(dtype)


def autograd_of_the_objective(memory, key, value):
    """The gradients of ½ ‖m(K) − V‖² with m(k) evaluated key by key, as the equation stands."""
    leaves = MLPMemory(*(weight.detach().requires_grad_() for weight in memory))
    loss = torch.zeros((), dtype=key.dtype)
    for i in range(key.shape[-2]):
        k = key[..., i, :, None]
        z = leaves.w2 @ k
        answer = leaves.linear @ k + leaves.w1 @ (z / (1 + z.square()).sqrt())
        loss = loss + 0.5 * (answer - value[..., i, None]).square().sum()
    return MLPMemory(*torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_the_stated_objective(shape):
    memory, key, value = make(shape)
    torch.testing.assert_close(mlp_memory_gradients(memory, key, value), autograd_of_the_objective(memory, key, value))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_value_is_a_value_of_zero(shape):
    memory, key, value = make(shape)
    expected = autograd_of_the_objective(memory, key, torch.zeros_like(value))
    torch.testing.assert_close(mlp_memory_gradients(memory, key, None), expected)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[-4] == shape[-3]], ids=str)
def test_one_number_per_memory_is_a_multiple_of_the_identity(shape):
    memory, key, value = make(shape)
    number = torch.full((*value.shape[:-2], 1, 1), 1.7, dtype=value.dtype)
    expected = autograd_of_the_objective(memory, key, (number * torch.eye(value.shape[-1])).expand_as(value))
    torch.testing.assert_close(mlp_memory_gradients(memory, key, number), expected)


def test_each_memory_of_a_stack_has_its_own_number():
    memory, key, _ = make((3, 6, 6, 5, 2))
    number = torch.tensor([0.5, 1.0, -2.0], dtype=key.dtype).view(3, 1, 1)
    expected = autograd_of_the_objective(memory, key, number * torch.eye(6, dtype=key.dtype))
    torch.testing.assert_close(mlp_memory_gradients(memory, key, number), expected)


@pytest.mark.parametrize("full", [True, False], ids=["full", "number"])
def test_a_step_can_be_differentiated_through(full):
    """Models train the initial memory, the keys and the rates through the step: first and second derivatives."""
    memory, key, value = make((4, 4, 3, 2))
    value = value if full else torch.ones(1, 1, dtype=key.dtype)
    rate = torch.tensor(0.1, dtype=key.dtype)
    inputs = [tensor.requires_grad_() for tensor in (*memory, key, value, rate)]

    def step(linear, w1, w2, key, value, rate):
        new = mlp_memory_step(MLPMemory(linear, w1, w2), key, value, rate=(rate, rate, rate), decay=0.9)
        return read_mlp_memory(new, key)

    assert torch.autograd.gradcheck(step, inputs)
    assert torch.autograd.gradgradcheck(step, inputs)


def test_a_step_decays_and_descends_each_weight_at_its_own_rate():
    memory, key, value = make((5, 7, 4, 3))
    gradients = autograd_of_the_objective(memory, key, value)
    out = mlp_memory_step(memory, key, value, rate=(0.1, 0.2, 0.3), decay=0.9)
    torch.testing.assert_close(out.linear, 0.9 * memory.linear - 0.1 * gradients.linear)
    torch.testing.assert_close(out.w1, 0.9 * memory.w1 - 0.2 * gradients.w1)
    torch.testing.assert_close(out.w2, memory.w2 - 0.3 * gradients.w2)


def test_without_hidden_features_it_is_the_delta_rule():
    memory, key, value = make((5, 7, 4, 0))
    out = mlp_memory_step(memory, key, value, rate=(0.3, 0.3, 0.3), decay=0.9)
    torch.testing.assert_close(out.linear, delta_rule(memory.linear, key, value, decay=0.9, rate=0.3))
    torch.testing.assert_close(read_mlp_memory(memory, key), memory.linear @ key.mT)


def test_repeated_steps_never_raise_the_error_and_end_in_exact_recall():
    """Three keys with thirteen independent features: M and W₁ together can answer anything."""
    memory, key, value = make((6, 3, 8, 5))
    features = torch.cat([key, hidden_features(memory.w2, key)], -1)
    rate = 1 / torch.linalg.matrix_norm(features, 2) ** 2
    error = (read_mlp_memory(memory, key) - value).norm()
    for _ in range(100):
        memory = mlp_memory_step(memory, key, value, rate=(rate, rate, 0.0))
        before, error = error, (read_mlp_memory(memory, key) - value).norm()
        assert error <= before + 1e-12
    torch.testing.assert_close(read_mlp_memory(memory, key), value)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_hidden_features_saturate_and_vanish_without_overflow(scale):
    memory, key, _ = make((4, 4, 3, 2), torch.float32)
    out = hidden_features(memory.w2, scale * key)
    assert out.isfinite().all()
    exact = memory.w2.double() @ (scale * key.double()).mT
    torch.testing.assert_close(out.double(), (exact / (1 + exact.square()).sqrt()).mT, rtol=1e-5, atol=0)
