"""What a deep memory knows about the gradients at hand: measured beside the training, never inside a step.

    loss      ‖[M | W₁] Φᵀ − c I‖² / ‖c I‖²           Φ: the features of the gradient's keys; 1 for an empty memory
    explained (1 − loss) · r / min(r, p + h)          of what p + h features can answer for r keys at all

The target c is the one at which one inner step of [M | W₁] writes what `DMGD` writes. Nothing of size r × r is formed:
‖W Φᵀ − c I‖² = ⟨WᵀW, ΦᵀΦ⟩ − 2 c ⟨W, Φ⟩ + c² r.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from deep_optim.ops.deep_momentum import hidden_part
from deep_optim.ops.frobenius import frobenius_norm
from deep_optim.ops.mlp_memory import MLPMemory
from deep_optim.ops.two_sided_delta import gram_bound


class MemoryReport(NamedTuple):
    """One parameter's memory at one step; plain numbers.

    Args:
        loss_before: of the memory as it is, on the keys of the gradient at hand; 1 is an empty memory's.
        loss_after: the same after the step that this gradient would make.
        explained: after the step, the share of what the features could answer at all; at most 1.
        linear_norm: Frobenius norm of M before the step, of W₁ and of W₂ in the next two.
        w1_norm: of W₁.
        w2_norm: of W₂.
        gradient_norm: of the gradient.
        cosine: between the step and the one that was asked for, down the gradient or up under `maximize`.
    """

    loss_before: float
    loss_after: float
    explained: float
    linear_norm: float
    w1_norm: float
    w2_norm: float
    gradient_norm: float
    cosine: float


def report(
    before: MLPMemory,
    after: MLPMemory,
    written: Tensor,  # U [B, m, n]
    grad: Tensor,  # [B, m, n]
    direction: Tensor,  # [B, m, n]
    inner_lr: float,
) -> MemoryReport:
    """Return the numbers for one parameter, whose blocks count together."""
    losses = torch.stack([inner_loss(memory, written, inner_lr).mean() for memory in (before, after)])
    p, r = sorted(written.shape[-2:])
    features = p + before.w2.shape[-2 if written.shape[-2] >= written.shape[-1] else -1]
    explained = (1 - losses[1]) * r / min(r, features)
    norms = [frobenius_norm(tensor.flatten(0, 1)).squeeze() for tensor in (*before, grad)]
    sizes = [torch.where(norm > torch.finfo(norm.dtype).tiny, norm, 0.0) for norm in norms]  # its floor stands for 0
    units = [tensor / frobenius_norm(tensor.flatten(0, 1)) for tensor in (direction, grad)]
    return MemoryReport(*torch.stack([*losses, explained, *sizes, (units[0] * units[1]).sum()]).tolist())


def inner_loss(memory: MLPMemory, written: Tensor, inner_lr: float) -> Tensor:  # [B, m, n] -> [B]
    """Return ‖[M | W₁] Φᵀ − c I‖² / ‖c I‖² on the keys of U; 1 if U is zero and has no keys."""
    wide = written.shape[-2] < written.shape[-1]
    dim = -2 if wide else -1
    norm = frobenius_norm(written)
    features = torch.cat([written, norm * hidden_part(memory.w2, written / norm)], dim)
    weights = torch.cat([memory.linear, memory.w1], dim)
    if wide:
        features, weights = features.mT, weights.mT  # [B, r, p + h]
    norm = frobenius_norm(features)
    features = features / norm
    bound = gram_bound(features)
    features = features * bound.rsqrt()  # Φ, with ΦᵀΦ ≤ I
    answers = weights * (inner_lr / (norm * bound.sqrt()))  # W / c
    square = ((answers.mT @ answers) * (features.mT @ features)).sum((-2, -1))
    loss = (square - 2 * (answers * features).sum((-2, -1))) / features.shape[-2] + 1
    return torch.where(bound.flatten() == 0, 1.0, loss)
