"""The Frobenius norm of a matrix of any size: what everything scale-free here is divided by."""

import torch
from torch import Tensor


def frobenius_norm(matrix: Tensor) -> Tensor:  # [..., m, n] -> [..., 1, 1]
    """Return ‖M‖_F, at least the smallest normal number, so that it can divide; a NaN or an infinity shows.

    In float64, where the squares of no float32 number overflow or vanish. Costs one pass.
    """
    exact = matrix.dtype if matrix.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    norm = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=exact).to(matrix.dtype)
    return norm.clamp(min=torch.finfo(matrix.dtype).tiny)
