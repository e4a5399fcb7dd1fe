"""The continuum memory system: a chain of MLP blocks, each learning at its own frequency.

    sequential     x ← x + f_ℓ(norm_ℓ(x))   for ℓ = 1 … k
    independent    y = x + Σ_ℓ a_ℓ f_ℓ(norm_ℓ(x))
    nested         as sequential; a level goes back to its learned initial weights whenever the chunk of the next
                   slower level is complete

Nested Learning, arXiv:2512.24695, Eq. 70-74. A Transformer's feed-forward layer is the chain of one level that does not
learn in context. How a level learns is in `deep_optim.models.continuum_level`; norms and shortcuts, which the paper's
equations leave out, stand where a pre-norm Transformer has them.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .continuum_level import ContinuumLevel, check_chunk_sizes, check_learning, level_rates
from .mlp import MLP
from .pretrained import PretrainedContinuum
from .sizes import check_sizes, check_tokens
from .state import State, check_names, size_of

Arrangement = Literal["sequential", "independent", "nested"]


class ContinuumMemory(nn.Module):
    """A feed-forward layer whose levels learn at several frequencies, from outside or in context.

    From outside (`inner_lr=0`) it is a chain of MLPs with a suggestion for their optimizer: `frequency_groups` gives
    every level its own group and period. In context each level updates its own weights every `chunk_size` tokens,
    separately for every sample, in training (differentiable) and at test time alike.

    Args:
        dim: features of a token, D.
        chunk_sizes: tokens from one update to the next, for each level in the order of the chain. Sorted, each must
            divide the next. By default 64 and 16: the slow level sees the input first, as in the numbering of Eq. 72.
        hidden_dim: hidden features of each level. By default so many that all levels together, with what they need to
            learn, have the 8 D² weights of the usual feed-forward layer.
        arrangement: "sequential", "independent" or "nested"; see the module docstring.
        inner_lr: step size of the levels on their own objective, per level or for all; 0 is an ordinary MLP. The
            objective is a mean over tokens and features; steps are stable up to 2 over its curvature, which is largest
            for tokens all alike.
        retention: how much of what was written survives an update of its level. 0.95 remembers 20 chunks, so that slow
            levels remember longer.
        max_step: an update is never longer than this, relative to the initial weights. Bounds what keys that resemble
            each other, whose gradients add up, can do within a chunk.
        dropout: of what each level adds.

    Shapes: x [B, T, D] to y [B, T, D], for any T. State, by level "0", "1", ...: "written", a dict of [B, ...] by
    weight, and "inputs" [B, 1 + n, D], the n < C tokens of the chunk under way behind the last of the chunk before.

    Cost per token and level of P = 3 D H weights: 2 P FLOPs to read and about 7 P to learn. The state holds P numbers
    per sample and level, and training keeps a few times as many for every chunk.

    Raises:
        ValueError: for chunk sizes that do not divide, numbers out of range, an x that is not [B, T, D], or a state
            that is not of this layer and batch.
    """

    def __init__(
        self,
        dim: int,
        chunk_sizes: Sequence[int] = (64, 16),
        *,
        hidden_dim: int | None = None,
        arrangement: Arrangement = "sequential",
        inner_lr: float | Sequence[float] = 1.0,
        retention: float = 0.95,
        max_step: float = 0.1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, hidden_dim=1 if hidden_dim is None else hidden_dim)
        check_chunk_sizes(chunk_sizes)
        rates = level_rates(inner_lr, len(chunk_sizes))
        check_learning(retention, max_step)
        if arrangement not in get_args(Arrangement):
            raise ValueError(f"Invalid arrangement: {arrangement!r}, expected one of {get_args(Arrangement)}")
        if arrangement == "nested" and (len(set(chunk_sizes)) < len(chunk_sizes) or not all(rates)):
            raise ValueError(
                "arrangement='nested' needs levels of different chunk sizes that all have an inner_lr above 0"
            )
        slower = {size: next((s for s in sorted(chunk_sizes) if s > size), None) for size in chunk_sizes}
        if hidden_dim is None:
            hidden_dim = hidden_dim_for(8 * dim**2, dim, rates, len(chunk_sizes))
        nested = arrangement == "nested"
        self.dim, self.arrangement, self.chunk_sizes = dim, arrangement, tuple(chunk_sizes)
        self.slower = {  # level to the level whose chunk is its context
            str(level): str(chunk_sizes.index(slow))
            for level, size in enumerate(chunk_sizes)
            if nested and (slow := slower[size]) is not None
        }
        self.levels = nn.ModuleList(
            ContinuumLevel(
                MLP(dim, hidden_dim),
                dim,
                size,
                inner_lr=rate,
                retention=retention,
                max_step=max_step,
                restart=slower[size] if nested else None,
            )
            for size, rate in zip(chunk_sizes, rates, strict=True)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-6) for _ in chunk_sizes)
        self.dropout = nn.Dropout(dropout)
        if arrangement == "independent":
            self.mix = nn.Parameter(torch.ones(len(chunk_sizes)))  # a

    def forward(self, x: Tensor, state: State | None = None, *, write: bool = True) -> tuple[Tensor, State]:
        """Answer x [B, T, D] and learn from it; see the class docstring."""
        check_tokens(x, self.dim)
        names = [str(level) for level in range(len(self.levels))]
        if state is not None:
            check_names(state, names)
        # how far each level is in its chunk, before this call moves any
        waiting = (
            {} if state is None else {name: size_of(state[name], "inputs", 1) - 1 for name in self.slower.values()}
        )
        y, new = x, {}
        for index, (name, norm, level) in enumerate(zip(names, self.norms, self.levels, strict=True)):
            elapsed = waiting.get(self.slower.get(name, ""), 0)
            source = norm(x if self.arrangement == "independent" else y)
            answer, new[name] = level(source, None if state is None else state[name], write=write, elapsed=elapsed)
            if self.arrangement == "independent":
                answer = self.mix[index] * answer
            y = y + self.dropout(answer)
        return y, new

    @staticmethod
    def from_pretrained_mlps(
        model: nn.Module,
        chunk_sizes: Sequence[int],
        *,
        name: str = "mlp",
        dim: int | None = None,
        inner_lr: float | Sequence[float] = 1.0,
        retention: float = 0.95,
        max_step: float = 0.1,
    ) -> PretrainedContinuum:
        """Make levels of a trained model's MLPs, in place; `PretrainedContinuum` says how the model runs then."""
        return PretrainedContinuum(
            model, chunk_sizes, name=name, dim=dim, inner_lr=inner_lr, retention=retention, max_step=max_step
        )


