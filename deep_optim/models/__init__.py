"""Reference models of Nested Learning (arXiv:2512.24695): small, readable, and right to the last digit.

A language model is `Model(vocab_size, dim, num_layers, **options)` and maps `(tokens, state)` to `(logits, state)`. The
layers it is made of, `SelfModifyingTitans` and `ContinuumMemory`, map `(x, state)` to `(y, state)`.
"""

from .continuum_memory import ContinuumMemory, frequency_groups
from .hope import Hope
from .hope_attention import HopeAttention
from .self_modifying_titans import SelfModifyingTitans
from .state import detach
from .transformer import Transformer

__all__ = [
    "ContinuumMemory",
    "Hope",
    "HopeAttention",
    "SelfModifyingTitans",
    "Transformer",
    "detach",
    "frequency_groups",
]
