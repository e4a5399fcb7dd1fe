"""What the language models share: embedding, blocks, head, generation, and the paper's sizes.

    x ← Embedding(token)
    x ← x + mixer(norm(x)),   x ← memory(x)        for every block
    logits = Head(norm(x))

The head is not tied to the embedding: it starts at a standard deviation of 0.02, so that the first loss is ln V up to
0.0002 D, while embeddings start at 1, so that they are no smaller than what the blocks add. A tied matrix cannot do
both.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .sizes import check_sizes
from .state import State, check_names

SIZES = {  # the paper's names; layers and widths by the field's usual table (GPT-3, arXiv:2005.14165, Table 2.1)
    "340m": dict(dim=1024, num_layers=24, heads=16),
    "760m": dict(dim=1536, num_layers=24, heads=16),
    "1.3b": dict(dim=2048, num_layers=24, heads=32),
}
VOCAB_SIZE = 32_000  # "32K" in the paper
PREFILL = 512  # tokens of a prompt that generate() reads at once

Model = TypeVar("Model", bound="LanguageModel")


class Block(nn.Module):
    """A layer that mixes tokens, then a feed-forward layer.

    Args:
        dim: features of a token, D.
        mixer: a layer (x, state, write) to (y, state), to stand between a norm and a shortcut.
        memory: such a layer with norms and shortcuts of its own.
        dropout: of what the mixer adds.
    """

    def __init__(self, dim: int, mixer: nn.Module, memory: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.mixer, self.memory = mixer, memory
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: State | None = None, *, write: bool = True) -> tuple[Tensor, State]:
        if state is not None:
            check_names(state, ("mixer", "memory"))
        before = state or {"mixer": None, "memory": None}
        y, mixer = self.mixer(self.norm(x), before["mixer"], write=write)
        x, memory = self.memory(x + self.dropout(y), before["memory"], write=write)
        return x, {"mixer": mixer, "memory": memory}


class LanguageModel(nn.Module):
    """Tokens to logits, with a state that makes any split of a sequence equal to the whole.

    A subclass says what a block is. The state is a plain nested dict of tensors, one entry per block under its number;
    it belongs to the caller and can be saved with `torch.save`.

    Args:
        vocab_size: number of tokens, V.
        dim: features of a token, D.
        num_layers: number of blocks.
        block: makes one.
    """

    def __init__(self, vocab_size: int, dim: int, num_layers: int, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, dim=dim, num_layers=num_layers)
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(block() for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        with torch.no_grad():
            for name, param in self.blocks.named_parameters():  # what adds to the residual stream, as in GPT-2
                if name.endswith((".out.weight", ".down.weight")):
                    param.div_((2 * num_layers) ** 0.5)

    @classmethod
    def preset(cls: type[Model], size: str, **options: Any) -> Model:
        """Return a model of one of the paper's sizes: "340m", "760m" or "1.3b", with a vocabulary of 32,000.

        Depth and width are our reading (24 layers of 1024, 1536 and 2048 features), as the paper names sizes alone.
        Built under `torch.device("meta")` it costs nothing. `options` win over the preset's.
        """
        if size not in SIZES:
            raise ValueError(f"Invalid size: {size!r}, expected one of {tuple(SIZES)}")
        return cls(**{"vocab_size": VOCAB_SIZE, **SIZES[size], **options})

    def forward(self, tokens: Tensor, state: State | None = None, *, write: bool = True) -> tuple[Tensor, State]:
        """Return logits and the state after these tokens.

        Args:
            tokens: [B, T] int64, for any T.
            state: what an earlier call returned, for the same samples; None begins. It is not written into.
            write: False leaves memories as they are: they are read, and learn nothing.

        Returns:
            Logits [B, T, V], and the new state.

        Raises:
            TypeError: for tokens that are not int64.
            ValueError: for tokens that are not [B, T], or a state of another model or batch.
        """
        x, new = self.features(tokens, state, write=write)
        return self.head(x), new

    def features(self, tokens: Tensor, state: State | None = None, *, write: bool = True) -> tuple[Tensor, State]:
        """Return what the head sees, [B, T, D], and the new state; arguments as in `forward`."""
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens must be int64, got {tokens.dtype}")
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be [B, T], got shape {list(tokens.shape)}")
        names = [str(index) for index in range(len(self.blocks))]
        if state is not None:
            check_names(state, names)
        x, new = self.embedding(tokens), {}
        for name, block in zip(names, self.blocks, strict=True):
            x, new[name] = block(x, None if state is None else state[name], write=write)
        return self.norm(x), new

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, State]:
        """Continue a prompt, one token at a time and in constant memory but for what attention keeps.

        The model's memories go on learning while it reads and writes. The last new token has not been read: it begins
        the next call. Where there is dropout, call `eval()` first.

        Args:
            tokens: [B, T] int64, at least one.
            max_new_tokens: how many to add, at least 0.
            temperature: of the softmax that tokens are drawn from; 0 takes the likeliest.
            generator: where the draws come from.
            state: what came before the prompt.

        Returns:
            The new tokens [B, max_new_tokens], and the state before the last of them.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens must be [B, T] with T of at least 1, got shape {list(tokens.shape)}")
        if max_new_tokens < 0:
            raise ValueError(f"Invalid max_new_tokens: {max_new_tokens}, expected at least 0")
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"Invalid temperature: {temperature}, expected at least 0")
        first, *rest = tokens.split(PREFILL, 1)
        x, new = self.features(first, state)
        for piece in rest:
            x, new = self.features(piece, new)
        drawn: list[Tensor] = []
        for _ in range(max_new_tokens):
            if drawn:
                x, new = self.features(drawn[-1], new)
            logits = self.head(x[:, -1])  # [B, V]
            if temperature:
                drawn.append(torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator))
            else:
                drawn.append(logits.argmax(-1, keepdim=True))
        return torch.cat(drawn, 1) if drawn else tokens[:, :0], new
