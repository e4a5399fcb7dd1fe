"""Hope-Attention: softmax attention, then a continuum memory in place of the feed-forward layer.

    x ← x + Attention(norm(x)),   x ← ContinuumMemory(x)

Nested Learning, arXiv:2512.24695, section 8: what Hope is without its self-modifying layer. With `inner_lr=0` and one
level it is `Transformer`.
"""

from collections.abc import Sequence

from .attention import Attention
from .continuum_memory import Arrangement, ContinuumMemory
from .language_model import Block, LanguageModel


class HopeAttention(LanguageModel):
    """Attention and a continuum memory: `HopeAttention(vocab_size, dim, num_layers, ...)`.

    Args:
        vocab_size: number of tokens, V.
        dim: features of a token, D.
        num_layers: number of blocks.
        heads: attention heads; each needs an even number of features.
        chunk_sizes, hidden_dim, arrangement, inner_lr, retention, max_step: of `ContinuumMemory`. By default levels of
            64 and 16 tokens, with as many weights together as the Transformer's MLP.
        dropout: of what each layer adds.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_layers: int,
        *,
        heads: int = 4,
        chunk_sizes: Sequence[int] = (64, 16),
        hidden_dim: int | None = None,
        arrangement: Arrangement = "sequential",
        inner_lr: float | Sequence[float] = 1.0,
        retention: float = 0.95,
        max_step: float = 0.1,
        dropout: float = 0.0,
    ) -> None:
        def block() -> Block:
            memory = ContinuumMemory(
                dim,
                chunk_sizes,
                hidden_dim=hidden_dim,
                arrangement=arrangement,
                inner_lr=inner_lr,
                retention=retention,
                max_step=max_step,
                dropout=dropout,
            )
            return Block(dim, Attention(dim, heads), memory, dropout)

        super().__init__(vocab_size, dim, num_layers, block)
