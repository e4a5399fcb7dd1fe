"""Weights in low precision: every step is taken in float32, and rounded once.

    W₃₂ = W + C,   a step on W₃₂,   W ← round(W₃₂),   C ← round(W₃₂ − W)

A bfloat16 weight keeps 8 bits, so that an update below a 512th of it is lost, whatever the optimizer. With `kahan_sum`
what each rounding takes is kept in C, of the weight's own dtype, and counts in the next step: 16 bits together, at 2
bytes per parameter. Kahan, Further remarks on reducing truncation errors (1965). Without it C is always zero.
Stochastic rounding would need no C, but random numbers, which no checkpoint and no other rank could repeat.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .sharding import local

COMPENSATION = "compensation"  # of C in a parameter's state


def init_compensation(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what is kept per parameter: nothing, or C."""
    return {COMPENSATION: torch.zeros_like(param)} if group["kahan_sum"] and is_low(param) else {}


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32, or float64 for float64: what is computed and kept in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def is_low(param: Tensor) -> bool:
    """Return whether a parameter has less than float32's precision."""
    return exact_dtype(param) != param.dtype


def to_master(param: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Return W₃₂ of this rank's shard: the parameter itself, unless it is in low precision."""
    shard = local(param)
    if not is_low(param):
        return shard
    master = shard.to(exact_dtype(param))
    return master.add_(local(state[COMPENSATION])) if COMPENSATION in state else master


def from_master(master: Tensor, param: Tensor, state: Mapping[str, Tensor]) -> None:
    """Write W₃₂ back into this rank's shard, and what is lost by it into C."""
    shard = local(param)
    if master is shard:
        return
    shard.copy_(master)
    if COMPENSATION in state:
        local(state[COMPENSATION]).copy_(master.sub_(shard))
