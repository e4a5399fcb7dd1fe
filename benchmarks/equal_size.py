"""Sequence models with as many parameters as a Transformer of a given width: tokens [B, T] to logits [B, T, V].

The width of tokens is the Transformer's, and the hidden features of the feed-forward layers make up for what the mixers
cost; an LSTM has no such layer, and is made wider or narrower.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from deep_optim.models import Block, ContinuumMemory, Hope, HopeAttention, LanguageModel, Transformer

from .hope_variants import count
from .sequence_models import LSTM, DeltaNet, LinearAttention

Sized = Callable[[int, int, int, int], nn.Module]  # vocab_size, dim, num_layers, free size


def _mixed(mixer: Callable[[int, int], nn.Module]) -> Sized:
    def build(vocab_size: int, dim: int, num_layers: int, hidden: int) -> LanguageModel:
        def block() -> Block:
            return Block(dim, mixer(dim, 4), ContinuumMemory(dim, (1,), hidden_dim=hidden, inner_lr=0.0))

        return LanguageModel(vocab_size, dim, num_layers, block)

    return build


SIZED: dict[str, Sized] = {
    "transformer": lambda v, d, n, hidden: Transformer(v, d, n, heads=4, hidden_dim=hidden),
    "lstm": lambda v, d, n, width: LSTM(v, width, n),
    "linear attention": _mixed(LinearAttention),
    "deltanet": _mixed(DeltaNet),
    "hope-attention": lambda v, d, n, hidden: HopeAttention(v, d, n, heads=4, hidden_dim=hidden),
    "hope": lambda v, d, n, hidden: Hope(v, d, n, heads=4, hidden_dim=hidden),
}


def build(name: str, vocab_size: int, dim: int, num_layers: int) -> nn.Module:
    """The model called `name`, of the size that `Transformer(vocab_size, dim, num_layers)` has."""
    return SIZED[name](vocab_size, dim, num_layers, free_size(name, vocab_size, dim, num_layers))


@cache
def free_size(name: str, vocab_size: int, dim: int, num_layers: int) -> int:
    """The free size, hidden features or width, whose parameters come nearest; they grow with it."""

    def size(free: int) -> int:
        return count(SIZED[name](vocab_size, dim, num_layers, free))

    with torch.device("meta"):
        wanted = count(Transformer(vocab_size, dim, num_layers))
        low, high = 1, 8 * dim
        while high - low > 1:  # size(low) <= wanted < size(high), if anything can be fitted
            middle = (low + high) // 2
            low, high = (middle, high) if size(middle) <= wanted else (low, middle)
        return min(low, high, key=lambda free: abs(size(free) - wanted))
