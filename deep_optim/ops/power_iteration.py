"""Power iteration: the largest eigenvalue of a Gram matrix that is never formed.

    v ← v KᵀK / ‖v KᵀK‖,   λ = ‖v KᵀK‖              `steps` times, from three starts; the largest λ counts

Two steps do, because the first start is the vector of the last call. The other two keep a warm start safe, which alone
is blind to a gradient whose directions are orthogonal to every one before it: the column of KᵀK with the largest
diagonal entry, which is exact at rank one, and a fixed vector of signs, which meets every direction. In exact
arithmetic the estimate never exceeds the eigenvalue and never falls below the Gram's largest diagonal entry.
"""

import math

import torch
from torch import Tensor


def largest_eigenvalue(
    key: Tensor,  # [..., n, d]
    vector: Tensor,  # [..., 1, d]
    *,
    steps: int = 2,
) -> tuple[Tensor, Tensor]:  # [..., 1, 1], [..., 1, d]
    """Return an estimate from below of the largest eigenvalue of KᵀK, and the vector to start from next time.

    Costs (12 steps + 4) n d FLOPs per matrix, memory-bound. A zero key gives zero and returns `vector` as it came.

    Args:
        key: n keys in rows; cheapest where d is the smaller dimension.
        vector: the vector of the last call; anything at first.
        steps: power iterations after the start.
    """
    diagonal = key.square().sum(-2, keepdim=True)  # [..., 1, d]
    index = diagonal.argmax(-1, keepdim=True).expand(*key.shape[:-1], 1)  # [..., n, 1]
    column = key.gather(-1, index).mT @ key  # [..., 1, d]
    signs = _signs(key.shape[-1], key).expand_as(vector)
    current = _unit(torch.cat([vector, column, signs], -2))  # [..., 3, d]
    for _ in range(steps):
        image = (current @ key.mT) @ key
        growth, current = torch.linalg.vector_norm(image, dim=-1, keepdim=True), _unit(image)  # [..., 3, 1]
    eigenvalue, best = growth.max(-2, keepdim=True)  # [..., 1, 1]
    leading = current.gather(-2, best.expand(*best.shape[:-1], key.shape[-1]))  # [..., 1, d]
    return eigenvalue, torch.where(eigenvalue == 0, vector, leading)


def _signs(size: int, like: Tensor) -> Tensor:
    """+1 and −1 without a pattern: the parity of the integer part of i² √2, the same on every device."""
    index = torch.arange(1, size + 1, dtype=like.dtype, device=like.device)
    return 1 - 2 * (index * index * math.sqrt(2)).floor().remainder(2)


def _unit(vector: Tensor) -> Tensor:
    tiny = torch.finfo(vector.dtype).tiny
    return vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp(min=tiny)
