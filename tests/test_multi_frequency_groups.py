"""Periods and reductions of groups: where they may stand, what is refused, and when they may change."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from deep_optim import Momentum, MultiFrequency, param_groups
from periods import LR, give, sgd, two_groups
from problem import (
    copy_params,
    make_model,
    make_params,
    model_loss,
    train,
)


def test_a_late_group_begins_its_chunk_when_it_is_added() -> None:
    """In the wrapped optimizer too; with the reduction of the constructor, and period 1 unless it says otherwise."""
    optimizer, params = sgd([1, 3], reduction="sum")
    train(optimizer, params, [0])
    late, later = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    optimizer.add_param_group({"params": [late], "period": 2})
    optimizer.add_param_group({"params": [later]})
    assert optimizer.param_groups is optimizer.optimizer.param_groups and len(optimizer.param_groups) == 4
    moved = []
    for value in (1.0, 2.0, 4.0):
        for param in (*params, late, later):
            give(param, value)
        optimizer.step()
        moved.append((-late[0].item(), -later[0].item()))
    assert moved == [(0.0, 1.0), (3.0, 3.0), (3.0, 7.0)]


@pytest.mark.parametrize("bad", [0, -1, 1.0, 2.5, float("nan"), True, "3", None, torch.tensor(2)], ids=repr)
def test_what_is_no_period_is_refused_before_anything_is_written(bad: Any) -> None:
    """In the constructor's list and dict, in a group, in a late group, and in a group that was changed."""
    params = make_params([(3,), (4,)])
    for periods, key in (([1, bad], 1), ({"slow": bad}, 1), (None, bad)):
        wrapped = SGD(two_groups(params), lr=LR)
        if periods is None:
            wrapped.param_groups[1]["period"] = key
        before = [set(group) for group in wrapped.param_groups]
        with pytest.raises(ValueError, match=r"Invalid period value"):
            MultiFrequency(wrapped, periods)
        assert [set(group) for group in wrapped.param_groups] == before
    optimizer = MultiFrequency(SGD(params[:1], lr=LR))
    with pytest.raises(ValueError, match=r"Invalid period value"):
        optimizer.add_param_group({"params": params[1:], "period": bad})
    assert len(optimizer.param_groups) == 1
    if bad not in (1.0, True):  # which Python takes for 1
        optimizer.param_groups[0]["period"] = bad
        with pytest.raises(ValueError, match=r"Invalid period value"):
            train(optimizer, params, [0])


@pytest.mark.parametrize(
    ("periods", "words"),
    [
        ([2], "1 periods for 2 parameter groups"),
        ([1, 2, 3], "3 periods for 2 parameter groups"),
        ({"slow": 2, "medium": 4}, "no parameter group has the name 'medium'"),
        (4, "Invalid periods: 4"),
        ("12", "Invalid periods: '12'"),
    ],
    ids=str,
)
def test_periods_must_match_the_groups(periods: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sgd(periods)


def test_periods_may_be_named_or_live_in_the_groups() -> None:
    """A name may stand for several groups; what is not named keeps what it has."""
    params = make_params([(1,), (2,), (3,), (4,)])
    groups = [{"params": [param], "name": name} for param, name in zip(params, "abac", strict=True)]
    groups[1]["period"] = 5
    assert [g["period"] for g in MultiFrequency(SGD(groups, lr=LR), {"a": 2}).param_groups] == [2, 5, 2, 1]


@pytest.mark.parametrize(
    ("wrapped", "error", "words"),
    [
        (lambda p: p, TypeError, "wraps a torch optimizer without periods, got list"),
        (lambda p: MultiFrequency(SGD(p, lr=LR)), TypeError, "without periods, got MultiFrequency"),
        (lambda p: torch.optim.LBFGS(p), ValueError, "LBFGS calls its closure itself"),
        (lambda p: AdamW([{"params": p, "period": 2}], differentiable=True), RuntimeError, "differentiable"),
    ],
    ids=["list", "nested", "LBFGS", "differentiable"],
)
def test_what_cannot_be_wrapped_is_refused_in_words(wrapped: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MultiFrequency(wrapped(make_params([(3,)])))


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid reduction: 'max'"):
        sgd([1, 2], reduction="max")
    with pytest.raises(ValueError, match="Invalid reduction: 'max'"):
        sgd([1, 2])[0].add_param_group({"params": make_params([(3,)]), "reduction": "max"})


def test_the_reduction_may_differ_between_groups() -> None:
    """It is a key of groups like any other."""
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "reduction": "sum"}]
    optimizer = MultiFrequency(SGD(groups, lr=1.0), [2, 2])
    for value in (1.0, 3.0):
        for param in params:
            give(param, value)
        optimizer.step()
    assert [-param[0].item() for param in params] == [2.0, 4.0]


def test_a_group_that_came_in_past_it_is_refused_at_the_next_step() -> None:
    """And so are the periods that are lost when a checkpoint is loaded into the wrapped optimizer alone."""
    optimizer, params = sgd([1, 2])
    plain = SGD(two_groups(copy_params(params)), lr=1.0).state_dict()
    optimizer.optimizer.add_param_group({"params": make_params([(3,)])})
    for _ in range(2):
        with pytest.raises(ValueError, match="a parameter group has no period"):
            train(optimizer, params, [0])
        optimizer, params = sgd([1, 2])
        optimizer.optimizer.load_state_dict(plain)


def test_a_period_may_change_during_training() -> None:
    """A chunk ends once it is long enough; at period 1 nothing of it is left behind, and a new one may begin."""
    optimizer, (fast, slow) = sgd([1, 4], reduction="sum")
    moved = []
    for step, period in enumerate((4, 4, 3, 3, 1, 1, 2, 2)):
        optimizer.param_groups[1]["period"] = period
        give(fast, 1.0)
        give(slow, 2.0**step)
        optimizer.step()
        moved.append(-slow[0].item())
        assert (slow in optimizer.state) == ("chunk_step" in optimizer.param_groups[1]) == (period != 1)
    assert moved == [0, 0, 7, 7, 31, 63, 63, 255]


def test_trains_the_groups_of_a_model() -> None:
    """With this package's optimizers and groups: matrices slow, everything else fast."""
    model = make_model()
    groups = param_groups(model)
    groups[0]["period"] = 4
    optimizer = MultiFrequency(Momentum(groups, lr=0.05))
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = model_loss(model, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(isinstance(each, Optimizer) for each in (optimizer, optimizer.optimizer))
    assert "MultiFrequency(Momentum (" in repr(optimizer) and "period: 4" in repr(optimizer)
