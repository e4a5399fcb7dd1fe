"""The one table of models: every promise in test_models_contract.py is kept by every line of it."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from deep_optim.models import Hope, HopeAttention, Transformer

VOCAB = 11


@dataclass(frozen=True)
class ModelCase:
    """A model class, and the options that a test builds it with; `period` tokens are a chunk of its slowest memory."""

    id: str
    cls: type[torch.nn.Module]
    kwargs: dict[str, Any] = field(default_factory=dict)
    period: int = 8

    def make(self, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
        """Return a small model, the same at every call."""
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCAB, "dim": 16, "num_layers": 2}
        return self.cls(**{**sizes, **self.kwargs, **options}).to(dtype)


MODELS = (
    ModelCase("transformer", Transformer),
    ModelCase("hope-attention", HopeAttention, {"chunk_sizes": (8, 2)}),
    ModelCase("hope-attention-four-levels", HopeAttention, {"chunk_sizes": (1, 2, 4, 8), "heads": 2}),
    ModelCase("hope-attention-nested", HopeAttention, {"chunk_sizes": (8, 2), "arrangement": "nested"}),
    ModelCase("hope-attention-independent", HopeAttention, {"chunk_sizes": (4, 8), "arrangement": "independent"}),
    ModelCase("hope-attention-half-frozen", HopeAttention, {"chunk_sizes": (8, 4), "inner_lr": (0.0, 2.0)}),
    ModelCase("hope", Hope, {"chunk_sizes": (8, 2), "memory_chunk_size": 4, "projection_chunk_size": 8}),
    ModelCase(
        "hope-mlp", Hope, {"chunk_sizes": (8, 4), "memory": "mlp", "memory_chunk_size": 3, "projection_chunk_size": 5}
    ),
)


def every_model() -> pytest.MarkDecorator:
    """Parametrize a test over the table."""
    return pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)


def make_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Return random tokens, [B, T]."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def leaves(state: Any, path: str = "") -> dict[str, Tensor]:
    """Return the tensors of a nested state under their full names."""
    if isinstance(state, Tensor):
        return {path: state}
    assert type(state) is dict, f"{path} is no plain dict"
    return {name: leaf for key, value in state.items() for name, leaf in leaves(value, f"{path}/{key}").items()}
