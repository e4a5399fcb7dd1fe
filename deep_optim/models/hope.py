"""Hope: self-modifying Titans, then a continuum memory in place of the feed-forward layer.

    x ← x + SelfModifyingTitans(norm(x)),   x ← ContinuumMemory(x)

Nested Learning, arXiv:2512.24695, Eq. 94-97. Everything in it learns in context: the Titans' memories token by token,
the levels of the continuum memory chunk by chunk, and all of them start from weights that training has learned.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from .continuum_memory import Arrangement, ContinuumMemory, hidden_dim_for
from .language_model import Block, LanguageModel
from .self_modifying_titans import SelfModifyingTitans


class Hope(LanguageModel):
    """Self-modifying Titans and a continuum memory: `Hope(vocab_size, dim, num_layers, ...)`.

    Args:
        vocab_size: number of tokens, V.
        dim: features of a token, D.
        num_layers: number of blocks.
        heads, memory, projection_chunk_size, adapt, momentum: of `SelfModifyingTitans`.
        memory_chunk_size, memory_hidden_dim: its `chunk_size` and `hidden`, of the main memory.
        chunk_sizes, hidden_dim, arrangement, inner_lr, retention, max_step: of `ContinuumMemory`. By default as many
            hidden features as give a block the 12 D² weights of a Transformer's.
        dropout: of what each layer adds.

    The state is of one size at any position, so that `generate` streams in constant memory.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_layers: int,
        *,
        heads: int = 4,
        memory: Literal["linear", "mlp"] = "linear",
        memory_chunk_size: int = 16,
        memory_hidden_dim: int | None = None,
        projection_chunk_size: int = 64,
        adapt: Iterable[str] = ("key", "value", "lr", "retention"),
        momentum: float = 0.0,
        chunk_sizes: Sequence[int] = (64, 16),
        hidden_dim: int | None = None,
        arrangement: Arrangement = "sequential",
        inner_lr: float | Sequence[float] = 1.0,
        retention: float = 0.95,
        max_step: float = 0.1,
        dropout: float = 0.0,
    ) -> None:
        adapt = (adapt,) if isinstance(adapt, str) else tuple(adapt)  # every block reads it

        def block() -> Block:
            titans = SelfModifyingTitans(
                dim,
                heads,
                memory=memory,
                chunk_size=memory_chunk_size,
                projection_chunk_size=projection_chunk_size,
                adapt=adapt,
                momentum=momentum,
                hidden=memory_hidden_dim,
            )
            features = hidden_dim
            if features is None:
                budget = 12 * dim**2 - sum(param.numel() for param in titans.parameters())
                features = hidden_dim_for(budget, dim, inner_lr, len(chunk_sizes))
            levels = ContinuumMemory(
                dim,
                chunk_sizes,
                hidden_dim=features,
                arrangement=arrangement,
                inner_lr=inner_lr,
                retention=retention,
                max_step=max_step,
                dropout=dropout,
            )
            return Block(dim, titans, levels, dropout)

        super().__init__(vocab_size, dim, num_layers, block)
