"""What integrations do without the libraries they are for."""

import sys
from types import SimpleNamespace

import pytest

from deep_optim.integrations.transformers import OptimizerFactory, for_trainer
from problem import make_model


def test_the_factory_is_called_as_trainer_calls_it() -> None:
    """Trainer calls `cls()(model, **keywords)` for what is no optimizer class."""
    optimizer = OptimizerFactory()(make_model(), name="Momentum", lr=0.25, momentum=0.5)
    assert type(optimizer).__name__ == "Momentum"
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.25, 0.5)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.trainer_optimizer", None)
    with pytest.raises(ImportError, match=r'pip install "deep_optim\[hf\]"'):
        for_trainer("Momentum", SimpleNamespace(learning_rate=1e-3, weight_decay=0.0))
