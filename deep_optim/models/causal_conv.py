"""A causal depth-wise convolution that can be continued: y_t = Σ_i w_i ⊙ x_{t−i}, zeros before the first token."""

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [D, width], the last column is the current token's
    tail: Tensor,  # [B, width − 1, D], the tokens before; zeros at the start of a sequence
) -> tuple[Tensor, Tensor]:
    """Return y [B, T, D] and the tail for the tokens that follow."""
    padded = torch.cat([tail, x], 1)
    tail = padded[:, x.shape[1] :].clone()  # a view would keep the whole sequence alive
    if not x.shape[1]:
        return x, tail
    return F.conv1d(padded.mT, weight[:, None], groups=len(weight)).mT, tail
