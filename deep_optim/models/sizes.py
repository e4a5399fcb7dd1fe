"""What a size of a model may be."""

from numbers import Integral


def check_sizes(**sizes: object) -> None:
    """Raise ValueError unless every one is a whole number of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"Invalid {name}: {size!r}, expected a whole number of at least 1")
