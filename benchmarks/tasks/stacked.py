"""Small networks for a whole stack of seeds at once, as functions of their weights: a training run has a derivative.

Every weight is [B, out, in] for B seeds, and every loss [B]. All hidden matrices have a short side of `WIDTH`, so that
one set of hidden weights W₂ [h, WIDTH] fits the memories of all of them. What a seed draws does not depend on the
others in its stack. All is float64: the memory's products are then exact to the same digits on every machine.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .byte_corpus import ByteCorpus
from .vision import Vision

WIDTH = 32
HELD_OUT = 256  # examples, or windows of text, that no training batch holds
CONTEXT = 24

Weights = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
Draw = Callable[[torch.Generator], Batch]


class StackedTask(Protocol):
    """Everything random comes from the seeds."""

    family: str  # tasks of one family have the same network, up to its depth
    hidden: tuple[str, ...]  # the weights that have a memory; the rest is stepped by AdamW

    def weights(self, seeds: list[int]) -> Weights: ...
    def batches(self, seeds: list[int], steps: int) -> Iterator[Batch]: ...
    def held_out(self, seeds: list[int]) -> Batch: ...
    def loss(self, weights: Weights, batch: Batch) -> Tensor: ...


class Stacked:
    """What the tasks share: residual blocks of two matrices, weights and batches drawn seed by seed.

    Args:
        shapes: the weights beside the blocks'.
        rest: those of them that have no memory.
        blocks: residual blocks.
        network: the seed of one network that all runs start from; None draws one for every seed.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, int]], rest: tuple[str, ...], blocks: int, network: int | None
    ) -> None:
        self.blocks, self.network = blocks, network
        trunk = {f"{name}{i}": shape for i in range(blocks) for name, shape in _BLOCK.items()}
        self.shapes = shapes | trunk
        self.hidden = tuple(name for name in self.shapes if name not in rest)

    def weights(self, seeds: list[int]) -> Weights:
        """Normal entries of variance 1 / inputs."""
        drawn = []
        for seed in seeds:
            rng = _stream(seed if self.network is None else self.network, "weights")
            drawn.append([_normal(shape, rng) / shape[1] ** 0.5 for shape in self.shapes.values()])
        return dict(zip(self.shapes, map(torch.stack, zip(*drawn, strict=True)), strict=True))

    def batches(self, seeds: list[int], steps: int) -> Iterator[Batch]:
        draws = [(self.source(seed), _stream(seed, "batches")) for seed in seeds]
        for _ in range(steps):
            yield _stack([draw(rng) for draw, rng in draws])

    def source(self, seed: int) -> Draw:
        """Return what draws one training batch of this seed's problem."""
        raise NotImplementedError

    def trunk(self, weights: Weights, x: Tensor) -> Tensor:  # [B, N, WIDTH]
        for i in range(self.blocks):
            x = x + F.gelu(_norm(x) @ weights[f"up{i}"].mT) @ weights[f"down{i}"].mT
        return _norm(x)


class Teacher(Stacked):
    """Regression of what a random network with one hidden layer answers; every seed has its own.

    Args:
        activation: the teacher's non-linearity, "tanh", "relu" or "sin".
        blocks, network: of the student, as in `Stacked`.
    """

    family, batch, outputs = "teacher", 64, 8

    def __init__(self, activation: str = "tanh", blocks: int = 2, network: int | None = None) -> None:
        super().__init__({"head": (self.outputs, WIDTH)}, rest=("head",), blocks=blocks, network=network)
        self.activation = {"tanh": torch.tanh, "relu": F.relu, "sin": torch.sin}[activation]

    def source(self, seed: int) -> Draw:
        rng = _stream(seed, "problem")
        first, second = 2 * _normal((WIDTH, WIDTH), rng) / WIDTH**0.5, _normal((WIDTH, self.outputs), rng)

        def raw(x: Tensor) -> Tensor:
            return self.activation(x @ first) @ second

        probe = raw(_normal((4096, WIDTH), rng))
        mean, deviation = probe.mean(0), probe.std(0)

        def draw(rng: torch.Generator, count: int = self.batch) -> Batch:
            x = _normal((count, WIDTH), rng)
            return x, (raw(x) - mean) / deviation

        return draw

    def held_out(self, seeds: list[int]) -> Batch:
        return _stack([self.source(seed)(_stream(seed, "held out"), HELD_OUT) for seed in seeds])

    def loss(self, weights: Weights, batch: Batch) -> Tensor:
        x, target = batch
        return (self.trunk(weights, x) @ weights["head"].mT - target).square().mean((1, 2))


