"""Which implementation an op runs: the plain-torch reference, or Triton."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter

Backend = Literal["auto", "reference", "triton"]

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    if error.name != "triton":  # a broken Triton install must be heard, not hidden
        raise
    triton = tl = None

HAS_TRITON = triton is not None

__all__ = ["HAS_TRITON", "Backend", "on_device_of", "tl", "triton", "use_triton"]


def use_triton(backend: Backend, *tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Return whether to take the Triton path.

    "auto" takes it for plain CUDA tensors of the kernel's dtypes that need no gradient, and never where the environment
    has DEEP_OPTIM_TRITON=0; an explicit request never falls back in silence.

    Args:
        backend: "auto", "reference" or "triton".
        tensors: what the op reads; all of them must be on the GPU for "auto" to take Triton.
        dtypes: those the kernel takes; float32 alone unless it says otherwise.

    Raises:
        ValueError: for an unknown backend.
        RuntimeError: if "triton" was asked for where Triton cannot run, or where a gradient is needed.
    """
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"Invalid backend: {backend!r}, expected 'auto', 'reference' or 'triton'")
    on_cuda = all(tensor.is_cuda for tensor in tensors)
    in_dtypes = all(tensor.dtype in dtypes for tensor in tensors)
    plain = all(type(tensor) in (Tensor, Parameter) for tensor in tensors)  # a subclass may have no memory of its own
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if backend == "auto":
        wanted = os.environ.get("DEEP_OPTIM_TRITON") != "0"
        return HAS_TRITON and wanted and on_cuda and in_dtypes and plain and not needs_grad
    if backend == "triton":
        if needs_grad:
            raise RuntimeError("backend='triton' has no backward; use backend='reference' where gradients are needed")
        if not (HAS_TRITON and in_dtypes and plain and (on_cuda or os.environ.get("TRITON_INTERPRET") == "1")):
            raise RuntimeError(
                f"backend='triton' needs Triton and plain CUDA tensors of {' or '.join(map(str, dtypes))}; "
                f"{HAS_TRITON=}, {on_cuda=}, {in_dtypes=}, {plain=}"
            )
    return backend == "triton"


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context in which kernels are launched where `tensor` is: Triton goes by the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
