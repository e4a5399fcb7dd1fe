"""Sequences of tasks for one model: orthogonal quadratics, permuted or split images, domains of text, languages.

Everything random comes from the seed of the run, but the sequence itself: which permutations, which subspaces and
which order are the same for all seeds and optimizers. A model is never told that the task has changed, except where
its outputs belong to tasks ("split").
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Batch
from .byte_corpus import ByteCorpus
from .corpus import read_fashion
from .languages import Languages
from .text import CONTEXT, ByteGPT
from .topics import Topics
from .vision import read_digits

SEQUENCES = ("orthogonal", "permuted", "split", "text", "classes", "topics", "languages")


class Sequence(Protocol):
    """Like `Task`, with the index of the task as one more argument."""

    tasks: int
    metric: str
    higher_is_better: bool  # of what `evaluate` returns under "score"
    unit: str  # the task of optimizers.py whose lowest learning rates the factors multiply
    factors: tuple[float, ...]
    steps: int  # customary, per task
    memory: tuple[str, ...]  # see Task

    def model(self, seed: int) -> nn.Module: ...
    def batches(self, seed: int, task: int, steps: int, batch: int | None = None) -> Iterator[Batch]: ...
    def loss(self, model: nn.Module, batch: Batch, task: int) -> Tensor: ...
    def evaluate(self, model: nn.Module, task: int) -> dict[str, float]: ...
    def describe(self) -> dict[str, Any]: ...


def make_sequence(name: str, **options: Any) -> Sequence:
    """The sequence called `name`; the options are those of its class."""
    if name == "orthogonal":
        return Orthogonal(**options)
    if name in ("permuted", "split", "classes"):
        return Images(name, **options)
    if name == "text":
        return Domains(**options)
    if name == "languages":
        return Languages(**options)
    if name == "topics":
        return Topics(**options)
    raise ValueError(f"no sequence named {name!r}; there are: {', '.join(SEQUENCES)}")


def _generator(seed: int, task: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + task)


class Orthogonal:
    """Regressions whose inputs lie in orthogonal subspaces, and so whose gradients are orthogonal matrices.

        L_i(W) = ½ E ‖(W − W*) x‖²,   x = S_i z,   z ~ N(0, diag(λ)),   S_iᵀ S_j = 0

    Nested Learning, arXiv:2512.24695, Eq. 45. One W solves every task, and gradient descent on one leaves the others
    untouched: whatever is forgotten is the optimizer's doing. The loss is exact, in units of its value at W = 0.
    """

    metric = "loss (1 before training)"
    higher_is_better = False
    unit = "regression"
    factors = (1 / 256, 1 / 64, 1 / 16, 1 / 4)
    steps = 300
    memory = ("map",)

    def __init__(self, tasks: int = 2, inputs: int = 32, outputs: int = 16, batch: int = 32) -> None:
        self.tasks, self.inputs, self.outputs, self.batch = tasks, inputs, outputs, batch
        rng = torch.Generator().manual_seed(0)
        rotation = torch.linalg.qr(torch.randn(inputs, inputs, generator=rng, dtype=torch.float64)).Q.float()
        self.spaces = rotation.split(inputs // tasks, dim=1)[:tasks]  # S_i [n, n / tasks]
        self.solution = torch.randn(outputs, inputs, generator=rng) / inputs**0.5
        self.spectrum = torch.logspace(0, -2, inputs // tasks)  # λ

    def model(self, seed: int) -> nn.Module:
        model = nn.ModuleDict({"map": nn.Linear(self.inputs, self.outputs, bias=False)})
        nn.init.zeros_(model["map"].weight)
        return model

    def batches(self, seed: int, task: int, steps: int, batch: int | None = None) -> Iterator[Batch]:
        rng = _generator(seed, task)
        for _ in range(steps):
            z = torch.randn(batch or self.batch, len(self.spectrum), generator=rng) * self.spectrum.sqrt()
            x = z @ self.spaces[task].T
            yield x, x @ self.solution.T

    def loss(self, model: nn.Module, batch: Batch, task: int) -> Tensor:
        x, y = batch
        return 0.5 * (model["map"](x) - y).square().sum(1).mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, task: int) -> dict[str, float]:
        root = self.spaces[task] * self.spectrum.sqrt()  # [n, r]
        left = ((model["map"].weight - self.solution) @ root).square().sum()
        score = (left / (self.solution @ root).square().sum()).item()
        return {"loss": score, "score": score}

    def describe(self) -> dict[str, Any]:
        return {"tasks": self.tasks, "shape": [self.outputs, self.inputs], "batch": self.batch}


class MLP(nn.Module):
    """Two hidden layers."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:  # [B, n] -> [B, 10]
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


