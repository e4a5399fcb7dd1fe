"""Synthetic languages one after another, with the same grammar and other letters.

    p(next = s_i(x, y) | … x, y) = p_i,   p = (0.5, 0.25, 0.15, 0.1)          s: distinct letters, drawn for every x, y
    language k is language 0 with its letters permuted: π_k(w) for w in language 0

What follows depends on the last two letters, whatever they are; every context leaves the same entropy H(p), so that the
lowest loss is known exactly. All languages use the same letters: what one says of a context, the next contradicts.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deep_optim import models

from . import Batch

CHUNKS = (16, 8)  # of strings of 64 letters
MODELS = {
    "transformer": lambda v, d, n: models.Transformer(v, d, n),
    "hope-attention": lambda v, d, n: models.HopeAttention(v, d, n, chunk_sizes=CHUNKS),
    "hope": lambda v, d, n: models.Hope(v, d, n, chunk_sizes=CHUNKS, projection_chunk_size=16),
}
PROBABILITIES = (0.5, 0.25, 0.15, 0.1)
FLOOR = -sum(p * math.log(p) for p in PROBABILITIES)  # H(p)
IGNORE = -100
TEST_STRINGS, TEST_BATCH = 128, 32


class Languages:
    """A `Sequence` whose tasks are languages; the score is the loss above the lowest.

    Args:
        model: "transformer", "hope-attention" or "hope".
        tasks: how many languages.
        letters: of the alphabet that they share.
        length: of a string.
        batch: strings a step.
        width, depth: of the model.
    """

    metric = "loss above the lowest (nats per letter)"
    higher_is_better = False
    unit = "text"
    factors = (1 / 4, 1.0, 4.0, 16.0)
    steps = 300
    memory = ()

    def __init__(
        self,
        model: str = "transformer",
        tasks: int = 2,
        letters: int = 16,
        length: int = 64,
        batch: int = 16,
        width: int = 32,
        depth: int = 2,
    ) -> None:
        if model not in MODELS:
            raise ValueError(f"no model named {model!r}; there are: {', '.join(MODELS)}")
        self.kind, self.tasks, self.letters, self.length, self.batch = model, tasks, letters, length, batch
        self.width, self.depth = width, depth
        rng = torch.Generator().manual_seed(0)
        follows = torch.rand(letters, letters, letters, generator=rng).argsort(-1)  # s [x, y, i]
        self.follows = follows[..., : len(PROBABILITIES)]
        self.alphabets = [torch.arange(letters), *(torch.randperm(letters, generator=rng) for _ in range(tasks - 1))]
        self.test = [self._strings(torch.Generator().manual_seed(10**6), k, TEST_STRINGS) for k in range(tasks)]

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return MODELS[self.kind](self.letters, self.width, self.depth)

    def batches(self, seed: int, task: int, steps: int, batch: int | None = None) -> Iterator[Batch]:
        rng = torch.Generator().manual_seed(1000 * seed + task)
        for _ in range(steps):
            yield self._strings(rng, task, batch or self.batch)

    def loss(self, model: nn.Module, batch: Batch, task: int) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, task: int) -> dict[str, float]:
        pieces = zip(*(part.split(TEST_BATCH) for part in self.test[task]), strict=True)
        loss = torch.stack([self.loss(model, piece, task) for piece in pieces]).mean().item()
        return {"loss": loss, "score": loss - FLOOR}

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.kind, "tasks": self.tasks, "letters": self.letters, "batch": [self.batch, self.length],
            "width": self.width, "depth": self.depth, "floor": FLOOR,
        }  # fmt: skip

    def _strings(self, rng: torch.Generator, task: int, count: int) -> Batch:
        """Letters [B, T] and the next of each; two letters make a context, so that the first asks for nothing."""
        string = torch.randint(self.letters, (count, 2), generator=rng)
        choices = torch.multinomial(
            torch.tensor(PROBABILITIES).expand(count, -1), self.length - 1, replacement=True, generator=rng
        )
        letters = list(string.unbind(1))
        for choice in choices.unbind(1):
            letters.append(self.follows[letters[-2], letters[-1], choice])
        string = self.alphabets[task][torch.stack(letters, 1)]
        tokens, targets = string[:, :-1], string[:, 1:].clone()
        targets[:, 0] = IGNORE
        return tokens, targets
