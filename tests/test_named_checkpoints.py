"""Checkpoints of named parameters: the names decide, and what is of another model is refused with nothing changed."""

from copy import deepcopy
from typing import Any

import pytest
from torch import nn

from cases import Case, every
from problem import assert_same, copy_params, make_params, train

NAMES = ("a.weight", "b.weight", "b.bias", "scale", "conv.weight")


def named(params: list[nn.Parameter], order: list[int], prefix: str = "") -> list[tuple[str, nn.Parameter]]:
    return [(prefix + NAMES[index], params[index]) for index in order]


def trained(case: Case, order: list[int], prefix: str = "") -> tuple[Any, list[nn.Parameter]]:
    params = make_params()
    optimizer = case.make(named(params, order, prefix))
    train(optimizer, params, range(3))
    return optimizer, params


@every(beyond_torch="goes by the order", raises=RuntimeError)
def test_names_decide_whose_state_is_whose(case: Case) -> None:
    """Parameters in another order, groups among them: the run goes on bit for bit, under the names it has now."""
    optimizer, params = trained(case, [0, 1, 2, 3, 4])
    copies = copy_params(params)
    resumed = case.make(named(copies, [4, 2, 0, 3, 1]))
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["param_names"] == [NAMES[index] for index in (4, 2, 0, 3, 1)]
    for new, old in zip(copies, params, strict=True):
        assert_same({**resumed.state[new]}, {**optimizer.state[old]})
    assert_same(train(resumed, copies, range(3, 6)), train(optimizer, params, range(3, 6)))


@every()
def test_a_prefix_on_every_name_leaves_it_to_the_order(case: Case) -> None:
    """A wrapper came or went."""
    optimizer, params = trained(case, [0, 1, 2, 3, 4], "module.")
    copies = copy_params(params)
    resumed = case.make(named(copies, [0, 1, 2, 3, 4]))
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    assert_same(train(resumed, copies, range(3, 6)), train(optimizer, params, range(3, 6)))


@every(beyond_torch="goes by the order")
@pytest.mark.parametrize("change", ["one missing", "one renamed"])
def test_other_names_are_refused_with_nothing_changed(case: Case, change: str) -> None:
    optimizer, _ = trained(case, [0, 1, 2, 3, 4])
    before = deepcopy(optimizer.state_dict())
    saved = deepcopy(optimizer.state_dict())
    group = saved["param_groups"][0]
    if change == "one missing":
        group["param_names"].pop(0)
        saved["state"].pop(group["params"].pop(0), None)
        words = r"missing are a\.weight; not among this optimizer's are none"
    else:
        group["param_names"][0] = "z.weight"
        words = r"missing are a\.weight; not among this optimizer's are z\.weight"
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict()["state"], before["state"])
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
