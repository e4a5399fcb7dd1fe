"""The baseline: causal attention with rotary positions, then a gated MLP, both behind a norm and beside a shortcut.

    x ← x + Attention(norm(x)),   x ← x + MLP(norm(x))

In the words of Nested Learning (arXiv:2512.24695, Eq. 70) its feed-forward layer is a continuum memory of one level
that learns from outside alone; that is also how it is built.
"""

from .attention import Attention
from .continuum_memory import ContinuumMemory
from .language_model import Block, LanguageModel


class Transformer(LanguageModel):
    """A pre-norm Transformer (RoPE, RMSNorm, SwiGLU, no biases): `Transformer(vocab_size, dim, num_layers, ...)`.

    Args:
        vocab_size: number of tokens, V.
        dim: features of a token, D.
        num_layers: number of blocks.
        heads: attention heads; each needs an even number of features.
        hidden_dim: hidden features of the MLP; 8/3 D by default, in multiples of 8.
        dropout: of what each layer adds.

    Costs 24 D² + 4 t D FLOPs per token and block at position t; the state is the cache of keys and values.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_layers: int,
        *,
        heads: int = 4,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        def block() -> Block:
            mlp = ContinuumMemory(dim, (1,), hidden_dim=hidden_dim, inner_lr=0.0, dropout=dropout)
            return Block(dim, Attention(dim, heads), mlp, dropout)

        super().__init__(vocab_size, dim, num_layers, block)
