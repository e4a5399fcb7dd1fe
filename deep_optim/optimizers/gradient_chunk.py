"""The gradients of one chunk, kept in the state of their parameter: a running sum, and how many are in it.

chunk_sum     float32, float64 for float64 parameters, so that small gradients of low precision are not lost
chunk_count   on the host, which divides by it
"""

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Literal

import torch
from torch import Tensor

from .rounding import exact_dtype

Reduction = Literal["mean", "sum"]
State = MutableMapping[Tensor, dict[str, Any]]

NAMES = ("chunk_sum", "chunk_count")


def having_chunks(params: Iterable[Tensor], state: State) -> list[Tensor]:
    """Return the parameters that have a chunk, empty or not."""
    return [param for param in params if NAMES[0] in state.get(param, ())]


def make_chunks(params: Iterable[Tensor], state: State) -> None:
    """Give every parameter that has a gradient an empty chunk, unless it has one."""
    for param in params:
        if param.grad is not None and NAMES[0] not in state[param]:
            state[param]["chunk_sum"] = torch.zeros_like(param, dtype=exact_dtype(param))
            state[param]["chunk_count"] = torch.zeros((), dtype=torch.int64)


def add_gradients(params: Iterable[Tensor], state: State) -> None:
    """Add the gradients at hand."""
    pairs = [(state[param], param.grad) for param in params if param.grad is not None]
    if pairs:
        torch._foreach_add_([chunk["chunk_sum"] for chunk, _ in pairs], [grad for _, grad in pairs])
        torch._foreach_add_([chunk["chunk_count"] for chunk, _ in pairs], 1)


def reduced(params: Iterable[Tensor], state: State, reduction: Reduction) -> list[tuple[Tensor, Tensor | None]]:
    """Return every parameter that has a chunk, with the mean or sum of the chunk and of the gradient at hand.

    These are new tensors in the parameter's dtype; None where there was no gradient.
    """
    params = having_chunks(params, state)
    fresh = {param: param.grad for param in params if param.grad is not None}
    sums = [state[param]["chunk_sum"] for param in fresh]
    totals = dict(zip(fresh, torch._foreach_add(sums, list(fresh.values())) if fresh else (), strict=True))
    pairs: list[tuple[Tensor, Tensor | None]] = []
    for param in params:
        total, count = totals.get(param), int(state[param]["chunk_count"]) + (param in fresh)
        if total is None and count:
            total = state[param]["chunk_sum"].clone()
        if total is not None and reduction == "mean":
            total /= count
        pairs.append((param, total if total is None else total.to(param.dtype)))
    return pairs


def empty_chunks(params: Iterable[Tensor], state: State) -> None:
    """Forget the gradients and keep the buffers."""
    if chunks := [state[param] for param in having_chunks(params, state)]:
        for name in NAMES:
            torch._foreach_zero_([chunk[name] for chunk in chunks])


def taken_out(param: Tensor, state: State) -> dict[str, Tensor]:
    """Remove a parameter's chunk from its state and return it; a state that held nothing else is none."""
    chunk = {name: state[param].pop(name) for name in NAMES}
    if not state[param]:
        del state[param]
    return chunk


def without_chunks(states: Mapping[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Return the states of a checkpoint as they were without MultiFrequency."""
    rest = {key: {name: v for name, v in state.items() if name not in NAMES} for key, state in states.items()}
    return {key: state for key, state in rest.items() if state}


def restored(param: Tensor, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a copy of the chunk in a saved state, or raise ValueError if it is none of this parameter's."""
    if any(name not in saved for name in NAMES):
        raise ValueError(f"loaded state dict has no chunk of gradients for a parameter of size {tuple(param.size())}")
    if saved["chunk_sum"].shape != param.shape:
        raise ValueError(
            f"loaded state dict has chunk_sum of size {tuple(saved['chunk_sum'].size())} for a parameter of size "
            f"{tuple(param.size())}"
        )
    return {
        "chunk_sum": saved["chunk_sum"].to(param.device, exact_dtype(param), copy=True),
        "chunk_count": torch.tensor(int(saved["chunk_count"])),
    }
