"""The descent of the weights, each in its own precision and place: shards by shards, bfloat16 by way of float32."""

from typing import Any

from torch import Tensor

from deep_optim.ops.descend import descend, descend_reference

from .rounding import from_master, to_master
from .sharding import local, local_of


def descend_stack(
    params: list[Tensor], states: list[dict[str, Tensor]], stacked: Tensor, group: dict[str, Any]
) -> None:
    """W ← (1 − lr · weight_decay) · W − lr · D, in place, for parameters that share out the stack D."""
    if any(local(param) is not param for param in params):
        blocks = stacked.chunk(len(params))
        directions = [local_of(block.reshape(p.shape), p) for p, block in zip(params, blocks, strict=True)]
        descend_along(params, states, directions, group)
        return
    masters = [to_master(param, state) for param, state in zip(params, states, strict=True)]
    descend(masters, stacked, lr=group["lr"], weight_decay=group["weight_decay"])
    for master, param, state in zip(masters, params, states, strict=True):
        from_master(master, param, state)


def descend_along(
    params: list[Tensor], states: list[dict[str, Tensor]], directions: list[Tensor], group: dict[str, Any]
) -> None:
    """The same for this rank's shards of a direction for each parameter."""
    masters = [to_master(param, state) for param, state in zip(params, states, strict=True)]
    descend_reference(masters, directions, group["lr"], group["weight_decay"])
    for master, param, state in zip(masters, params, states, strict=True):
        from_master(master, param, state)
