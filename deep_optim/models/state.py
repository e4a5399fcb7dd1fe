"""The state of a recurrent model, a nested dict of tensors and nothing else; and where its chunks end."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]  # of tensors and further dicts of them


def check_state(state: State, expected: State, device: torch.device, where: str = "state") -> None:
    """Raise ValueError unless `state` has the names, shapes and dtypes of `expected` and is on `device`.

    `expected` is a fresh state on the meta device: it is asked for at every token, and allocates nothing there. A
    counter, which has no dimensions, may be anywhere: it is the host's, though a state is moved and loaded as a whole.
    """
    check_names(state, expected, where)
    for name, like in expected.items():
        tensor, place = state[name], f"{where}[{name!r}]"
        if isinstance(like, dict):
            check_state(tensor, like, device, place)
        elif not isinstance(tensor, Tensor) or tensor.shape[1:] != like.shape[1:] or tensor.ndim != like.ndim:
            shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{place} is of another layer: expected shape {list(like.shape)}, got {shape}")
        elif tensor.shape != like.shape:
            raise ValueError(f"{place} is of {len(tensor)} samples, the input of {len(like)}")
        elif tensor.dtype != like.dtype or (like.ndim and tensor.device != device):
            raise ValueError(
                f"{place} must be {like.dtype} on {device}, got {tensor.dtype} on {tensor.device}; move it there"
            )


def check_names(state: State, names: Collection[str], where: str = "state") -> None:
    """Raise ValueError unless `state` is a dict with these names, whose values their own layers check."""
    if not isinstance(state, dict) or state.keys() != set(names):
        held = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{where} is of another layer: expected a dict of {sorted(names)}, got {held}")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what a model of this dtype keeps and computes its state in: half precision would lose it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def size_of(state: State, name: str, dim: int) -> int:
    """Return the size of a tensor that grows, and 0 if there is none: what `check_state` cannot know beforehand."""
    tensor = state.get(name) if isinstance(state, dict) else None
    return tensor.shape[dim] if isinstance(tensor, Tensor) and tensor.ndim > dim else 0


def detach(state: State) -> State:
    """Return the same state without its history: what truncated backpropagation hands on to the next piece."""
    return {name: each.detach() if isinstance(each, Tensor) else detach(each) for name, each in state.items()}


def pieces(tokens: tuple[Tensor, ...], step: int, chunk_size: int) -> Iterator[tuple[bool, list[Tensor]]]:
    """Cut tensors [B, H, T, ...] where a chunk ends, when `step` tokens came before the T.

    Yields whether a chunk begins with the piece, and the piece. Every tensor is split at once: slices taken one by one
    would each cost a gradient of the whole length.
    """
    length, offset = tokens[0].shape[2], step % chunk_size
    if not length:
        return
    ends = [*range(min(chunk_size - offset, length), length, chunk_size), length]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    for i, piece in enumerate(zip(*(x.split(sizes, 2) for x in tokens), strict=True)):
        yield i > 0 or offset == 0, list(piece)