def frequency_groups(model: nn.Module, groups: Iterable[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Return parameter groups with a "period" each: that of their level, and 1 for all that is in none.

    What `deep_optim.MultiFrequency` reads: a level of chunk size C is stepped every C-th step. Levels of equal chunk
    size share a group.

    Args:
        model: a module with `ContinuumMemory` layers, or one of them.
        groups: groups to divide, as `deep_optim.param_groups(model)` makes them; their options are kept. By default one
            group of all parameters.

    Example:
        >>> memory = ContinuumMemory(8, (4, 2), inner_lr=0)
        >>> [(group["period"], len(group["params"])) for group in frequency_groups(memory)]
        [(1, 2), (2, 3), (4, 3)]
    """
    periods: dict[nn.Parameter, int] = {}
    for module in model.modules():
        if isinstance(module, ContinuumLevel):
            periods.update(dict.fromkeys(module.parameters(), module.chunk_size))
    divided = []
    for group in [{"params": list(model.parameters())}] if groups is None else groups:
        parts: dict[int, list[Any]] = {}
        for entry in group["params"]:
            param = entry[1] if isinstance(entry, tuple) else entry
            parts.setdefault(periods.get(param, 1), []).append(entry)
        divided += [{**group, "params": parts[period], "period": period} for period in sorted(parts)]
    return divided


def hidden_dim_for(budget: int, dim: int, inner_lr: float | Sequence[float], levels: int) -> int:
    """Return H, in multiples of 8, with which the levels have about `budget` weights: 3 D H each, and D² to learn."""
    learning = sum(rate > 0 for rate in level_rates(inner_lr, levels))
    return max(8, round((budget - learning * dim**2) / (3 * dim * levels) / 8) * 8)
