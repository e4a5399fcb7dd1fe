"""Hope with one part taken away, or put in: the ablation of the paper's Table 6, arXiv:2512.24695.

− DGD               D ← a D + b v̂ kᵀ, which adds and erases nothing (a dot product as objective in place of L2)
− weight decay      a = 1, and a retention of 1 in the levels: nothing is lost but what is overwritten
− reflections       b in (0, 1), in place of (0, 2): a write goes to the value at most, not beyond it
− CMS               a Transformer's MLP in place of the levels
− inner k, − inner v, − inner rates, − inner projections     that projection is static; the last, all of them
+ gain of 1         projections start with all of what their memories hold, as in the paper, in place of a hundredth
+ momentum          writes are averaged over tokens; the paper's Hope has it, and "w/o momentum" is ours
+ inner q           the query has a memory, too; the paper's has one, and "w/o inner q" is ours
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deep_optim.models import Block, ContinuumMemory, Hope, LanguageModel, SelfModifyingTitans

Build = Callable[[int, int, int], nn.Module]  # vocab_size, dim, num_layers

HEADS, MOMENTUM = 4, 0.5
CHUNKS, MEMORY_CHUNK, PROJECTION_CHUNK = (16, 8), 16, 16  # of strings that are short
ADAPT = ("key", "value", "lr", "retention")  # the projections of Hope that have a memory
SMALL = 1e-3  # its square is what `Adding` errs by


class Adding(SelfModifyingTitans):
    """Writes without erasing: keys of length ε and values of 1 / ε leave b ε² of the erasure and all of the write."""

    def _project(self, *arguments: Any) -> tuple[Tensor, ...]:
        query, key, *rest = super()._project(*arguments)
        return query, SMALL * key, *rest

    def _own_values(self, *arguments: Any) -> Tensor:
        return super()._own_values(*arguments) / SMALL


class Keeping(SelfModifyingTitans):
    """Writes without decay."""

    def _project(self, *arguments: Any) -> tuple[Tensor, ...]:
        query, key, value, log_decay, rate = super()._project(*arguments)
        return query, key, value, 0 * log_decay, rate


class Approaching(SelfModifyingTitans):
    """Writes that replace at most."""

    def _project(self, *arguments: Any) -> tuple[Tensor, ...]:
        query, key, value, log_decay, rate = super()._project(*arguments)
        return query, key, value, log_decay, rate / 2


def hope(**options: Any) -> Build:
    """Hope with short chunks, or with other options, whose levels are as wide as makes a block as large as Hope's."""

    def build(vocab_size: int, dim: int, num_layers: int) -> Hope:
        hidden = _hidden(dim, **options)
        return _short(vocab_size, dim, num_layers, hidden_dim=hidden, **options)

    return build


def hope_of(titans: type[SelfModifyingTitans], retention: float = 0.95) -> Build:
    """Hope with short chunks, its layer of another class."""

    def build(vocab_size: int, dim: int, num_layers: int) -> LanguageModel:
        def block() -> Block:
            mixer = titans(dim, HEADS, chunk_size=MEMORY_CHUNK, projection_chunk_size=PROJECTION_CHUNK)
            return Block(dim, mixer, ContinuumMemory(dim, CHUNKS, hidden_dim=_hidden(dim), retention=retention))

        return LanguageModel(vocab_size, dim, num_layers, block)

    return build


def with_gain(gain: float) -> Build:
    """Hope with short chunks, whose projections start with so much of what their memories hold."""

    def build(vocab_size: int, dim: int, num_layers: int) -> Hope:
        model = _short(vocab_size, dim, num_layers)
        for name, param in model.named_parameters():
            if ".gain." in name:
                nn.init.constant_(param, gain)
        return model

    return build


def _short(vocab_size: int, dim: int, num_layers: int, **options: Any) -> Hope:
    chunks: dict[str, Any] = dict(
        memory_chunk_size=MEMORY_CHUNK, projection_chunk_size=PROJECTION_CHUNK, chunk_sizes=CHUNKS
    )
    return Hope(vocab_size, dim, num_layers, heads=HEADS, **{**chunks, **options})


def _hidden(dim: int, **options: Any) -> int:
    """Hidden features of the levels, 3 D weights each, of what Hope leaves beside the mixer and what learns."""
    with torch.device("meta"):
        whole, block = _short(1, dim, 1).blocks[0], _short(1, dim, 1, **options).blocks[0]
    levels = block.memory.levels
    learning = sum(level.inner_lr > 0 for level in levels)
    free = count(whole.mixer) + count(whole.memory) - count(block.mixer) - learning * dim**2
    return free // (3 * dim * len(levels))


def count(module: nn.Module) -> int:
    """Its parameters."""
    return sum(param.numel() for param in module.parameters())


def _static(*names: str) -> tuple[str, ...]:
    return tuple(name for name in ADAPT if name not in names)


VARIANTS: dict[str, Build] = {
    "hope (whole)": hope(),
    "hope - DGD": hope_of(Adding),
    "hope - weight decay": hope_of(Keeping, retention=1.0),
    "hope - reflections": hope_of(Approaching),
    "hope - CMS": hope(chunk_sizes=(1,), inner_lr=0.0),
    "hope - inner k": hope(adapt=_static("key")),
    "hope - inner v": hope(adapt=_static("value")),
    "hope - inner rates": hope(adapt=_static("lr", "retention")),
    "hope - inner projections": hope(adapt=()),
    "hope + inner q": hope(adapt=(*ADAPT, "query")),
    "hope + momentum": hope(momentum=MOMENTUM),
    "hope + gain of 1": with_gain(1.0),
}
