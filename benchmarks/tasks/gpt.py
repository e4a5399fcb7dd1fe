"""Next-byte prediction at a size that is worth a GPU: 10.9M parameters and 50M bytes a run, of IMDB's reviews."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Batch
from .byte_corpus import ByteCorpus
from .text import ByteGPT

VALIDATION_WINDOWS = 1024


class GPT:
    """Nothing waits for the device within a step: the text lies there, and batches are drawn there.

    Args:
        corpus, data: as in text.py.
        device: where all of it happens.
        width, depth, heads, context: size of the model; `context` is also the length of a window.
        batch: windows a step.
    """

    name = "gpt"
    metric = "validation loss (nats per byte)"
    steps = 768  # of 65,536 bytes
    aux_lr = 3e-3
    weight_decay = 0.1
    memory = ()

    def __init__(
        self,
        corpus: str = "imdb",
        data: str | None = None,
        device: str = "cuda",
        width: int = 384,
        depth: int = 6,
        heads: int = 6,
        context: int = 256,
        batch: int = 256,
    ) -> None:
        self.device, self.batch = torch.device(device), batch
        self.model_options = dict(width=width, depth=depth, heads=heads, context=context)
        self.corpus = ByteCorpus(corpus, data, self.device)
        self.validation = self.corpus.validation(VALIDATION_WINDOWS, context, torch.float64)

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return ByteGPT(**self.model_options).to(self.device)

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        rng = torch.Generator(self.device).manual_seed(seed)
        for _ in range(steps):
            yield self.corpus.draw(rng, self.batch, self.model_options["context"])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = compiled_loss() if self.device.type == "cuda" else next_byte_loss
        return loss(model, *batch)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        chunks = zip(*(part.split(self.batch) for part in self.validation), strict=True)
        losses = [next_byte_loss(model, *chunk) * len(chunk[0]) for chunk in chunks]  # the last one may be shorter
        return {"loss": torch.stack(losses).sum().item() / VALIDATION_WINDOWS}

    def describe(self) -> dict[str, Any]:
        return {
            **self.corpus.describe(),
            "validation_bytes": self.validation[0].numel(),
            "batch": [self.batch, self.model_options["context"]],
            **self.model_options,
            "parameters": sum(param.numel() for param in self.model(0).parameters()),
            "device": self.device.type,
            "compute_dtype": "bfloat16",
        }


def next_byte_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Products in bfloat16, weights and the loss in float32."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(tokens)  # [B, T, 256]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@cache
def compiled_loss() -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """Compiled at the first call in a process; other models of the same size run the same code."""
    return torch.compile(next_byte_loss)
