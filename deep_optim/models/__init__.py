"""Reference models of Nested Learning (arXiv:2512.24695): small, readable, and right to the last digit.

A language model is `Model(vocab_size, dim, num_layers, **options)` and maps `(tokens, state)` to `(logits, state)`. The
layers it is made of, `SelfModifyingTitans` and `ContinuumMemory`, map `(x, state)` to `(y, state)`; a `LanguageModel`
is made of any such layers, two to a `Block`.
"""

from .continuum_memory import ContinuumMemory, frequency_groups
from .hope import Hope
from .hope_attention import HopeAttention
from .language_model import Block, LanguageModel
from .self_modifying_titans import SelfModifyingTitans
from .state import detach
from .transformer import Transformer

__all__ = [
    "Block",
    "ContinuumMemory",
    "Hope",
    "HopeAttention",
    "LanguageModel",
    "SelfModifyingTitans",
    "Transformer",
    "detach",
    "frequency_groups",
]
