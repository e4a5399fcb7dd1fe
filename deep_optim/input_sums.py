"""What the inputs of one layer come to between two steps: rows while they are few, then the sum of their Grams.

    N ≤ n       X̂ [N, n]                  the rows, from which follow the keys   K = X̂ / ‖X̂‖_F
    N > n       S = Σ X̂ᵀX̂ [n, n]          their Gram, from which follows         Σ = S / tr S = KᵀK

Whichever is smaller. Grams add, over micro-batches, over the uses of a tied weight and over ranks, and tr S is the
number of tokens: S / tr S is the mean over all of them.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


class InputKeys(NamedTuple):
    """One weight's keys K [G, N, n] or their Gram Σ [G, n, n], for the G groups of a convolution; the other is None."""

    rows: Tensor | None
    gram: Tensor | None


class UnitRows:
    """Unit rows [G, N, n] of one input, and their Gram once somebody has asked for it."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._gram: Tensor | None = None

    def gram(self) -> Tensor:
        if self._gram is None:
            with full_precision(self.rows.device.type):  # whoever asks may be in autocast
                self._gram = gram_of(self.rows)
        return self._gram


class InputSum:
    """The inputs of one layer: rows while they are no more than n, then the sum of their Grams.

    Tensors are replaced, never written, because layers share them.
    """

    def __init__(self, gram: Tensor | None = None) -> None:
        self.rows: list[UnitRows] = []
        self.total_gram = gram
        self._keys: InputKeys | None = None

    @property
    def empty(self) -> bool:
        return not self.rows and self.total_gram is None

    def add(self, rows: UnitRows) -> None:
        self._keys = None
        self.rows.append(rows)
        if self.total_gram is not None or sum(part.rows.shape[-2] for part in self.rows) > rows.rows.shape[-1]:
            self._fold()

    def add_gram(self, gram: Tensor) -> None:
        self._keys = None
        self.total_gram = gram if self.total_gram is None else self.total_gram + gram

    def merge(self, other: "InputSum") -> None:
        if other.total_gram is not None:
            self.add_gram(other.total_gram)
            self._fold()
        for rows in other.rows:
            self.add(rows)

    def _fold(self) -> None:
        for rows in self.rows:
            self.add_gram(rows.gram())
        self.rows = []

    def total(self) -> Tensor | None:
        """The sum of Grams [G, n, n], which others may hold too; None if there was no input."""
        self._fold()
        return self.total_gram

    def keys(self) -> InputKeys:
        if self._keys is None:
            if self.total_gram is None:
                rows = torch.cat([part.rows for part in self.rows], -2)
                self._keys = InputKeys(rows / torch.linalg.matrix_norm(rows, keepdim=True).clamp(min=1), None)
            else:  # the trace is the number of tokens; 1 instead of none
                trace = self.total_gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
                self._keys = InputKeys(None, self.total_gram / trace.clamp(min=1))
        return self._keys


def gram_of(rows: Tensor) -> Tensor:  # [G, N, n] -> [G, n, n]
    return rows.mT @ rows


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Switch autocast off where it is on: entering its context costs as much as a small Gram."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def gram_size(layer: Any) -> tuple[int, int, int]:
    """Return (G, n, n) of a layer's Gram."""
    n = math.prod(layer.weight.shape[1:])
    return getattr(layer, "groups", 1), n, n


def gram_dtype(layer: Any) -> torch.dtype:
    return torch.promote_types(layer.weight.dtype, torch.float32)
