"""SwiGLU, the MLP of today's language models, as a memory: its answers, and the gradients of its L2 regression.

    memory      f(k) = D h,   h = a σ(a) ⊙ b,   a = G k,   b = U k
    objective   ½ Σ_t r_t ‖f(k_t) − v_t‖²
    E    = r ⊙ (f(K) − V)                                the errors, in rows as keys and values are
    ∇D   = Eᵀ H
    ∇U   = ((E D) ⊙ a σ(a))ᵀ K
    ∇G   = ((E D) ⊙ b ⊙ σ(a) (1 + a (1 − σ(a))))ᵀ K

The block is that of arXiv:2002.05202. Every leading dimension is a batch dimension. Here answers stand in rows,
[..., n, m], as tokens do in a model, where `deep_optim.ops.mlp_memory` has them in columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SwiGLU(NamedTuple):
    """The weights of a block from d inputs to m outputs over h hidden features; also their gradients."""

    gate: Tensor  # G [..., h, d]
    up: Tensor  # U [..., h, d]
    down: Tensor  # D [..., m, h]


def read_swiglu(weights: SwiGLU, key: Tensor) -> Tensor:  # [..., n, d] -> [..., n, m]
    """Return f(K), what the block answers for each key. Costs 2 n h (2 d + m) FLOPs."""
    return (torch.nn.functional.silu(key @ weights.gate.mT) * (key @ weights.up.mT)) @ weights.down.mT


def swiglu_gradients(
    weights: SwiGLU,
    key: Tensor,  # [..., n, d]
    value: Tensor,  # [..., n, m]
    rate: Tensor,  # [..., n]
) -> tuple[Tensor, SwiGLU]:
    """Return f(K) and the gradients of ½ Σ_t r_t ‖f(k_t) − v_t‖² in closed form, differentiable themselves.

    A key at a rate of 0 is only read. Costs 4 n h (2 d + m) + 2 n h m FLOPs: a read, and what a backward pass without
    the gradient of its input costs.

    Args:
        weights: the block.
        key: n keys in rows.
        value: what the block should answer, in rows.
        rate: the weight of each key in the objective.
    """
    gate, up = key @ weights.gate.mT, key @ weights.up.mT  # a, b [..., n, h]
    openness = torch.sigmoid(gate)
    hidden = gate * openness * up
    answer = hidden @ weights.down.mT
    error = rate.unsqueeze(-1) * (answer - value)  # E [..., n, m]
    back = error @ weights.down  # E D [..., n, h]
    return answer, SwiGLU(
        gate=(back * up * openness * (1 + gate * (1 - openness))).mT @ key,
        up=(back * gate * openness).mT @ key,
        down=error.mT @ hidden,
    )