class Images:
    """Permuted or split images, or classes after classes, and a small MLP.

    "permuted": every task has all classes and an order of the pixels of its own, the first the natural one.
    "split": every task has two classes of its own, and only their two outputs count in its loss and accuracy.
    "classes": the same, and all ten outputs count: a class must be told from those of all other tasks.

    Args:
        kind: "permuted", "split" or "classes".
        images: "fashion" (averaged to 14 x 14; downloaded, see corpus.py) or "digits" (8 x 8, scikit-learn's).
        tasks: how many; at most 5 but for "permuted".
        width: of the hidden layers.
        batch: images a step.
    """

    metric = "accuracy"
    higher_is_better = True
    unit = "mlp"
    factors = (1 / 4, 1.0, 4.0, 16.0)
    memory = ()

    def __init__(self, kind: str, images: str = "fashion", tasks: int = 5, width: int = 64, batch: int = 64) -> None:
        if kind != "permuted" and tasks > 5:
            raise ValueError(f"ten classes make 5 tasks of two, not {tasks}")
        self.kind, self.images, self.tasks, self.width, self.batch = kind, images, tasks, width, batch
        self.steps = 400 if kind == "permuted" else 200
        train, labels, held_out, held_out_labels = read_fashion() if images == "fashion" else read_digits()
        pixels, self.labels = _flat(train), labels.long()
        mean, deviation = pixels.mean(), pixels.std()
        self.train = (pixels - mean) / deviation
        test, test_labels = (_flat(held_out) - mean) / deviation, held_out_labels.long()
        rng = torch.Generator().manual_seed(0)
        size = self.train.shape[1]
        self.orders = [torch.arange(size), *(torch.randperm(size, generator=rng) for _ in range(tasks - 1))]
        self.members = [self._of(self.labels, task).nonzero()[:, 0] for task in range(tasks)]
        chosen = [self._of(test_labels, task).nonzero()[:1000, 0] for task in range(tasks)]
        self.test = [(self._seen(test[index], task), test_labels[index]) for task, index in enumerate(chosen)]

    def _of(self, labels: Tensor, task: int) -> Tensor:
        return torch.ones_like(labels) if self.kind == "permuted" else labels // 2 == task

    def _seen(self, pixels: Tensor, task: int) -> Tensor:
        return pixels[:, self.orders[task]] if self.kind == "permuted" else pixels

    def _logits(self, model: nn.Module, pixels: Tensor, task: int) -> Tensor:
        logits = model(pixels)
        if self.kind != "split":
            return logits
        others = torch.arange(10) // 2 != task
        return logits.masked_fill(others, -torch.inf)

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return MLP(self.train.shape[1], self.width)

    def batches(self, seed: int, task: int, steps: int, batch: int | None = None) -> Iterator[Batch]:
        rng, members = _generator(seed, task), self.members[task]
        for _ in range(steps):
            drawn = members[torch.randint(len(members), (batch or self.batch,), generator=rng)]
            yield self._seen(self.train[drawn], task), self.labels[drawn]

    def loss(self, model: nn.Module, batch: Batch, task: int) -> Tensor:
        pixels, labels = batch
        return F.cross_entropy(self._logits(model, pixels, task), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, task: int) -> dict[str, float]:
        pixels, labels = self.test[task]
        logits = self._logits(model, pixels, task)
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        return {"loss": F.cross_entropy(logits, labels).item(), "score": accuracy}

    def describe(self) -> dict[str, Any]:
        return {
            "images": self.images, "tasks": self.tasks, "width": self.width, "batch": self.batch,
            "train_images": len(self.labels), "test_images": [len(labels) for _, labels in self.test],
        }  # fmt: skip


def _flat(images: Tensor) -> Tensor:
    """[N, S, S] bytes to [N, n] floats, Fashion-MNIST's 28 x 28 averaged to 14 x 14."""
    pixels = images.float()[:, None]
    return (F.avg_pool2d(pixels, 2) if pixels.shape[-1] == 28 else pixels).flatten(1)


class Domains:
    """Next-byte prediction on one text after another with a small GPT.

    Args:
        domains: names of corpora (see corpus.py) or paths of files, in order.
        width, depth: size of the model.
        batch: windows of 64 bytes a step.
    """

    metric = "loss (nats per byte)"
    higher_is_better = False
    unit = "text"
    factors = (1 / 4, 1.0, 4.0, 16.0)
    steps = 200
    memory = ()

    def __init__(
        self, domains: str = "stdlib,imdb,newsgroups", width: int = 64, depth: int = 2, batch: int = 16
    ) -> None:
        self.domains, self.options, self.batch = domains.split(","), dict(width=width, depth=depth), batch
        self.tasks = len(self.domains)
        self.texts = [ByteCorpus.named(name) for name in self.domains]
        self.test = [text.validation(128, CONTEXT) for text in self.texts]

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return ByteGPT(**self.options)

    def batches(self, seed: int, task: int, steps: int, batch: int | None = None) -> Iterator[Batch]:
        rng = _generator(seed, task)
        for _ in range(steps):
            yield self.texts[task].draw(rng, batch or self.batch, CONTEXT)

    def loss(self, model: nn.Module, batch: Batch, task: int) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, task: int) -> dict[str, float]:
        loss = self.loss(model, self.test[task], task).item()
        return {"loss": loss, "score": loss}

    def describe(self) -> dict[str, Any]:
        return {
            "domains": self.domains, "tasks": self.tasks, "train_bytes": [len(text.train) for text in self.texts],
            "batch": [self.batch, CONTEXT], **self.options,
        }  # fmt: skip
