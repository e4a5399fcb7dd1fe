"""What a size of a model may be, and what its layers take."""

from numbers import Integral

from torch import Tensor


def check_sizes(**sizes: object) -> None:
    """Raise ValueError unless every one is a whole number of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"Invalid {name}: {size!r}, expected a whole number of at least 1")


def check_tokens(x: Tensor, dim: int) -> None:
    """Raise ValueError unless x is [B, T, dim]."""
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"expected x of shape [B, T, {dim}], got {list(x.shape)}")
