"""What the sequence models are measured on: small synthetic problems with a known answer at every position asked for.

A problem is the small object described by `Problem`; `make_problem` finds it by name.
"""

from typing import Protocol

import torch
from torch import Tensor

IGNORE = -100  # a position that asks for nothing, as in torch's cross-entropy


class Problem(Protocol):
    """Strings of symbols, and what is to be answered where. Everything random comes from the generator."""

    vocab_size: int  # symbols of strings and answers
    train: tuple[int, int]  # shortest and longest size of a problem in training; what a size is, the problem says
    tests: dict[str, tuple[int, int]]  # the same in the tests, by name
    whole: bool  # whether a string counts only where all of its answers are right

    def draw(self, rng: torch.Generator, batch: int, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Return strings [B, T] and answers [B, T], `IGNORE` where none is asked for."""
        ...


def make_problem(name: str) -> Problem:
    """The problem called `name`."""
    from . import languages, mad, recall, translation

    tables = {**languages.PROBLEMS, **recall.PROBLEMS, **mad.PROBLEMS, **translation.PROBLEMS}
    if name not in tables:
        raise ValueError(f"no problem named {name!r}; there are: {', '.join(tables)}")
    return tables[name]()


def score(answers: Tensor, expected: Tensor, whole: bool) -> tuple[int, int]:
    """How many of how many are right: strings with all their answers right, or single answers."""
    asked = expected != IGNORE
    right = (answers == expected) | ~asked
    if whole:
        return int(right.all(-1).sum()), len(expected)
    return int((right & asked).sum()), int(asked.sum())
