"""The gated delta rule over a sequence: a linear memory that decays towards its initial state and overwrites by key.

    objective   ½ ‖M k − v‖²
    M_t = M_0 + D_t,   D_0 = 0                                     what is written is the change D
    D_t = a_t D_{t−1} (I − b_t k_t k_tᵀ) + b_t (v_t − M_0 k_t) k_tᵀ
    answer_t = D_t q_t

which is one gradient step on the objective, with rate b_t, from M_0 + a_t D_{t−1}. For keys of length 1, b = 1 replaces
what k reads by v, and b in (1, 2) goes beyond it: I − b k kᵀ then has the eigenvalue 1 − b < 0, b = 2 reflects. The
transitions never expand D while b stays within [0, 2]. The functions here see D alone: the caller passes v_t − M_0 k_t
as the value, and adds M_0 q_t to the answer.

With momentum S_t takes the place of the write, and the error is still that of the memory as it is (Titans,
arXiv:2501.00663, Eq. 13-14):

    S_t = momentum · S_{t−1} + b_t (v_t − a_t D_{t−1} k_t) k_tᵀ,   D_t = a_t D_{t−1} + S_t

A chunk of C tokens is exact, in closed form. Every write is an outer product u_t k_tᵀ, so `gated_sum` holds, and

    u_t = b_t (v_t − a_t D_{t−1} k_t) = b_t (v_t − (D_0, S_0 read at k_t) − Σ_{j<t} own_tj (k_jᵀk_t) u_j)

is one triangular system of C unknowns (the UT transform of Yang et al., arXiv:2406.06484 and 2412.06464). It is well
behaved: its solutions are the writes of the recurrence itself.

Nested Learning, arXiv:2512.24695, Eq. 88 and 93. Printed, the decay a I − η k kᵀ and the gradient of the square both
erase what k reads, and M k = v/2 is the fixed point; here it is erased once. Leading dimensions are batch dimensions.
"""

import torch
from torch import Tensor

from .gated_sum import ChunkWeights, chunk_weights, gated_sum_end, gated_sum_read


def gated_delta_rule(
    query: Tensor,  # [..., T, d]
    key: Tensor,  # [..., T, d]
    value: Tensor,  # [..., T, m]
    log_decay: Tensor,  # [..., T]
    rate: Tensor,  # [..., T]
    change: Tensor,  # [..., m, d]
    velocity: Tensor | None = None,  # [..., m, d]
    *,
    momentum: float = 0.0,
    answers: int | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor, Tensor | None]:  # [..., T, answers], [..., m, d] twice
    """Return what D_t answers for the query of every token, and D and the velocity after the last one.

    Exact for every `chunk_size`, which is a matter of cost: a token costs 4 m d + 2 answers d FLOPs and about
    C (4 d + m + 2 answers) more, and T / C steps follow one another. All of it is differentiable.

    Args:
        query: where the memory is read, after the token's write.
        key: where it is written; of length 1, or `rate` times the squared length at most 2.
        value: what the memory should answer at the key, less what its initial state answers.
        log_decay: log a_t, finite and at most 0.
        rate: b_t.
        change: D before the first token; zeros for a memory in its initial state.
        velocity: S before the first token; None is zero.
        momentum: how much of the velocity survives a token; in [0, 1).
        answers: how many of the leading rows of D answer; all by default.
        chunk_size: tokens taken at once, C.
    """
    if momentum and velocity is None:
        velocity = torch.zeros_like(change)
    if not key.shape[-2]:
        return query @ change[..., :answers, :].mT, change, velocity
    parts = []
    tokens = (
        *(x.split(chunk_size, -2) for x in (query, key, value)),
        *(x.split(chunk_size, -1) for x in (log_decay, rate)),
    )
    for q, k, v, log_a, b in zip(*tokens, strict=True):
        weights = chunk_weights(log_a, momentum)
        write = _writes(weights, k, v, b[..., None], change, velocity)
        read = change[..., :answers, :], None if velocity is None else velocity[..., :answers, :]
        parts.append(gated_sum_read(weights, q, k, write[..., :answers], *read))
        change, velocity = gated_sum_end(weights, k, write, change, velocity)
    return torch.cat(parts, -2), change, velocity


def _writes(
    weights: ChunkWeights,
    key: Tensor,  # [..., C, d]
    value: Tensor,  # [..., C, m]
    rate: Tensor,  # [..., C, 1]
    change: Tensor,  # [..., m, d]
    velocity: Tensor | None,
) -> Tensor:  # [..., C, m]
    """Return u: the triangular system of a chunk, solved."""
    known = weights.carried[..., None] * (key @ change.mT)  # what a_t D_{t−1} answers out of earlier chunks
    if velocity is not None:
        token = torch.arange(1, key.shape[-2] + 1, device=key.device, dtype=key.dtype)
        known = known + (weights.carried_velocity - weights.momentum**token)[..., None] * (key @ velocity.mT)
    system = (rate * weights.own * (key @ key.mT)).tril(-1)
    return torch.linalg.solve_triangular(system, rate * (value - known), upper=False, unitriangular=True)


def gated_delta_rule_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    rate: Tensor,
    change: Tensor,
    velocity: Tensor | None = None,
    *,
    momentum: float = 0.0,
    answers: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The equation as written, token by token; the ground truth of the chunk form."""
    if momentum and velocity is None:
        velocity = torch.zeros_like(change)
    parts = [query[..., :0, :] @ change[..., :answers, :].mT]
    for t in range(key.shape[-2]):
        q, k, v = (x[..., t, :, None] for x in (query, key, value))  # columns
        decayed = log_decay[..., t, None, None].exp() * change
        write = rate[..., t, None, None] * (v - decayed @ k) @ k.mT
        if velocity is not None:
            velocity = write = momentum * velocity + write
        change = decayed + write
        parts.append((change[..., :answers, :] @ q).mT)
    return torch.cat(parts, -2), change, velocity
