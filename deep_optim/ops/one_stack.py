"""Any leading dimensions as one, for `torch.bmm`: for a stack of one in bfloat16, `@` copies what is transposed."""

import math

from torch import Tensor


def one_stack(matrix: Tensor) -> Tensor:  # [..., m, n] -> [B, m, n]
    """Return the matrices with one leading dimension, also where they are empty; a view if there can be one."""
    return matrix.reshape(math.prod(matrix.shape[:-2]), *matrix.shape[-2:])
