"""Causal softmax attention with rotary positions and a cache of keys and values.

    q_t, k_t, v_t = R_t W_q x_t, R_t W_k x_t, W_v x_t           per head; R_t turns pairs of features by t · θ_i
    y_t = W_o Σ_{s ≤ t} softmax_s(⟨q_t, k_s⟩ / √d) v_s,          θ_i = 10000^{−2i/d}

RoPE (arXiv:2104.09864), the features in two halves as in GPT-NeoX. Scores depend on t − s alone.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .sizes import check_sizes
from .state import State, check_state, size_of, state_dtype


class Attention(nn.Module):
    """Causal softmax attention over everything so far.

    Args:
        dim: features of a token, D.
        heads: divide D into an even number of features each.
        base: of the rotary frequencies.

    State: `{"key": [B, heads, t, D / heads], "value": ...}`, everything seen, in the dtype it was computed in: the one
    state that grows. Costs 8 D² + 4 t D FLOPs per token at position t.
    """

    def __init__(self, dim: int, heads: int = 4, *, base: float = 10_000.0) -> None:
        super().__init__()
        check_sizes(dim=dim, heads=heads)
        if dim % heads or dim // heads % 2:
            raise ValueError(f"Invalid heads: {heads}; {dim} features must divide into heads of an even number")
        self.heads, self.base = heads, base
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.normal_(layer.weight, std=dim**-0.5)

    def forward(self, x: Tensor, state: State | None = None, *, write: bool = True) -> tuple[Tensor, State]:
        """Attend from x [B, T, D]. `write` changes nothing: keys and values are the context itself, no memory of it."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, T, d]
            for layer in (self.query, self.key, self.value)
        )
        before = 0
        if state is not None:
            before = size_of(state, "key", 2)
            like = key.new_empty(*key.shape[:2], before, key.shape[3], device="meta")
            check_state(state, {"key": like, "value": like}, x.device)
        query, key = self._rotate(query, before), self._rotate(key, before)
        if state is not None:
            key, value = torch.cat([state["key"], key], 2), torch.cat([state["value"], value], 2)
        y = attend(query, key, value)
        return self.out(y.transpose(1, 2).flatten(2)), {"key": key, "value": value}

    def _rotate(self, x: Tensor, start: int) -> Tensor:  # [B, heads, T, d]
        half, dtype = x.shape[-1] // 2, state_dtype(x.dtype)  # half a turn is lost in bfloat16
        frequency = self.base ** -(torch.arange(half, dtype=dtype, device=x.device) / half)
        position = torch.arange(start, start + x.shape[2], dtype=dtype, device=x.device)
        angle = position[:, None] * frequency  # [T, d / 2]
        cos, sin = angle.cos(), angle.sin()
        a, b = x.to(dtype).split(half, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [B, heads, T, d], [B, heads, S, d] twice
    """Return causal attention of the last T of S tokens."""
    length, seen = query.shape[2], key.shape[2]
    if length == 0:
        return query
    if length == seen:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    mask = torch.ones(length, seen, dtype=torch.bool, device=query.device).tril(seen - length)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=None if length == 1 else mask)
