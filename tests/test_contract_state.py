"""What every optimizer owes its checkpoints: a state that says everything, in a form that every format can hold."""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Case, every
from problem import assert_same, make_params, train

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@every()
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_state_holds_plain_tensors_and_nothing_else(case: Case, dtype: torch.dtype) -> None:
    """Keyed by the parameters themselves; numbers, lists and None do not survive every checkpoint format."""
    optimizer, params = case.mid_training(dtype)
    assert set(optimizer.state) == set(params)
    for state in optimizer.state.values():
        assert state, "an empty state is no state"
        assert {type(value) for value in state.values()} == {Tensor}
        assert all(isinstance(name, str) for name in state)
        assert "step" not in state or (state["step"].ndim == 0 and state["step"].item() == 3)


def dtypes_of(optimizer: Any) -> set[torch.dtype]:
    """Return the dtypes of the floating-point state; the counter `step` is torch's own affair."""
    states = [{**state} for state in optimizer.state.values()]
    return {v.dtype for state in states for name, v in state.items() if name != "step" and v.is_floating_point()}


@every()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_state_is_as_precise_as_the_parameter(case: Case, dtype: torch.dtype) -> None:
    """A float64 run is float64 throughout."""
    assert dtypes_of(case.mid_training(dtype)[0]) == {dtype}


@every(beyond_torch="keeps the moments of a bfloat16 parameter in bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_state_is_never_less_precise_than_float32(case: Case, dtype: torch.dtype) -> None:
    """Small gradients must not vanish in a sum of few bits."""
    assert dtypes_of(case.mid_training(dtype)[0]) == {torch.float32}


@every()
def test_state_dict_hooks_run(case: Case) -> None:
    """Before saving and after; the second may replace the dict."""
    optimizer, _ = case.mid_training()
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "epoch": 4})
    assert optimizer.state_dict()["epoch"] == 4 and calls == ["before"]


@every()
def test_state_dict_is_a_function_of_the_run(case: Case) -> None:
    """Same run, same dict: values, and the order of the keys in the file."""
    (one, _), (other, _) = case.mid_training(), case.mid_training()
    assert_same(one.state_dict()["state"], other.state_dict()["state"])
    assert repr(one.state_dict()) == repr(other.state_dict()) == repr(one.state_dict())


@every()
@pytest.mark.parametrize("way", [deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_a_copy_trains_on_by_itself(case: Case, way: Any) -> None:
    """The copy continues the same run on its own parameters, and the two no longer touch."""
    optimizer, params = case.mid_training()
    copy, copies = way((optimizer, params))
    assert type(copy) is type(optimizer) and copy.param_groups[0]["params"][0] is copies[0]
    before = deepcopy(optimizer.state_dict()["state"])
    after = train(copy, copies, range(3, 7))
    assert_same(optimizer.state_dict()["state"], before)
    assert_same(train(optimizer, params, range(3, 7)), after)
    copy.add_param_group({"params": make_params([(2, 2)])})
    assert len(optimizer.param_groups) == 1
