"""A residual MLP memory written over a sequence, with gradients frozen at the start of a chunk.

    memory      m(z) = z + W₁ s(W₂ z)                              s as in `mlp_memory`
    objective   ½ ‖m(k) − v‖²
    G_t = ∇ at the weights F of the chunk's start, for k_t and v_t
    D_t = a_t D_{t−1} − (β_t / n_t) G_t,   W_t = W_0 + D_t         for both weights
    answer_t = q_t + W₁,t s(W₂,t q_t)

The weights decay towards their initial values, and within a chunk they move with every token; only the gradients wait
for the chunk's end, so that all tokens of a chunk are taken at once. Both gradients are outer products, W₁'s of the
error e and the hidden features h, W₂'s of p = (W₁ᵀe) ⊙ s′ and k: `gated_sum` reads and ends them, momentum included.

Step size. n_t = ‖h‖² + ‖W₁ diag s′‖_F² + a floor bounds the largest eigenvalue of the Jacobian's Gram at a key of
length 1: to first order, a step of β ≤ 1 never goes beyond the value. A frozen chunk adds its steps up: C equal keys
with β = 1 would go C times too far, and diverge for C > 2. A soft cap turns the rates b_t into

    β_t = f(R_t + b_t) − f(R_t),   f(r) = r / (1 + r),   R_t = Σ_{j<t in the chunk} b_j (k_jᵀk_t)²

Orthogonal keys do not see one another, β = b / (1 + b). Equal keys share one sum, which telescopes: Σ β ≤ 1 whatever
the chunk's size. It looks backwards only, so a sequence may be cut anywhere.

Nested Learning, arXiv:2512.24695, Eq. 89-91, read after the write and without the second erasure (see
`gated_delta_rule`). That every token's weights can be read without being formed is from Sun et al., arXiv:2407.04620.
"""

import torch
from torch import Tensor

from .gated_sum import chunk_weights, gated_sum_end, gated_sum_read
from .mlp_memory import hidden_features, sigmoid

Weights = tuple[Tensor, Tensor]  # W₁ [..., d, h], W₂ [..., h, d]

_FLOOR = 1e-2  # of n: a key that the features hardly see is written little, not with a huge W₁


def read_residual_mlp(weights: Weights, query: Tensor) -> Tensor:  # [..., T, d] -> [..., T, d]
    """Return m(z) for every row. Costs 4 T d h FLOPs."""
    return query + hidden_features(weights[1], query) @ weights[0].mT


def soft_cap(
    key: Tensor,  # [..., T, d]
    rate: Tensor,  # [..., T]
    seen: Tensor,  # [..., d, d]
) -> tuple[Tensor, Tensor]:  # [..., T], [..., d, d]
    """Return β of every token, and `seen` after the last one.

    Args:
        key: keys of one chunk, or of a part of it.
        rate: b_t, at least 0.
        seen: Σ b_j k_j k_jᵀ over the tokens of the chunk that came before.
    """
    earlier = rate[..., None, :] * (key @ key.mT).square()
    total = ((key @ seen) * key).sum(-1) + earlier.tril(-1).sum(-1)  # R_t
    beta = rate / ((1 + total) * (1 + total + rate))
    return beta, seen + (rate[..., None] * key).mT @ key


def gated_mlp_memory(
    query: Tensor,  # [..., T, d]
    key: Tensor,  # [..., T, d]
    value: Tensor,  # [..., T, d]
    log_decay: Tensor,  # [..., T]
    step: Tensor,  # β [..., T]
    initial: Weights,
    frozen: Weights,
    change: Weights,
    velocity: Weights | None = None,
    *,
    momentum: float = 0.0,
) -> tuple[Tensor, Weights, Weights | None]:
    """Return the answers, and D and the velocity after the last of T > 0 tokens within one chunk.

    Costs about 20 d h + 4 T (d + h) FLOPs per token.

    Args:
        query: where the memory is read, after the token's write.
        key: where it is written, of length 1.
        value: what the memory should answer at the key.
        log_decay: log a_t, finite and at most 0.
        step: β_t, from `soft_cap`.
        initial: W_0, towards which the weights decay.
        frozen: F, W at the start of the chunk that the tokens are in.
        change: D before the first token.
        velocity: S before the first token; None is zero.
        momentum: how much of the velocity survives a token; in [0, 1).
    """
    if momentum and velocity is None:
        velocity = torch.zeros_like(change[0]), torch.zeros_like(change[1])
    speed: tuple[Tensor | None, Tensor | None] = velocity or (None, None)
    hidden = hidden_features(frozen[1], key)  # H [..., T, h]
    slope = (1 - hidden * hidden) ** 1.5  # s′
    error = key + hidden @ frozen[0].mT - value  # e [..., T, d]
    norm = hidden.square().sum(-1) + (slope.square() @ frozen[0].square().sum(-2)[..., None])[..., 0]  # n
    scale = (step / (norm + _FLOOR))[..., None]
    write_1 = -scale * error
    write_2 = -scale * (error @ frozen[0]) * slope
    weights = chunk_weights(log_decay, momentum)
    features = sigmoid(query @ initial[1].mT + gated_sum_read(weights, query, key, write_2, change[1], speed[1]))
    answer = features @ initial[0].mT + gated_sum_read(weights, features, hidden, write_1, change[0], speed[0])
    end_1, speed_1 = gated_sum_end(weights, hidden, write_1, change[0], speed[0])
    end_2, speed_2 = gated_sum_end(weights, key, write_2, change[1], speed[1])
    return query + answer, (end_1, end_2), None if speed_1 is None or speed_2 is None else (speed_1, speed_2)
