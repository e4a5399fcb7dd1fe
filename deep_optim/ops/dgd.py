"""Delta gradient descent: the exact proximal step of an L2 regression on one key.

    W′ = argmin ½ ‖W′ x − u‖² + 1/(2 η) ‖W′ − W‖²        u = −∂L/∂y at y = W x
    W′ = W − η′ (W x + ∂L/∂y) xᵀ,   η′ = η / (1 + η ‖x‖²)

Gradient descent is the same with the dot product −⟨W′ x, u⟩ in place of the square. It is a normalised step: stable for
every η, since η′ ‖x‖² < 1.
Nested Learning, arXiv:2512.24695, Eq. 56-57. Printed, η′ is η / (1 + η), which holds for ‖x‖ = 1; its derivation in
appendix C has η where 1/η belongs and the gradient with the opposite sign.
"""

import torch
from torch import Tensor


def dgd_step(
    weight: Tensor,  # W [..., m, n]
    key: Tensor,  # x [..., n]
    target_grad: Tensor,  # ∂L/∂y [..., m]
    *,
    eta: float | Tensor = 1.0,
) -> Tensor:  # [..., m, n]
    """Return the weights after one step; see the module docstring for the equation. Costs 4 m n FLOPs.

    Differentiable in all of its tensors. For a key of zero nothing changes.

    Args:
        weight: m outputs, n inputs, of any number of layers.
        key: the input of each.
        target_grad: the gradient of the loss with respect to each output.
        eta: step size, at least 0; a tensor broadcasts over the layers, [...].
    """
    rate = eta / (1 + eta * key.square().sum(-1))  # η′ [...]
    error = (weight @ key[..., None]).squeeze(-1) + target_grad  # [..., m]
    return weight - torch.as_tensor(rate)[..., None, None] * error[..., None] * key[..., None, :]
