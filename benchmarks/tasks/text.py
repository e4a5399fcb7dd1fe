"""Next-byte prediction with a small GPT; by default on the source of the interpreter's own standard library."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deep_optim import models

from . import Batch
from .byte_corpus import ByteCorpus

MODELS = {"transformer": models.Transformer, "hope_attention": models.HopeAttention, "hope": models.Hope}
CONTEXT = 64
BATCH = 16
VALIDATION_WINDOWS = 256


class Block(nn.Module):
    """Pre-norm attention and MLP; both branches start at zero, so the block starts as the identity."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D]
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)  # [B, 3H, T, D/H]
        query, key, value = heads.chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ByteGPT(nn.Module):
    """A GPT over bytes; the head starts at zero, so the first loss is exactly log 256."""

    def __init__(self, width: int = 128, depth: int = 3, heads: int = 4, context: int = CONTEXT) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.zeros_(self.head.weight)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, 256]
        position = self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(self.embedding(tokens) + position)))


class Logits(nn.Module):
    """A sequence model without its state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, V]
        return self.model(tokens)[0]


class Text:
    """Byte-level language modelling: 16 x 64 bytes a step; the loss is in nats per byte.

    Args:
        corpus: "stdlib", "imdb", "newsgroups" or "shakespeare"; see corpus.py.
        data: a text file of your own instead.
        model: "gpt", or one of the package's: "transformer", "hope_attention", "hope".
        width, depth, heads: size of the model.
        alphabets: more than 1 cuts the run into so many equal parts, each with the bytes of the text permuted anew: a
            sequence of tasks that share everything but the embeddings. The loss is that on the last of them.
    """

    name = "text"
    metric = "validation loss (nats per byte)"
    steps = 600
    aux_lr = 3e-3
    weight_decay = 1e-2
    memory = ()

    def __init__(
        self,
        corpus: str = "stdlib",
        data: str | None = None,
        model: str = "gpt",
        width: int = 128,
        depth: int = 3,
        heads: int = 4,
        alphabets: int = 1,
    ) -> None:
        rng = torch.Generator().manual_seed(0)
        self.alphabets = [torch.arange(256), *(torch.randperm(256, generator=rng) for _ in range(alphabets - 1))]
        self.kind, self.model_options = model, dict(width=width, depth=depth, heads=heads)
        self.corpus = ByteCorpus(corpus, data)
        self.validation = _spelt(self.corpus.validation(VALIDATION_WINDOWS, CONTEXT), self.alphabets[-1])

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        if self.kind == "gpt":
            return ByteGPT(**self.model_options)
        return Logits(MODELS[self.kind](256, self.model_options["width"], self.model_options["depth"]))

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        rng = torch.Generator().manual_seed(seed)
        for step in range(steps):
            alphabet = self.alphabets[step * len(self.alphabets) // steps]
            yield _spelt(self.corpus.draw(rng, BATCH, CONTEXT), alphabet)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        chunks = zip(*(part.split(BATCH) for part in self.validation), strict=True)
        return {"loss": torch.stack(list(map(partial(self.loss, model), chunks))).mean().item()}

    def describe(self) -> dict[str, Any]:
        return {
            **self.corpus.describe(),
            "validation_bytes": self.validation[0].numel(),
            "batch": [BATCH, CONTEXT],
            "model": self.kind,
            **self.model_options,
            "alphabets": len(self.alphabets),
        }


def _spelt(batch: Batch, alphabet: Tensor) -> Batch:
    tokens, targets = batch
    return alphabet[tokens], alphabet[targets]
