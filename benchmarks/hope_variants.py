"""Hope with one part taken away, or put in: the ablation of the paper's Table 6, arXiv:2512.24695.

− DGD               D ← a D + b v̂ kᵀ, which adds and erases nothing (a dot product as objective in place of L2)
− weight decay      a = 1, and a retention of 1 in the levels: nothing is lost but what is overwritten
− CMS               a Transformer's MLP in place of the levels
− inner k, − inner v, − inner rates     that projection is static
+ momentum          writes are averaged over tokens; the paper's Hope has it, and "w/o momentum" is ours
+ inner q           the query has a memory, too; the paper's has one, and "w/o inner q" is ours
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deep_optim.models import ContinuumMemory, Hope, SelfModifyingTitans
from deep_optim.models.language_model import Block, LanguageModel

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


def hope(titans: type[SelfModifyingTitans] = SelfModifyingTitans, retention: float = 0.95, **options: Any) -> Build:
    """Hope with short chunks, its layer of another class or with other options."""

    def build(vocab_size: int, dim: int, num_layers: int) -> LanguageModel:
        def block() -> Block:
            mixer = _mixer(titans, dim, options)
            hidden = (_budget(dim, mixer) - len(CHUNKS) * dim**2) // (3 * dim * len(CHUNKS))
            return Block(dim, mixer, ContinuumMemory(dim, CHUNKS, hidden_dim=hidden, retention=retention))

        return LanguageModel(vocab_size, dim, num_layers, block)

    return build


def without_levels(vocab_size: int, dim: int, num_layers: int) -> LanguageModel:
    """Self-modifying Titans and an MLP that is trained from outside."""

    def block() -> Block:
        mixer = _mixer(SelfModifyingTitans, dim, {})
        hidden = _budget(dim, mixer) // (3 * dim)
        return Block(dim, mixer, ContinuumMemory(dim, (1,), hidden_dim=hidden, inner_lr=0))

    return LanguageModel(vocab_size, dim, num_layers, block)


def _budget(dim: int, mixer: nn.Module) -> int:
    """The weights that are left for the levels, if a block is to have as many as Hope's."""
    with torch.device("meta"):
        model = Hope(1, dim, 1, heads=HEADS, chunk_sizes=CHUNKS)
    whole = model.blocks[0]
    return count(whole.mixer) + count(whole.memory) - count(mixer)


def count(module: nn.Module) -> int:
    """Its parameters."""
    return sum(param.numel() for param in module.parameters())


def _mixer(titans: type[SelfModifyingTitans], dim: int, options: dict[str, Any]) -> SelfModifyingTitans:
    return titans(dim, HEADS, chunk_size=MEMORY_CHUNK, projection_chunk_size=PROJECTION_CHUNK, **options)


def _static(*names: str) -> tuple[str, ...]:
    return tuple(name for name in ADAPT if name not in names)


VARIANTS: dict[str, Build] = {
    "hope (whole)": hope(),
    "hope - DGD": hope(Adding),
    "hope - weight decay": hope(Keeping, retention=1.0),
    "hope - CMS": without_levels,
    "hope - inner k": hope(adapt=_static("key")),
    "hope - inner v": hope(adapt=_static("value")),
    "hope - inner rates": hope(adapt=_static("lr", "retention")),
    "hope + inner q": hope(adapt=(*ADAPT, "query")),
    "hope + momentum": hope(momentum=MOMENTUM),
}
