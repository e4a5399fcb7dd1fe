"""A linear memory of many gradients of one shape, written in place and read.

    M ← decay · M + G
    D = G + decay · M   if nesterov, else M

From Triton one launch, and 16 bytes per parameter: G and M are read, M and D written. In plain torch the matrices are
stacked first and M is taken apart after, which with three passes between makes 40 bytes and more.
Nested Learning, arXiv:2512.24695, Eq. 33-34, in torch's convention: M is a sum of gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .addresses import ADDRESSABLE, addressable, addresses
from .backend import HAS_TRITON, Backend, on_device_of, tl, triton

_BLOCK = {"BLOCK": 2048, "num_warps": 8}


def momentum_read(
    grads: Sequence[Tensor],  # G
    memories: Sequence[Tensor],  # M
    *,
    decay: float,
    nesterov: bool = True,
    maximize: bool = False,
    backend: Backend = "auto",
) -> Tensor:  # D, one after the other [B, numel]
    """Write `memories` and return what is read from them.

    Args:
        grads: gradients, all of one size; not written.
        memories: one per gradient, and of its size.
        decay: how much of the memory survives.
        nesterov: read the memory with the same write added once more.
        maximize: write −G.
        backend: "auto", "reference" or "triton". "auto" takes Triton where all are `addressable`.

    Raises:
        RuntimeError: for "triton" where not all are.
    """
    if addressable(memories, grads, backend):
        return momentum_triton(grads, memories, decay, nesterov, maximize)
    if backend == "triton":
        raise RuntimeError(f"backend='triton' needs {ADDRESSABLE}")
    return momentum_reference(grads, memories, decay, nesterov, maximize)


def momentum_reference(
    grads: Sequence[Tensor], memories: Sequence[Tensor], decay: float, nesterov: bool, maximize: bool
) -> Tensor:
    """The equation as written; the ground truth that the other path is tested against."""
    read = []
    for grad, memory in zip(grads, memories, strict=True):
        written = -grad if maximize else grad
        memory.mul_(decay).add_(written)
        read.append(written.add(memory, alpha=decay) if nesterov else memory)
    return torch.stack(read).reshape(len(grads), grads[0].numel())


if HAS_TRITON:
    from .addresses import block_of, matrix_at

    @triton.jit
    def _momentum_kernel(  # type: ignore[no-untyped-def]
        table_ptr, direction_ptr, stack, size, decay,
        NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """BLOCK entries of one memory. Rounded where torch rounds: compiled without fusing products and sums."""
        batch, at, mask = block_of(size, BLOCK)
        grad = tl.load(matrix_at(table_ptr, batch, ALIGNED) + at, mask=mask, other=0.0)
        written = -grad if MAXIMIZE else grad
        memory_ptr = matrix_at(table_ptr, stack + batch, ALIGNED)
        memory = decay * tl.load(memory_ptr + at, mask=mask, other=0.0) + written
        tl.store(memory_ptr + at, memory, mask=mask)
        read = tl.fma(tl.full((BLOCK,), decay, tl.float32), memory, written) if NESTEROV else memory
        tl.store(direction_ptr + batch * size + at, read, mask=mask)


def momentum_triton(
    grads: Sequence[Tensor], memories: Sequence[Tensor], decay: float, nesterov: bool, maximize: bool
) -> Tensor:
    """The same by the kernel, for tensors that are known to be `addressable`."""
    stack, size = len(grads), grads[0].numel()
    table, aligned = addresses((*grads, *memories))
    direction = torch.empty(stack, size, dtype=torch.float32, device=grads[0].device)
    with on_device_of(direction):
        _momentum_kernel[(stack * triton.cdiv(size, _BLOCK["BLOCK"]),)](
            table, direction, stack, size, decay, NESTEROV=nesterov, MAXIMIZE=maximize, ALIGNED=aligned,
            **_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    torch.autograd.graph.increment_version(list(memories))  # which kernels do not do
    return direction