class Images(Stacked):
    """Classify images of 8 x 8 pixels, which a hidden matrix reads.

    Args:
        images: "digits" or "fashion", as in vision.py; larger ones are averaged down.
        blocks, network: as in `Stacked`.
    """

    family, batch, side = "images", 64, 8

    def __init__(self, images: str = "digits", blocks: int = 2, network: int | None = None) -> None:
        task = Vision(images=images)
        pixels, labels = task.train
        self.train = (self._small(task.normalize(pixels)), labels)
        self.validation = (self._small(task.validation[0][:HELD_OUT]), task.validation[1][:HELD_OUT])
        shapes = {"pixels": (WIDTH, self.side**2), "head": (10, WIDTH)}
        super().__init__(shapes, rest=("head",), blocks=blocks, network=network)

    def _small(self, images: Tensor) -> Tensor:  # [N, S, S] -> [N, 64]
        return F.adaptive_avg_pool2d(images[:, None], self.side).flatten(1)

    def source(self, seed: int) -> Draw:
        images, labels = self.train

        def draw(rng: torch.Generator) -> Batch:
            drawn = torch.randint(len(labels), (self.batch,), generator=rng)
            return images[drawn].double(), labels[drawn]

        return draw

    def held_out(self, seeds: list[int]) -> Batch:
        images, labels = self.validation
        return _stack([(images.double(), labels)] * len(seeds))

    def loss(self, weights: Weights, batch: Batch) -> Tensor:
        x, labels = batch
        logits = self.trunk(weights, x @ weights["pixels"].mT) @ weights["head"].mT
        return _cross_entropy(logits, labels)


class Bytes(Stacked):
    """Next-byte prediction with one block of attention of two heads before the residual blocks.

    Args:
        corpus: as in corpus.py.
        data: a text file of your own instead.
        blocks, network: as in `Stacked`.
    """

    family, windows, heads = "bytes", 4, 2

    def __init__(
        self, corpus: str = "stdlib", data: str | None = None, blocks: int = 1, network: int | None = None
    ) -> None:
        self.text = ByteCorpus(corpus, data)
        attention = {name: (2 * WIDTH, WIDTH) for name in ("query", "key", "value")} | {"out": (WIDTH, 2 * WIDTH)}
        rest = {"embedding": (256, WIDTH), "position": (CONTEXT, WIDTH), "head": (256, WIDTH)}
        super().__init__(attention | rest, rest=tuple(rest), blocks=blocks, network=network)

    def source(self, seed: int) -> Draw:
        return partial(self.text.draw, count=self.windows, context=CONTEXT)

    def held_out(self, seeds: list[int]) -> Batch:
        return _stack([self.text.validation(HELD_OUT // 4, CONTEXT)] * len(seeds))

    def loss(self, weights: Weights, batch: Batch) -> Tensor:
        tokens, targets = batch  # [B, windows, T]
        stack = torch.arange(len(tokens))[:, None, None]
        x = weights["embedding"][stack, tokens] + weights["position"][:, None]  # [B, windows, T, WIDTH]
        x = (x + self._attend(weights, _norm(x))).flatten(1, 2)
        return _cross_entropy(self.trunk(weights, x) @ weights["head"].mT, targets.flatten(1))

    def _attend(self, weights: Weights, x: Tensor) -> Tensor:
        """Causal attention from its parts: the fused one has no second derivative."""
        parts = [x @ weights[name].mT[:, None] for name in ("query", "key", "value")]
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(2, 3) for part in parts)
        scores = query @ key.mT / query.shape[-1] ** 0.5  # [B, windows, heads, T, T]
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ value
        return mixed.transpose(2, 3).flatten(-2) @ weights["out"].mT[:, None]


_BLOCK = {"up": (2 * WIDTH, WIDTH), "down": (WIDTH, 2 * WIDTH)}


def _stream(seed: int, purpose: str) -> torch.Generator:
    """A generator for one purpose; the CPU's takes 32 bits of a seed, so that seeds are spread and not offset."""
    streams = ("weights", "batches", "problem", "held out")
    return torch.Generator().manual_seed(len(streams) * seed + streams.index(purpose))


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _normal(shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def _stack(batches: list[Batch]) -> Batch:
    inputs, targets = zip(*batches, strict=True)
    return torch.stack(inputs), torch.stack(targets)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:  # [B, N, C], [B, N] -> [B]
    return F.cross_entropy(logits.mT, labels, reduction="none").mean(1)
