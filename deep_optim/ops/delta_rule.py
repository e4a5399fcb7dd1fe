"""The delta rule: one gradient step of a linear memory on an L2 regression.

    objective   ½ ‖M Kᵀ − V‖²
    update      M ← decay · M − rate · (M Kᵀ − V) K

Nested Learning, arXiv:2512.24695, Eq. 48-49 with the Gram on the side where the shapes match and a step size on
both terms. The Hebbian (dot-product) memory is the same rule without the `M Kᵀ` term: it adds every value, where
the delta rule first erases what it already answers for that key. Written for a stack of memories: every leading
dimension is a batch dimension.
"""

import torch
from torch import Tensor

from .backend import HAS_TRITON, Backend, on_device_of, tl, triton, use_triton


def delta_rule(
    memory: Tensor,  # [..., m, d]
    key: Tensor,  # [..., n, d]
    value: Tensor | None,  # [..., m, n]
    *,
    decay: float = 1.0,
    rate: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:  # [..., m, d]
    """Return the memory after one step; see the module docstring for the equation.

    Stable while `rate` times the largest eigenvalue of KᵀK is below 1 + `decay`. Costs 4 m n d FLOPs, or
    2 d² (m + n) without a value where that is less.

    Args:
        memory: m outputs, d inputs.
        key: n keys in rows.
        value: what the memory should answer, one column per key; None is zero: erase, write nothing.
        decay: how much of the memory survives the step.
        rate: step size of the regression.
        backend: "auto", "reference" or "triton".
    """
    step = _delta_rule_triton if use_triton(backend, memory, key) else delta_rule_reference
    return step(memory, key, value, decay=decay, rate=rate)


def delta_rule_reference(memory: Tensor, key: Tensor, value: Tensor | None, *, decay: float, rate: float) -> Tensor:
    """The equation as written; the ground truth that every other path is tested against."""
    left, right = _error_product(memory, key, value)
    return decay * memory - rate * (left @ right)


def _error_product(memory: Tensor, key: Tensor, value: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two factors of (M Kᵀ − V) K, in the cheaper association."""
    (m, d), n = memory.shape[-2:], key.shape[-2]
    if value is None and d * (m + n) < 2 * m * n:
        return memory, key.mT @ key  # M (KᵀK)
    error = memory @ key.mT  # [..., m, n]
    return (error if value is None else error - value), key


if HAS_TRITON:

    @triton.jit  # type: ignore[untyped-decorator]
    def _delta_rule_kernel(  # type: ignore[no-untyped-def]
        memory_ptr, left_ptr, right_ptr, out_ptr,
        m, n, d, decay, rate,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One [BLOCK_M, BLOCK_D] tile of decay · M − rate · L R; the product never reaches memory."""
        tiles_d, tiles = tl.cdiv(d, BLOCK_D), tl.cdiv(m, BLOCK_M) * tl.cdiv(d, BLOCK_D)
        program = tl.program_id(0).to(tl.int64)  # one axis: the others end at 65535; int64: batch · m · d is large
        batch, tile = program // tiles, program % tiles
        rows = tile // tiles_d * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = tile % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
        acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        for start in range(0, n, BLOCK_N):
            inner = start + tl.arange(0, BLOCK_N)
            left = tl.load(  # [BLOCK_M, BLOCK_N]
                left_ptr + batch * m * n + rows[:, None] * n + inner[None, :],
                mask=(rows[:, None] < m) & (inner[None, :] < n), other=0.0,
            )  # fmt: skip
            right = tl.load(  # [BLOCK_N, BLOCK_D]
                right_ptr + batch * n * d + inner[:, None] * d + cols[None, :],
                mask=(inner[:, None] < n) & (cols[None, :] < d), other=0.0,
            )  # fmt: skip
            acc = tl.dot(left, right, acc=acc, input_precision="ieee")
        out = batch * m * d + rows[:, None] * d + cols[None, :]
        mask = (rows[:, None] < m) & (cols[None, :] < d)
        memory = tl.load(memory_ptr + out, mask=mask, other=0.0)
        tl.store(out_ptr + out, decay * memory - rate * acc, mask=mask)


def _delta_rule_triton(memory: Tensor, key: Tensor, value: Tensor | None, *, decay: float, rate: float) -> Tensor:
    left, right = _error_product(memory, key, value)
    m, d = memory.shape[-2:]
    n = right.shape[-2]
    left, right = left.reshape(-1, m, n).contiguous(), right.reshape(-1, n, d).contiguous()
    flat = memory.reshape(-1, m, d).contiguous()
    out = torch.empty_like(flat)
    if out.numel():
        grid = (len(flat) * triton.cdiv(m, 64) * triton.cdiv(d, 64),)
        with on_device_of(flat):
            _delta_rule_kernel[grid](flat, left, right, out, m, n, d, decay, rate, BLOCK_M=64, BLOCK_N=32, BLOCK_D=64)
    return out.reshape(memory.shape)
