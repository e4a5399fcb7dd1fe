"""Tensors by their addresses: a kernel for a whole list of them, which are neither stacked nor copied.

A table on the device holds where each matrix starts, as an integer that the kernel makes a pointer of.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import Parameter

from .backend import HAS_TRITON, Backend, tl, triton, use_triton

ADDRESSABLE = "plain, contiguous float32 tensors of one size on one device, apart in memory"

if HAS_TRITON:

    @triton.jit
    def matrix_at(table_ptr, index, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
        """The float32 matrix at an address of the table."""
        pointer = tl.load(table_ptr + index).to(tl.pointer_type(tl.float32))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        return pointer

    @triton.jit
    def block_of(size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """Which matrix of a stack a program works on, at which BLOCK of its `size` entries, which of these exist."""
        tiles = tl.cdiv(size, BLOCK)
        program = tl.program_id(0).to(tl.int64)  # one axis: the others end at 65535; int64: stack · size is large
        at = program % tiles * BLOCK + tl.arange(0, BLOCK)
        return program // tiles, at, at < size


def addressable(written: Sequence[Tensor], read: Sequence[Tensor], backend: Backend) -> bool:
    """Return whether kernels may go by the addresses of these tensors: contiguous, in float32, of one size and device.

    Programs write in no order, so that no two of `written` may share memory. Not under torch.compile, nor for
    subclasses such as DTensor.

    Raises:
        RuntimeError: for "triton" where tensors are fit for it and Triton cannot run, or a gradient is needed.
    """
    tensors = (*written, *read)
    first = tensors[0]
    if backend == "reference" or (backend == "auto" and first.is_cpu) or torch.compiler.is_compiling():
        return False
    numel, device = first.numel(), first.device
    for tensor in tensors:
        if type(tensor) not in (Tensor, Parameter) or not tensor.is_contiguous():
            return False
        if tensor.numel() != numel or tensor.device != device or tensor.dtype != torch.float32:
            return False
    asked = tensors if torch.is_grad_enabled() else tensors[:1]  # the others are like it, but for `requires_grad`
    return use_triton(backend, *asked) and apart(written)


def apart(tensors: Sequence[Tensor]) -> bool:
    """Return whether no two of these tensors share memory: from its first entry to its last, each has its own stretch.

    Neighbours in one buffer do not share; strided views that lie between one another are taken to.
    """
    return _apart(tuple([(tensor.data_ptr(), _extent(tensor)) for tensor in tensors]))


@lru_cache(maxsize=256)
def _apart(stretches: tuple[tuple[int, int], ...]) -> bool:
    return all(start + extent <= following for (start, extent), (following, _) in pairwise(sorted(stretches)))


def _extent(tensor: Tensor) -> int:
    """Return the bytes from the first entry of a tensor to the end of its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * (1 + sum((size - 1) * stride for size, stride in steps))


def addresses(tensors: Sequence[Tensor], split: int = 1) -> tuple[Tensor, bool]:
    """Return where each of `split` blocks of each tensor lies, and whether all are aligned to 16 bytes."""
    block = tensors[0].numel() // split * tensors[0].element_size()
    found = tuple(tensor.data_ptr() + i * block for tensor in tensors for i in range(split))
    aligned = all(address % 16 == 0 for address in found)
    device = tensors[0].device
    if device.type != "cuda":
        return _table(found, device), aligned
    if torch.cuda.is_current_stream_capturing():  # the table is the graph's own: made, and lost, with it
        return _table(found, device), aligned
    return _kept_table(found, device, torch.cuda.current_stream(device).cuda_stream), aligned


def on_device(number: float | Tensor, device: torch.device) -> float | Tensor:
    """Return a number, or a tensor of the device; one on the host is read there, which waits for nothing."""
    if not isinstance(number, Tensor):
        return number
    return number.to(device) if number.is_cuda else number.item()


def _table(found: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the addresses as a tensor; they reach the device as arguments of a kernel, for which nothing waits."""
    table = torch.zeros(len(found), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), found)
    return table


# Gradients come back at the same few places; a table is right for as long as its key is, whatever lies there. The
# stream is a part of the key: on another one nothing says that the table is written before it is read.
@lru_cache(maxsize=256)
def _kept_table(found: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _table(found, device)
