"""The small problem on which every optimizer must keep its promises: parameters of every rank and their gradients."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# No two are equal, so that an optimizer that stacks equal shapes still computes each one alone: then two runs that
# differ only in how the parameters are grouped can be compared bit for bit.
SHAPES = ((6, 4), (3, 5), (7,), (), (4, 3, 2, 2))


def make_params(
    shapes: Iterable[Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[nn.Parameter]:
    """Return one parameter per shape; the same arguments give the same values."""
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]


def copy_params(params: Iterable[Tensor]) -> list[nn.Parameter]:
    """Return new leaves with the same values and strides, and no gradients."""
    return [nn.Parameter(param.detach().clone(memory_format=torch.preserve_format)) for param in params]


def gradient(param: Tensor, step: int, index: int) -> Tensor:
    """Return the gradient that parameter number `index` sees at `step`."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.device, param.dtype)


def set_grads(params: Iterable[Tensor], step: int) -> None:
    """Give every parameter its gradient of `step`."""
    for index, param in enumerate(params):
        param.grad = gradient(param, step, index)


def train(optimizers: Optimizer | Sequence[Optimizer], params: Sequence[Tensor], steps: Iterable[int]) -> list[Tensor]:
    """Step every optimizer once per gradient and return the parameters."""
    for step in steps:
        set_grads(params, step)
        for optimizer in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
            optimizer.step()
    return [param.detach() for param in params]


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a module with a convolution, a matrix, vectors and a one-row head; it takes [batch, 2, 4, 4]."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)
    ).to(dtype)


def model_loss(model: nn.Module, step: int) -> Tensor:
    """Return the loss of one fixed batch per step."""
    generator = torch.Generator().manual_seed(step)
    param = next(model.parameters())
    batch = torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64).to(param)
    return (model(batch) - batch.mean((1, 2, 3))[:, None]).square().mean()


def snapshot(params: Iterable[Tensor]) -> list[Tensor]:
    """Return copies that later steps cannot reach."""
    return [param.detach().clone() for param in params]


def assert_same(actual: object, expected: object, message: str | None = None) -> None:
    """Hold two nests of tensors equal bit for bit, dtypes included."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=message)


def trained(
    cls: type[Optimizer],
    shapes: Iterable[Sequence[int]] = SHAPES,
    dtype: torch.dtype = torch.float64,
    steps: int = 6,
    **options: Any,
) -> list[Tensor]:
    """Return fresh parameters after a few steps of an optimizer built with `options`."""
    params = make_params(shapes, dtype)
    return train(cls(params, **options), params, range(steps))
