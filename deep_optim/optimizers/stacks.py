"""Stacks [B, m, n] of parameters of one shape, and back: an equation is written once and launched once."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from deep_optim.ops.addresses import apart

from .sharding import local, local_of, whole

_STACK_NUMEL = 2**25  # 128 MB in float32: enough to fill a device, small beside a model
_CPU_STACK_NUMEL = 2**18  # 1 MB, which stays in a core's cache; larger temporaries cost a page fault each time


def stacks(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut `params` into stacks of one shape, dtype and device; those that share memory are stepped one by one."""
    groups: dict[Any, list[Tensor]] = {}
    for param in params:
        groups.setdefault((type(param), param.shape, param.dtype, param.device), []).append(param)
    for members in groups.values():
        size = (_CPU_STACK_NUMEL if members[0].is_cpu else _STACK_NUMEL) // members[0].numel()
        size = size if size >= 4 else 1  # a stack of two or three large matrices costs more copies than it saves calls
        size = 1 if _overlapping(members) else size
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _overlapping(params: list[Tensor]) -> bool:
    """Return whether some of these may share memory, of which only plain tensors can be asked."""
    plain = type(params[0]) in (Tensor, Parameter) and not torch.compiler.is_compiling()
    return plain and not apart(params)


def as_matrices(tensor: Tensor, param: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return a tensor of the state as `update` is to see it: one of the parameter's shape as `shape`, others whole."""
    if tensor.ndim == 0 and param.ndim > 0:  # a counter, one for all blocks of the parameter
        return tensor.view(1, 1, 1).expand(shape[0], 1, 1)
    return whole(tensor).reshape(shape) if tensor.shape == param.shape else tensor


def matrices(tensors: list[Tensor], shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Return the stack [B, m, n] of whole tensors, each read as `shape`."""
    return stack([whole(tensor).to(dtype).reshape(shape) for tensor in tensors])


def stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def unstack(tensors: list[Tensor], stacked: Tensor) -> None:
    """Write the blocks of a stack to the tensors they came from."""
    blocks = zip(tensors, stacked.chunk(len(tensors)), strict=True)
    torch._foreach_copy_([local(t) for t in tensors], [local_of(block.reshape(t.shape), t) for t, block in blocks])
