"""The product with a Gram, W KᵀK, by the cheaper of two ways.

    (W Kᵀ) K        4 N m n FLOPs            one answer per key, and each back along its key
    W (KᵀK)         2 n² (m + N) FLOPs       the Gram first

Nested Learning, arXiv:2512.24695, where it is what a step of L2 regression erases (Eq. 49) and what delta gradient
descent takes from the weights (Eq. 57).
"""

from torch import Tensor


def times_gram(matrix: Tensor, key: Tensor) -> Tensor:  # [..., m, n], [..., N, n] -> [..., m, n]
    """Return W KᵀK. Few keys are cheaper one by one, many as their Gram; both ways need no more than one temporary.

    Args:
        matrix: any stack of matrices.
        key: N keys in rows.
    """
    (m, n), keys = matrix.shape[-2:], key.shape[-2]
    if n * (m + keys) < 2 * keys * m:
        return matrix @ (key.mT @ key)
    return (matrix @ key.mT) @ key
