"""An MLP memory with a linear shortcut: read it, and take one gradient step of its L2 regression.

    memory      m(k) = M k + W₁ s(W₂ k),      s(z) = z / √(1 + z²)
    objective   ½ ‖m(K) − V‖²                 keys in the rows of K, one answer in each column of m(K)
    H  = s(K W₂ᵀ)                             the hidden features
    E  = M Kᵀ + W₁ Hᵀ − V                     the error
    M  ← decay · M  − rate₀ · E K
    W₁ ← decay · W₁ − rate₁ · E H
    W₂ ← W₂ − rate₂ · ((EᵀW₁) ⊙ s′)ᵀ K,       s′ = (1 − H²)^{3/2}

Nested Learning, arXiv:2512.24695, Eq. 50 under the L2 objective of Eq. 49; the paper names an MLP memory and leaves its
architecture open. With W₁ = 0 and rate₁ = 0 it is the delta rule. What `M` and `W₁` see is a linear regression on the
features [k, s(W₂ k)], so the delta rule's association and its stability carry over; only `W₂` needs the chain rule.
The algebraic sigmoid s costs a sixth of a tanh on a CPU, and its derivative comes from its value. Every leading
dimension is a batch dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class MLPMemory(NamedTuple):
    """The weights of a memory from d inputs to m outputs over h hidden features; also their gradients."""

    linear: Tensor  # M  [..., m, d]
    w1: Tensor  # W₁ [..., m, h]
    w2: Tensor  # W₂ [..., h, d]


SATURATED = 1e9  # s is 1 to the last digit long before, and z² still fits a float32

Rate = float | Tensor  # a tensor broadcasts over the stack, [..., 1, 1]


def hidden_features(w2: Tensor, key: Tensor) -> Tensor:  # [..., h, d], [..., n, d] -> [..., n, h]
    """Return H = s(K W₂ᵀ), entries in (−1, 1)."""
    return sigmoid(key @ w2.mT)


def sigmoid(z: Tensor) -> Tensor:
    """Return s(z) = z / √(1 + z²) of every entry."""
    z = z.clamp(-SATURATED, SATURATED)
    return z * torch.rsqrt(1 + z * z)


def read_mlp_memory(memory: MLPMemory, key: Tensor) -> Tensor:  # [..., n, d] -> [..., m, n]
    """Return m(K), what the memory answers for each key. Costs 2 n (m d + m h + h d) FLOPs."""
    return memory.linear @ key.mT + memory.w1 @ hidden_features(memory.w2, key).mT


def mlp_memory_gradients(
    memory: MLPMemory,
    key: Tensor,  # [..., n, d]
    value: Tensor | None,  # [..., m, n], or [..., 1, 1]
) -> MLPMemory:
    """Return the gradients of ½ ‖m(K) − V‖² in closed form, differentiable themselves.

    A value of one number per memory stands for that multiple of the identity, and None for zero; then m = n, or V = 0,
    and the m × n error is never formed: with p = d + h, this costs 2 n p (p + h) + 2 m p (p + h) FLOPs and a little,
    where a full value costs 4 m n p and a little.

    Args:
        memory: the weights.
        key: n keys in rows.
        value: what the memory should answer, one column per key.
    """
    hidden = hidden_features(memory.w2, key)  # [..., n, h]
    features = torch.cat([key, hidden], -1)  # Φ [..., n, p]
    weights = torch.cat([memory.linear, memory.w1], -1)  # W = [M | W₁] [..., m, p]
    if value is None or value.shape[-2:] == (1, 1):
        gradient = weights @ (features.mT @ features)  # W ΦᵀΦ
        answer = features @ (weights.mT @ memory.w1)  # (W Φᵀ)ᵀ W₁
        if value is not None:
            gradient = gradient - value * features
            answer = answer - value * memory.w1
    else:
        error = weights @ features.mT - value  # E [..., m, n]
        gradient, answer = error @ features, error.mT @ memory.w1
    linear, w1 = gradient.split([key.shape[-1], hidden.shape[-1]], -1)
    slope = (1 - hidden * hidden) ** 1.5  # s′
    return MLPMemory(linear, w1, (answer * slope).mT @ key)


def mlp_memory_step(
    memory: MLPMemory,
    key: Tensor,  # [..., n, d]
    value: Tensor | None,  # [..., m, n], or [..., 1, 1]
    *,
    rate: tuple[Rate, Rate, Rate],
    decay: Rate = 1.0,
) -> MLPMemory:
    """Return the memory after one step; see the module docstring for the equation, and `mlp_memory_gradients`.

    M and W₁ are stable while rate₀ and rate₁ times the largest eigenvalue of ΦᵀΦ, Φ = [K | H], stay below 1 + `decay`.

    Args:
        memory: the weights.
        key: n keys in rows.
        value: what the memory should answer.
        rate: step sizes of M, W₁ and W₂.
        decay: how much of M and W₁ survives the step; W₂ is the basis they are expressed in and does not decay.
    """
    gradients = mlp_memory_gradients(memory, key, value)
    return MLPMemory(
        decay * memory.linear - rate[0] * gradients.linear,
        decay * memory.w1 - rate[1] * gradients.w1,
        memory.w2 - rate[2] * gradients.w2,
    )
