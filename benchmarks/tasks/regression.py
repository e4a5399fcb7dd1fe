"""Ill-conditioned least squares in a matrix: W X = Y + noise, with a floor known in closed form.

The loss is reported above that floor, so zero is the exact answer and a logarithmic axis shows who still descends.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import Batch


class Regression:
    """Minimize ||W x - y||^2 over pairs (x, y) whose inputs have a spectrum from 1 down to 1 / condition.

    Args:
        outputs, inputs: shape of the matrix.
        condition: ratio of the largest singular value of the inputs to the smallest.
        noise: standard deviation of what no matrix can explain.
        batch: pairs per step; 0 takes all of them, which makes the problem deterministic.
    """

    name = "regression"
    metric = "loss above its floor"
    steps = 300
    aux_lr = 1e-2
    weight_decay = 0.0  # any other would move the floor
    memory = ("hidden",)  # a model's only layer would otherwise be taken for its head
    pairs = 512

    def __init__(
        self, outputs: int = 24, inputs: int = 32, condition: float = 100.0, noise: float = 0.1, batch: int = 0
    ) -> None:
        rng = torch.Generator().manual_seed(0)
        self.shape, self.condition, self.noise, self.batch = (outputs, inputs), condition, noise, batch
        random = torch.randn(self.pairs, inputs, generator=rng, dtype=torch.float64)
        spectrum = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), inputs, dtype=torch.float64)
        basis = torch.linalg.qr(torch.randn(inputs, inputs, generator=rng, dtype=torch.float64)).Q
        keys = torch.linalg.qr(random).Q * self.pairs**0.5 * spectrum @ basis.mT  # [pairs, inputs]
        truth = torch.randn(outputs, inputs, generator=rng, dtype=torch.float64)
        values = keys @ truth.mT + noise * torch.randn(self.pairs, outputs, generator=rng, dtype=torch.float64)
        self.best = torch.linalg.lstsq(keys, values).solution.mT  # [outputs, inputs]
        self.floor = (keys @ self.best.mT - values).square().mean().item()
        self.keys, self.values = keys.float(), values.float()
        self.gram = keys.mT @ keys / keys.shape[0]

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.ModuleDict({"hidden": nn.Linear(self.shape[1], self.shape[0], bias=False)})

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        rng = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            if self.batch:
                drawn = torch.randint(self.pairs, (self.batch,), generator=rng)
                yield self.keys[drawn], self.values[drawn]
            else:
                yield self.keys, self.values

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        keys, values = batch
        return (model["hidden"](keys) - values).square().mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The loss above the floor, from the distance to the solution: a difference of losses would cancel."""
        error = model["hidden"].weight.double() - self.best  # [outputs, inputs]
        return {"loss": ((error @ self.gram) * error).sum().item() / self.shape[0]}

    def describe(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "condition": self.condition,
            "noise": self.noise,
            "batch": self.batch or self.pairs,
            "floor": self.floor,
        }
