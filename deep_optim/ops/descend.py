"""The last step of an optimizer, on many parameters: the weights descend.

    W ← (1 − lr · weight_decay) · W − lr · D

From Triton one launch for all parameters of one size, and 12 bytes per parameter (10 for D in half precision): W and D
are read, W written. torch makes two passes over W.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .addresses import ADDRESSABLE, addressable, addresses, on_device
from .backend import HAS_TRITON, Backend, on_device_of, tl, triton

_BLOCK = {"BLOCK": 2048, "num_warps": 8}
_DIRECTIONS = (torch.float32, torch.bfloat16, torch.float16)


def descend(
    params: Sequence[Tensor],  # W
    direction: Tensor,  # D of all of them, one after the other
    *,
    lr: float | Tensor,
    weight_decay: float,
    backend: Backend = "auto",
) -> None:
    """Write `params`, all of one size; see the module docstring.

    Args:
        params: the weights.
        direction: as many numbers as they have, in their order.
        lr: step size; from a tensor on the device it is read there.
        weight_decay: decoupled, multiplied by `lr`.
        backend: "auto", "reference" or "triton". "auto" takes Triton where all is `addressable`.

    Raises:
        RuntimeError: for "triton" where not all is.
    """
    plain = type(direction) is Tensor and direction.is_contiguous() and direction.dtype in _DIRECTIONS
    fits = plain and direction.numel() == len(params) * params[0].numel() and direction.device == params[0].device
    if fits and addressable(params, (), backend):
        descend_triton(params, direction, lr=lr, weight_decay=weight_decay)
    elif backend == "triton":
        raise RuntimeError(f"backend='triton' needs {ADDRESSABLE}, and for each of them a direction, not in float64")
    else:
        directions = [d.reshape(p.shape) for d, p in zip(direction.chunk(len(params)), params, strict=True)]
        descend_reference(params, directions, lr, weight_decay)


def descend_reference(
    params: Sequence[Tensor], directions: Sequence[Tensor], lr: float | Tensor, weight_decay: float
) -> None:
    """The equation as written, for parameters of any sizes; the ground truth that the other path is tested against."""
    masters, step = list(params), -1.0
    directions = [direction.to(master.dtype) for direction, master in zip(directions, masters, strict=True)]
    if isinstance(lr, Tensor):
        lr = lr.reshape(())
        directions = list(torch._foreach_mul(directions, lr))
    else:
        step = -lr
    if weight_decay != 0:
        torch._foreach_mul_(masters, 1 - lr * weight_decay)
    torch._foreach_add_(masters, directions, alpha=step)


if HAS_TRITON:
    from .addresses import block_of, matrix_at

    @triton.jit
    def descend_block(  # type: ignore[no-untyped-def]
        param_ptr, direction, at, mask, lr, kept, LR_ON_DEVICE: tl.constexpr
    ):
        """Write entries of W, given those of D and `rates`. Rounded where torch rounds, if nothing else is fused."""
        if LR_ON_DEVICE:
            lr = tl.load(lr).to(tl.float32)
            kept = 1 - lr * kept
        param = kept * tl.load(param_ptr + at, mask=mask, other=0.0)
        if LR_ON_DEVICE:
            param = param - lr * direction
        else:
            param = tl.fma(direction, tl.full(direction.shape, -lr, tl.float32), param)
        tl.store(param_ptr + at, param, mask=mask)

    @triton.jit
    def _descend_kernel(  # type: ignore[no-untyped-def]
        table_ptr, direction_ptr, lr, size, kept,
        LR_ON_DEVICE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """BLOCK entries of one parameter."""
        batch, at, mask = block_of(size, BLOCK)
        direction = tl.load(direction_ptr + batch * size + at, mask=mask, other=0.0).to(tl.float32)
        descend_block(matrix_at(table_ptr, batch, ALIGNED), direction, at, mask, lr, kept, LR_ON_DEVICE)


def rates(lr: float | Tensor, weight_decay: float, device: torch.device) -> tuple[float | Tensor, float]:
    """Return what kernels are given: lr and 1 − lr · weight_decay, or both as they are where lr is on the device."""
    lr = on_device(lr, device)
    return lr, weight_decay if isinstance(lr, Tensor) else 1 - lr * weight_decay


def descend_triton(params: Sequence[Tensor], direction: Tensor, *, lr: float | Tensor, weight_decay: float) -> None:
    """The same by the kernel, for parameters that are known to be `addressable`, and a direction that fits them."""
    size, (lr, kept) = params[0].numel(), rates(lr, weight_decay, direction.device)
    table, aligned = addresses(params)
    with on_device_of(direction):
        _descend_kernel[(len(params) * triton.cdiv(size, _BLOCK["BLOCK"]),)](
            table, direction, lr, size, kept, LR_ON_DEVICE=isinstance(lr, Tensor), ALIGNED=aligned,
            **_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    torch.autograd.graph.increment_version(list(params))  # which kernels do not do
