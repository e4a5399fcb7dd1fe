"""How a parameter is read as matrices, and which parameters are."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def has_memory(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether a parameter of this group is stepped by its memory rather than by AdamW."""
    return group["rule"] == "memory" and (group["output"] == "identity" or param.ndim >= 2)


def matrix_shape(param: Tensor, group: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (split, m, n): a parameter [rows, rest] as `split` blocks of rows. A vector is one row."""
    if param.ndim < 2:
        return 1, 1, param.numel()
    rows, split = param.shape[0], group["split"]
    return split, rows // split, param.numel() // max(rows, 1)
