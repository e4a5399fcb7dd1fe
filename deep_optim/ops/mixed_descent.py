"""The end of a step of M3 on many parameters of one shape: two answers mixed, rows evened out, weights stepped.

    X  = O + share · (O₂ − O)                         O: the fast memory's answer, O₂: the slow one's
    q  = Σⱼ xᵢⱼ²                                      `mixed_squares`, of each row i
    W  ← (1 − lr · weight_decay) · W − lr · w ∘ X     `mixed_descent`, w a factor per row that its caller makes of q

X is never in memory: 6 bytes per parameter for its rows and 14 for the descent, for O in half precision, where torch
makes 58.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .addresses import ADDRESSABLE, addressable, addresses
from .backend import HAS_TRITON, Backend, on_device_of, tl, triton
from .descend import descend, rates

_ROWS = {"BLOCK": 1024, "num_warps": 4}
_TILE = {"BLOCK": 1024, "num_warps": 4}


def mixed_squares(
    fast: Tensor,  # O [B, m, n]
    slow: Sequence[Tensor],  # O₂
    share: Tensor,  # [B, 1, 1]
    *,
    backend: Backend = "auto",
) -> Tensor:  # q [B, m, 1], in float32 or float64
    """Return the sums of squares of the rows of X; see the module docstring.

    Args:
        fast: the answers of a stack of memories, contiguous.
        slow: as many tensors as share out the stack.
        share: the slow answer's share of the mix, 0 to 1.
        backend: "auto", "reference" or "triton".
    """
    if _takes_triton((), fast, slow, share, backend):
        return mixed_squares_triton(fast, slow, share)
    return mix(fast, slow, share).square().sum(-1, keepdim=True)


def mixed_descent(
    params: Sequence[Tensor],  # W
    fast: Tensor,  # O [B, m, n]
    slow: Sequence[Tensor],  # O₂
    share: Tensor,  # [B, 1, 1]
    weight: Tensor,  # w [B, m, 1]
    *,
    lr: float | Tensor,
    weight_decay: float,
    backend: Backend = "auto",
) -> None:
    """Write `params`; see the module docstring. Arguments as above, and

    Args:
        params: the weights, as many as share out the stack.
        weight: a factor for each row.
        lr: step size; from a tensor on the device it is read there.
        weight_decay: decoupled, multiplied by `lr`.
    """
    if _takes_triton(params, fast, slow, share, backend):
        mixed_descent_triton(params, fast, slow, share, weight, lr=lr, weight_decay=weight_decay)
    else:
        descend(params, weight * mix(fast, slow, share), lr=lr, weight_decay=weight_decay)


def mix(fast: Tensor, slow: Sequence[Tensor], share: Tensor) -> Tensor:
    """Return X, in the dtype of O₂."""
    answers = torch.cat([each.reshape(-1, *fast.shape[1:]) for each in slow])
    return fast.to(answers.dtype).lerp(answers, share)


def _takes_triton(
    params: Sequence[Tensor], fast: Tensor, slow: Sequence[Tensor], share: Tensor, backend: Backend
) -> bool:
    plain = type(fast) is Tensor and fast.is_contiguous() and fast.dtype != torch.float64
    fits = plain and share.shape == (len(fast), 1, 1) and fast.device == share.device == slow[0].device
    if fits and fast.numel() == len(slow) * slow[0].numel() and addressable(params, slow, backend):
        return True
    if backend == "triton":
        raise RuntimeError(
            f"backend='triton' needs {ADDRESSABLE}, together as large as the stack, a share for each of its matrices, "
            "and no answers in float64"
        )
    return False


if HAS_TRITON:
    from .addresses import block_of, matrix_at
    from .descend import descend_block

    @triton.jit
    def _mixed(fast_ptr, slow_ptr, share, at, mask):  # type: ignore[no-untyped-def]
        """Entries of X."""
        fast = tl.load(fast_ptr + at, mask=mask, other=0.0).to(tl.float32)
        slow = tl.load(slow_ptr + at, mask=mask, other=0.0)
        return fast + share * (slow - fast)

    @triton.jit
    def _mixed_squares_kernel(  # type: ignore[no-untyped-def]
        table_ptr, fast_ptr, share_ptr, squares_ptr, m, n, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Σ x² of one row."""
        program = tl.program_id(0).to(tl.int64)  # int64: stack · m · n is large
        batch, row = program // m, program % m
        share = tl.load(share_ptr + batch)
        fast_ptr += program * n
        slow_ptr = matrix_at(table_ptr, batch, ALIGNED) + row * n
        acc = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            entry = _mixed(fast_ptr, slow_ptr, share, at, at < n)
            acc += entry * entry
        tl.store(squares_ptr + program, tl.sum(acc))

    @triton.jit
    def _mixed_descent_kernel(  # type: ignore[no-untyped-def]
        table_ptr, fast_ptr, share_ptr, weight_ptr, lr, stack, m, n, kept,
        LR_ON_DEVICE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """BLOCK entries of one parameter."""
        size = tl.cast(m, tl.int64) * n
        batch, at, mask = block_of(size, BLOCK)
        share = tl.load(share_ptr + batch)
        mixed = _mixed(fast_ptr + batch * size, matrix_at(table_ptr, batch, ALIGNED), share, at, mask)
        weight = tl.load(weight_ptr + batch * m + at // n, mask=mask, other=0.0)
        param_ptr = matrix_at(table_ptr, stack + batch, ALIGNED)
        descend_block(param_ptr, weight * mixed, at, mask, lr, kept, LR_ON_DEVICE)


def mixed_squares_triton(fast: Tensor, slow: Sequence[Tensor], share: Tensor) -> Tensor:
    """The same by the kernel, for tensors that are known to be `addressable`, and to fit together."""
    stack, m, n = fast.shape
    table, aligned = addresses(slow, stack // len(slow))
    squares = torch.empty(stack, m, 1, dtype=torch.float32, device=fast.device)
    with on_device_of(fast):
        _mixed_squares_kernel[(stack * m,)](table, fast, share.contiguous(), squares, m, n, ALIGNED=aligned, **_ROWS)
    return squares


def mixed_descent_triton(
    params: Sequence[Tensor],
    fast: Tensor,
    slow: Sequence[Tensor],
    share: Tensor,
    weight: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float,
) -> None:
    """Likewise."""
    (stack, m, n), (lr, kept) = fast.shape, rates(lr, weight_decay, fast.device)
    table, aligned = addresses((*slow, *params), stack // len(slow))
    with on_device_of(fast):
        _mixed_descent_kernel[(stack * triton.cdiv(m * n, _TILE["BLOCK"]),)](
            table, fast, share.contiguous(), weight.contiguous(), lr, stack, m, n, kept,
            LR_ON_DEVICE=isinstance(lr, Tensor), ALIGNED=aligned, **_TILE,
        )  # fmt: skip
    torch.autograd.graph.increment_version(list(params))  # which kernels do not do
