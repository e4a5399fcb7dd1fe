"""A corpus as models of bytes read it: windows of one part to train on, and of one that is held out."""

from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from . import Batch
from .corpus import read_text


class ByteCorpus:
    """The bytes of a corpus, each a token.

    Args:
        corpus, data: as in `read_text`.
        device: where they lie, and where training windows are drawn.
    """

    def __init__(self, corpus: str = "stdlib", data: str | None = None, device: torch.device | str = "cpu") -> None:
        parts = read_text(corpus, data)
        self.name = data or corpus
        self.train, self.held_out = (torch.frombuffer(bytearray(part), dtype=torch.uint8).to(device) for part in parts)

    @classmethod
    def named(cls, word: str) -> "ByteCorpus":
        """A corpus by its name, or a file by its path."""
        return cls(data=word) if "." in word or "/" in word else cls(word)

    def draw(self, rng: torch.Generator, count: int, context: int) -> Batch:
        """Windows of the training text."""
        starts = torch.randint(len(self.train) - context, (count,), generator=rng, device=self.train.device)
        return windows(self.train, starts, context)

    def validation(self, count: int, context: int, dtype: torch.dtype = torch.float32) -> Batch:
        """Windows evenly spread over the held-out text; in float32 their places are exact up to 16 MiB."""
        starts = torch.linspace(0, len(self.held_out) - context - 1, count, dtype=dtype).long()
        return windows(self.held_out, starts.to(self.held_out.device), context)

    def describe(self) -> dict[str, Any]:
        digest = sha256(self.train.cpu().numpy())
        digest.update(b"\0")
        digest.update(self.held_out.cpu().numpy())
        return {"corpus": self.name, "corpus_sha256": digest.hexdigest(), "train_bytes": len(self.train)}


def windows(text: Tensor, starts: Tensor, context: int) -> Batch:
    """The bytes from each start on [B, T], and for each of them the next one."""
    window = text[starts[:, None] + torch.arange(context + 1, device=text.device)].long()  # [B, T + 1]
    return window[:, :-1], window[:, 1:]
