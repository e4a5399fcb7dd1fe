"""Topics of texts, a few at a time, and one classifier for all of them: class-incremental text.

    x = log(1 + counts of words) / its length,   words hashed to n features

Every task brings groups of its own, and the classifier has to tell them from all others, whenever these came.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Batch
from .corpus import read_topics


class Topics:
    """A `Sequence` of newsgroups, or of Reuters' economic topics; downloaded, see corpus.py.

    Args:
        corpus: "20newsgroups", whose groups are of one size, or "reuters-r52", where half of the texts are of 2 of the
            52 topics.
        tasks: how many; the groups, in the order of a fixed permutation, are dealt to them evenly.
        features: of a text, n.
        width: of the two hidden layers.
        batch: posts a step.
    """

    metric = "accuracy"
    higher_is_better = True
    unit = "mlp"
    factors = (1 / 4, 1.0, 4.0, 16.0)
    steps = 200
    memory = ()

    def __init__(
        self, corpus: str = "20newsgroups", tasks: int = 5, features: int = 1024, width: int = 64, batch: int = 64
    ) -> None:
        older, newer = read_topics(corpus)
        groups = sorted({group for group, _ in older})
        if not 1 <= tasks <= len(groups):
            raise ValueError(f"{len(groups)} groups make 1 to {len(groups)} tasks, not {tasks}")
        self.corpus, self.tasks, self.groups = corpus, tasks, len(groups)
        self.features, self.width, self.batch = features, width, batch
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
        self.members = [set(part.tolist()) for part in order.tensor_split(tasks)]
        number = {group: index for index, group in enumerate(groups)}
        train = _by_task(older, number, self.members)
        test = _by_task(newer, number, self.members)
        self.train, self.test = ([self._read(posts) for posts in part] for part in (train, test))

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = [
            ("first", nn.Linear(self.features, self.width)), ("relu1", nn.ReLU()),
            ("second", nn.Linear(self.width, self.width)), ("relu2", nn.ReLU()),
            ("head", nn.Linear(self.width, self.groups)),
        ]  # fmt: skip
        return nn.Sequential(OrderedDict(layers))

    def batches(self, seed: int, task: int, steps: int, batch: int | None = None) -> Iterator[Batch]:
        rng, (texts, labels) = torch.Generator().manual_seed(1000 * seed + task), self.train[task]
        for _ in range(steps):
            drawn = torch.randint(len(labels), (batch or self.batch,), generator=rng)
            yield texts[drawn], labels[drawn]

    def loss(self, model: nn.Module, batch: Batch, task: int) -> Tensor:
        texts, labels = batch
        return F.cross_entropy(model(texts), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, task: int) -> dict[str, float]:
        texts, labels = self.test[task]
        logits = model(texts)
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        return {"loss": F.cross_entropy(logits, labels).item(), "score": accuracy}

    def describe(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus, "tasks": self.tasks,
            "features": self.features, "width": self.width, "batch": self.batch,
            "train_posts": [len(labels) for _, labels in self.train],
            "test_posts": [len(labels) for _, labels in self.test],
        }  # fmt: skip

    def _read(self, posts: list[tuple[int, bytes]]) -> Batch:
        """Texts [N, n] and groups [N]."""
        counts = torch.zeros(len(posts), self.features)
        for row, (_, text) in zip(counts, posts, strict=True):
            words = torch.tensor([crc32(word) % self.features for word in text.split()], dtype=torch.long)
            row += torch.bincount(words, minlength=self.features)
        return F.normalize(counts.log1p()), torch.tensor([label for label, _ in posts])


def _by_task(
    posts: list[tuple[bytes, bytes]], number: dict[bytes, int], members: list[set[int]]
) -> list[list[tuple[int, bytes]]]:
    numbered = [(number[group], text) for group, text in posts]
    return [[post for post in numbered if post[0] in own] for own in members]
