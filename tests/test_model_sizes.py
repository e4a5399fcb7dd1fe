"""Every size of every model is a whole number of at least 1, or refused in words where the model is made."""

import math
import re

import pytest

from deep_optim.models import ContinuumMemory, Hope, HopeAttention, SelfModifyingTitans, Transformer

LANGUAGE_MODEL = dict(vocab_size=11, dim=12, num_layers=1, heads=3, hidden_dim=8)
CASES = [
    (SelfModifyingTitans, dict(dim=12, heads=3, chunk_size=4, projection_chunk_size=8, hidden=8, memory="mlp")),
    (ContinuumMemory, dict(dim=12, hidden_dim=8)),
    (Transformer, LANGUAGE_MODEL),
    (HopeAttention, LANGUAGE_MODEL),
    (Hope, dict(**LANGUAGE_MODEL, memory_chunk_size=4, projection_chunk_size=8, memory_hidden_dim=8, memory="mlp")),
]


@pytest.mark.parametrize("value", [0, -1, 2.5, 12.0, math.nan, True, "4"], ids=str)
@pytest.mark.parametrize(
    "cls, options, name",
    [(cls, options, name) for cls, options in CASES for name in options if name != "memory"],
    ids=lambda each: each if isinstance(each, str) else getattr(each, "__name__", ""),
)
def test_a_size_that_is_none_is_refused_in_words(cls, options, name, value):
    with pytest.raises(ValueError, match=re.escape(f": {value!r}, expected a whole number of at least 1")):
        cls(**{**options, name: value})
    cls(**options)
