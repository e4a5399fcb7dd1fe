"""M3 with one thing changed: the rows of its ablation. A variant goes by "m3:<name>" wherever an optimizer is named."""

from typing import Any

import torch
from torch import Tensor

import deep_optim

Variant = tuple[type[torch.optim.Optimizer], dict[str, Any]]


class Sums(deep_optim.M3):
    """The memories of Algorithm 1: sums of all gradients, of which nothing fades."""

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        # A factor of the slow memory is nothing to Newton-Schulz, so that it may be next to 0 and 1 minus it next to 1.
        super()._step_group({**group, "momentum": 1.0, "slow_beta": 1 - 1e-6}, params)


# Of every row that says nothing else: chunks that are short beside a run of some hundred steps.
SHORT = {"chunk_size": 10, "slow_beta": 0.5, "alpha_warmup": 0}
MUON = {"alpha": 0.0, "second_moment": "none"}

# Row name to class and options, by table.
TABLES: dict[str, dict[str, Variant]] = {
    "memories": {
        "M3": (deep_optim.M3, {}),
        "defaults": (deep_optim.M3, {"chunk_size": 100, "slow_beta": 0.9, "alpha_warmup": 100}),
        "sums": (Sums, {}),
        "no slow memory": (deep_optim.M3, {"alpha": 0.0}),
        "Muon (ours)": (deep_optim.M3, MUON),
    },
    "chunk_size": {f"chunk_size={size}": (deep_optim.M3, {"chunk_size": size}) for size in (50, 100)},
    "alpha": {f"alpha={alpha}": (deep_optim.M3, {"alpha": alpha}) for alpha in (0.5, 1.0)},
    "second moment": {
        f"second_moment={place}": (deep_optim.M3, {"second_moment": place})
        for place in ("elementwise", "gradient", "none")
    },
    "mix": {f"mix=pre alpha={alpha}": (deep_optim.M3, {"mix": "pre", "alpha": alpha}) for alpha in (0.1, 0.5, 1.0)},
    "relatives": {
        "Muon with rows evened out": (deep_optim.M3, {**MUON, "second_moment": "row"}),
        "Muon with a slow average": (
            deep_optim.M3,
            {"chunk_size": 1, "slow_beta": 0.98, "mix": "pre", "alpha": 1.0, "second_moment": "none"},
        ),
    },
}

VARIANTS: dict[str, Variant] = {
    f"m3:{name}": (cls, SHORT | options) for table in TABLES.values() for name, (cls, options) in table.items()
}
