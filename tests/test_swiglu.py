"""SwiGLU against torch's layers, its gradients against autograd, and both through a second derivative."""

import pytest
import torch
from torch.nn import functional as F

from deep_optim.ops.swiglu import SwiGLU, read_swiglu, swiglu_gradients

SHAPES = [(3, 5, 4, 6), (1, 1, 1, 1), (2, 3, 7, 2, 5, 4)]  # (..., n, d, h, m)


def make(shape):
    *batch, n, d, h, m = shape
    rng = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*batch, *size, dtype=torch.float64, generator=rng)  # noqa: E731
    return SwiGLU(draw(h, d), draw(h, d), draw(m, h)), draw(n, d), draw(n, m), draw(n).abs()


def test_reads_what_the_layers_would():
    weights, key, _, _ = make((3, 5, 4, 6))
    expected = F.linear(F.silu(F.linear(key, weights.gate)) * F.linear(key, weights.up), weights.down)
    torch.testing.assert_close(read_swiglu(weights, key), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_autograds_of_the_stated_objective(shape):
    weights, key, value, rate = make(shape)
    leaves = [weight.requires_grad_() for weight in weights]
    loss = 0.5 * (rate * (read_swiglu(weights, key) - value).square().sum(-1)).sum()
    answers, gradients = swiglu_gradients(weights, key, value, rate)
    torch.testing.assert_close(answers, read_swiglu(weights, key))
    for ours, theirs in zip(gradients, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_can_be_differentiated_through():
    weights, key, value, rate = make((2, 2, 3, 2, 2))
    inputs = tuple(tensor.requires_grad_() for tensor in (*weights, key, value, rate))

    def step(gate, up, down, key, value, rate):
        answers, gradients = swiglu_gradients(SwiGLU(gate, up, down), key, value, rate)
        return answers + read_swiglu(SwiGLU(gate - gradients.gate, up - gradients.up, down - gradients.down), key)

    assert torch.autograd.gradcheck(step, inputs)
