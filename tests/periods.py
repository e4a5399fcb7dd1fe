"""Optimizers to wrap in `MultiFrequency`, and parameters that tell what they were stepped on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from deep_optim import DMGD, Momentum, MultiFrequency

LR = 2.0**-6
Make = Callable[[Any], Optimizer]

INNER: dict[str, Make] = {
    "AdamW": lambda params: AdamW(params, lr=LR),
    "SGD": lambda params: SGD(params, lr=LR, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Momentum": lambda params: Momentum(params, lr=LR),
    "DMGD": lambda params: DMGD(params, lr=LR, hidden_dim=4),
}
if hasattr(torch.optim, "Muon"):  # for matrices alone, so that it gets no others here
    INNER["Muon"] = lambda params: torch.optim.Muon(params, lr=LR)
inner = pytest.mark.parametrize("make", INNER.values(), ids=INNER)
reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])


def two_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1], "name": "fast"}, {"params": params[1:], "name": "slow"}]


def sgd(periods: Any, shapes: Any = ((2,), (2,)), **options: Any) -> tuple[MultiFrequency, list[nn.Parameter]]:
    """Return gradient descent at lr 1 from zero, whose parameters are minus the sum of what they were stepped on."""
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    return MultiFrequency(SGD(two_groups(params), lr=1.0), periods, **options), params


def give(param: Tensor, value: float) -> None:
    param.grad = torch.full_like(param, value)
