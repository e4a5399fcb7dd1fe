"""What every optimizer owes torch.distributed.checkpoint, in one process."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from cases import LR, Case, every
from problem import assert_same, make_model, model_loss, snapshot


def fit(model: nn.Module, optimizer: Any, steps: range) -> None:
    """Train the model on its own gradients."""
    for step in steps:
        optimizer.zero_grad()
        model_loss(model, step).backward()
        optimizer.step()


@every()
@pytest.mark.parametrize("flat, dtype", [(False, torch.bfloat16), (True, torch.float32)], ids=["nested", "flat"])
def test_round_trip_by_name_into_a_fresh_optimizer(case: Case, flat: bool, dtype: torch.dtype) -> None:
    """Saved by parameter name, loaded into an optimizer whose state torch first has to make up."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = make_model(dtype=dtype)
    optimizer = case.make(model.parameters())
    fit(model, optimizer, range(3))
    optimizer.zero_grad()
    saved = deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other = deepcopy(model)
    resumed = case.make(other.parameters(), lr=1.0)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert resumed.param_groups[0]["lr"] == LR
    assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"])
    fit(model, optimizer, range(3, 6))
    fit(other, resumed, range(3, 6))
    assert_same(snapshot(other.parameters()), snapshot(model.parameters()))


@every()
def test_asking_an_untrained_optimizer_for_its_state_moves_nothing(case: Case) -> None:
    """torch takes one step of zero gradients to see what there is to save."""
    model = make_model()
    before = snapshot(model.parameters())
    optimizer = case.make(model.parameters(), weight_decay=0.5)
    saved = get_optimizer_state_dict(model, optimizer)
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    assert_same(snapshot(model.parameters()), before)
    assert optimizer.param_groups[0]["lr"] == LR


@every(beyond_torch="counts the empty step")
def test_asking_an_untrained_optimizer_for_its_state_changes_no_later_step(case: Case) -> None:
    """Two runs, one of which was asked for its state before the first step, are the same run."""
    asked, plain = make_model(), make_model()
    optimizers = [case.make(model.parameters()) for model in (asked, plain)]
    get_optimizer_state_dict(asked, optimizers[0])
    fit(asked, optimizers[0], range(3))
    fit(plain, optimizers[1], range(3))
    assert_same(snapshot(asked.parameters()), snapshot(plain.parameters()))
