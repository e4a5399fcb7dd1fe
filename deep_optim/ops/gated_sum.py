"""A gated sum of outer products, read after every token: what the memories of a sequence have in common.

    S_t = momentum · S_{t−1} + u_t k_tᵀ              the velocity; without momentum, the token's write
    D_t = a_t D_{t−1} + S_t                          the change of a memory; it decays by a_t in (0, 1]
    answer_t = D_t q_t

A chunk of C tokens is taken at once. With A_t = log a_1 + … + log a_t,

    kept_ti    = exp(A_t − A_i),  i ≤ t              what the decays of i+1 … t leave of D_i
    pushed_ij  = momentum^(i−j),  j ≤ i              what S_i holds of the write j
    written_tj = Σ_i kept_ti pushed_ij               what D_t holds of the write j
    answer_t   = exp(A_t) D_0 q_t + c_t S_0 q_t + Σ_{j≤t} written_tj (k_jᵀq_t) u_j,    c_t = momentum · written_t1

Only differences of sums of logarithms are exponentiated, and only those that are ≤ 0: nothing overflows, and nothing is
divided by a product of decays, which underflows float32 after 13 tokens at a decay of 1e-3.

Nested Learning, arXiv:2512.24695, Eq. 93 and 96; the momentum is that of Titans, arXiv:2501.00663, Eq. 13-14.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ChunkWeights(NamedTuple):
    """What D_t holds of the chunk's writes and of what was there before; see the module docstring."""

    written: Tensor  # [..., C, C], lower triangle
    carried: Tensor  # exp(A_t) [..., C]
    pushed: Tensor | None  # [C, C], lower triangle; None without momentum
    momentum: float

    @property
    def own(self) -> Tensor:
        """What a_t D_{t−1} holds of write j < t: all of D_t's but what came with S_t."""
        return self.written if self.pushed is None else self.written - self.pushed

    @property
    def carried_velocity(self) -> Tensor:
        """c_t, what D_t holds of the velocity before the chunk; a_t D_{t−1} holds momentumᵗ less."""
        return self.momentum * self.written[..., 0]


def chunk_weights(log_decay: Tensor, momentum: float = 0.0) -> ChunkWeights:  # [..., C]
    """Return the weights of a chunk of C > 0 tokens.

    Args:
        log_decay: log a_t, finite and at most 0.
        momentum: how much of the velocity survives a token; in [0, 1).
    """
    total = log_decay.cumsum(-1)
    gap = (total[..., :, None] - total[..., None, :]).tril()  # masked before exp: what is above would overflow
    kept = gap.exp().tril()
    if momentum == 0.0:
        return ChunkWeights(kept, total.exp(), None, momentum)
    token = torch.arange(log_decay.shape[-1], device=log_decay.device, dtype=log_decay.dtype)
    pushed = (momentum ** (token[:, None] - token).clamp(min=0)).tril()
    return ChunkWeights(kept @ pushed, total.exp(), pushed, momentum)


def gated_sum_read(
    weights: ChunkWeights,
    query: Tensor,  # [..., C, d]
    key: Tensor,  # [..., C, d]
    write: Tensor,  # u [..., C, m]
    change: Tensor,  # D_0 [..., m, d]
    velocity: Tensor | None,  # S_0 [..., m, d]
) -> Tensor:  # [..., C, m]
    """Return D_t q_t for every token of a chunk. Costs 2 C (C (d + m) + m d) FLOPs."""
    answer = weights.carried[..., None] * (query @ change.mT) + (weights.written * (query @ key.mT)) @ write
    if velocity is None:
        return answer
    return answer + weights.carried_velocity[..., None] * (query @ velocity.mT)


def gated_sum_end(
    weights: ChunkWeights,
    key: Tensor,  # [..., C, d]
    write: Tensor,  # u [..., C, m]
    change: Tensor,  # D_0 [..., m, d]
    velocity: Tensor | None,  # S_0 [..., m, d]
) -> tuple[Tensor, Tensor | None]:
    """Return D and S after the chunk. Costs 2 C m d FLOPs, twice that with momentum."""
    end = weights.carried[..., -1, None, None] * change + (weights.written[..., -1, :, None] * write).mT @ key
    if velocity is None or weights.pushed is None:
        return end, velocity
    end = end + weights.carried_velocity[..., -1, None, None] * velocity
    speed = weights.momentum ** key.shape[-2] * velocity + (weights.pushed[-1, :, None] * write).mT @ key
    return end, speed
