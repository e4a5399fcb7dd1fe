"""The Frobenius norm of a matrix of any size: what everything scale-free here is divided by."""

import torch
from torch import Tensor

_SAFE = (1e-14, 1e18)  # a float32 norm between these has lost no square to underflow or overflow


def frobenius_norm(matrix: Tensor) -> Tensor:  # [..., m, n] -> [..., 1, 1]
    """Return ‖M‖_F, at least the smallest normal number, so that it can divide; a NaN or an infinity shows.

    In float64, where the squares of no float32 number overflow or vanish. Costs one pass. A CPU would make a float64
    copy for it: there float32 is tried first, and kept where it was safe.
    """
    if matrix.is_cpu and matrix.dtype == torch.float32 and matrix.numel() and not torch.compiler.is_compiling():
        rows = torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)  # a sum of millions would lose four digits
        norm = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
        low, high = torch.aminmax(norm)
        if low > _SAFE[0] and high < _SAFE[1]:
            return norm
    exact = matrix.dtype if matrix.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    norm = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=exact).to(matrix.dtype)
    return norm.clamp(min=torch.finfo(matrix.dtype).tiny)
