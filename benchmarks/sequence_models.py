"""The models that `python -m benchmarks models` compares, baselines first: tokens [B, T] to logits [B, T, V].

The baselines stand in the same blocks as the package's models, with the same MLP, so that only what mixes tokens
differs; an LSTM stands alone. Linear attention and DeltaNet have a causal convolution of width 4 and keys of length 1,
like ours.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deep_optim.models import (
    Block,
    ContinuumMemory,
    Hope,
    HopeAttention,
    LanguageModel,
    SelfModifyingTitans,
    Transformer,
)
from deep_optim.ops.gated_delta_rule import gated_delta_rule

from .hope_variants import VARIANTS, Build

CONV = 4


class Recurrent(nn.Module):
    """A mixer with a matrix M [d, d] of state per head: projections, a short convolution, `answers`, a norm, a gate."""

    strongest = 1.0  # write, b in (0, strongest)

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.projection = nn.Linear(dim, 4 * dim, bias=False)
        self.rate = nn.Linear(dim, heads)
        self.conv = nn.Conv1d(3 * dim, 3 * dim, CONV, groups=3 * dim, padding=CONV - 1, bias=False)
        self.norm, self.out = nn.RMSNorm(dim // heads), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, state: Any = None, *, write: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        mixed, gate = self.projection(x).tensor_split([3 * x.shape[-1]], -1)
        mixed = F.silu(self.conv(mixed.mT)[..., : x.shape[1]].mT)
        query, key, value = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in mixed.chunk(3, -1))
        rate = self.strongest * self.rate(x).sigmoid().mT  # [B, H, T]
        answer = self.norm(self.answers(F.normalize(query, dim=-1), F.normalize(key, dim=-1), value, rate))
        return self.out(answer.transpose(1, 2).flatten(2) * F.silu(gate)), {}

    def answers(self, query: Tensor, key: Tensor, value: Tensor, rate: Tensor) -> Tensor:  # [B, H, T, d], [B, H, T]
        raise NotImplementedError


class LinearAttention(Recurrent):
    """M_t = M_{t−1} + b_t v_t k_tᵀ: everything is added, nothing is erased."""

    def answers(self, query: Tensor, key: Tensor, value: Tensor, rate: Tensor) -> Tensor:
        return (query @ key.mT).tril() @ (rate[..., None] * value)


class DeltaNet(Recurrent):
    """M_t = M_{t−1} (I − b_t k_t k_tᵀ) + b_t v_t k_tᵀ, b in (0, 1) (Yang et al., arXiv:2406.06484)."""

    def answers(self, query: Tensor, key: Tensor, value: Tensor, rate: Tensor) -> Tensor:
        width = query.shape[-1]
        empty = query.new_zeros(*query.shape[:2], width, width)
        return gated_delta_rule(query, key, value, torch.zeros_like(rate), rate, empty, chunk_size=32)[0]


class ReflectingDeltaNet(DeltaNet):
    """The same with b in (0, 2), where I − b k kᵀ has negative eigenvalues (Grazzi et al., arXiv:2411.12537)."""

    strongest = 2.0


class LSTM(nn.Module):
    """The model that no parallel one replaces on formal languages."""

    def __init__(self, vocab_size: int, dim: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.lstm = nn.LSTM(dim, dim, num_layers, batch_first=True)
        self.head = nn.Linear(dim, vocab_size)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Any]:
        x, state = self.lstm(self.embedding(tokens))
        return self.head(x), state


def mixed(vocab_size: int, dim: int, num_layers: int, mixer: Callable[[], nn.Module]) -> LanguageModel:
    """A language model around a mixer, with the Transformer's MLP."""
    return LanguageModel(
        vocab_size, dim, num_layers, lambda: Block(dim, mixer(), ContinuumMemory(dim, (1,), inner_lr=0.0))
    )


MODELS: dict[str, Build] = {
    "transformer": lambda v, d, n: Transformer(v, d, n, heads=4),
    "lstm": LSTM,
    "linear attention": lambda v, d, n: mixed(v, d, n, lambda: LinearAttention(d, 4)),
    "deltanet": lambda v, d, n: mixed(v, d, n, lambda: DeltaNet(d, 4)),
    "reflecting deltanet": lambda v, d, n: mixed(v, d, n, lambda: ReflectingDeltaNet(d, 4)),
    "titans": lambda v, d, n: mixed(v, d, n, lambda: SelfModifyingTitans(d, 4)),  # Hope without its levels
    "hope-attention": lambda v, d, n: HopeAttention(v, d, n, heads=4),
    "hope": lambda v, d, n: Hope(v, d, n, heads=4),
    # Chunks of 16 and 8, for short strings: what happens at the end of a chunk is not learned where none ends.
    "hope (short chunks)": lambda v, d, n: Hope(
        v, d, n, heads=4, chunk_sizes=(16, 8), memory_chunk_size=16, projection_chunk_size=16
    ),
}

EVERY = MODELS | VARIANTS
