"""A linear layer whose weight gradient is that of delta gradient descent, without another matrix product.

    forward     Y = X W⊤ + b
    backward    ∂X = Δ W,   ∂b = Δᵀ1,   ∂W = (Δ + rho · Y̅ / N)ᵀ X = G + rho · W Σ

Y̅ is Y without the bias, each row over the squared length of its x; then Y̅ᵀX / N = W Σ with Σ = mean x̂ x̂ᵀ, and W Σ rides
on the product that makes G. Δ itself goes on to the previous layer unchanged: only this layer's weights are drawn.
Nested Learning, arXiv:2512.24695, Eq. 57 with rho = 1. With SGD the two are one step; a momentum also remembers the
decay, and an output map rescales it, which the optimizer `DGD` keeps apart.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def dgd_linear(
    input: Tensor,  # X [..., n]
    weight: Tensor,  # W [m, n]
    bias: Tensor | None = None,  # [m]
    *,
    rho: float = 1.0,
) -> Tensor:  # [..., m]
    """Return `torch.nn.functional.linear` of the same arguments; its backward adds rho · W Σ to the weight's gradient.

    Σ is the mean over all rows of this call; rows of zero count as no row. Keeps the output for the backward pass, if
    nothing else does, and adds one pass over it. Under a loss scale, `rho` is to be scaled like the loss.

    Args:
        input: N rows over all leading dimensions.
        weight: m outputs, n inputs.
        bias: added to the output; it takes no part in the decay.
        rho: size of the decay; 0 is the ordinary layer.
    """
    return _DGDLinear.apply(input, weight, bias, rho)  # type: ignore[no-untyped-call]


class _DGDLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rho: float) -> Tensor:
        output = F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, output)
        ctx.rho = rho
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, bias, output = ctx.saved_tensors
        x, weight = x.to(grad.dtype), weight.to(grad.dtype)  # autocast's, of which autograd casts back
        rows, errors = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # [N, n], [N, m]
        grad_x = (grad @ weight) if ctx.needs_input_grad[0] else None
        grad_bias = errors.sum(0) if bias is not None and ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, grad_bias, None
        answers = output if bias is None else output - bias
        squares = rows.square().sum(-1, keepdim=True)  # [N, 1]
        share = torch.where(squares > 0, ctx.rho / squares, 0.0) / (squares > 0).sum().clamp(min=1)
        pulled = torch.addcmul(errors, share, answers.reshape(errors.shape))  # Δ + rho · Y̅ / N
        return grad_x, pulled.mT @ rows, grad_bias, None
