"""What every optimizer owes load_state_dict: the run goes on bit for bit, and the caller's dict stays the caller's."""

import gc
import inspect
import io
import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import LR, Case, every
from problem import assert_same, copy_params, make_params, set_grads, train

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLAGS = ("foreach", "maximize", "capturable", "differentiable", "fused")


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Save and load as a careful user does: no pickled code."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every()
@pytest.mark.parametrize(
    ("dtype", "steps"),
    [(torch.float32, 1), (torch.float32, 10), (torch.bfloat16, 3), (torch.float64, 3)],
    ids=lambda value: str(value),
)
def test_resumes_bit_for_bit_from_a_file(case: Case, dtype: torch.dtype, steps: int) -> None:
    """Saved after `steps`, loaded with weights_only into a fresh optimizer, trained on: the same run."""
    optimizer, params = case.mid_training(dtype, steps)
    resumed = case.make(copies := copy_params(params), lr=1.0)  # the file knows better
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"])
    more = range(steps, steps + 4)
    assert_same(train(resumed, copies, more), train(optimizer, params, more))
    assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"])


@every(beyond_torch="casts every state tensor to the dtype of its parameter")
def test_loading_keeps_the_precision_of_the_file(case: Case) -> None:
    """A float32 run continued with bfloat16 weights keeps its float32 memory."""
    optimizer, params = case.mid_training()
    low = case.make([param.detach().bfloat16().requires_grad_() for param in params])
    low.load_state_dict(optimizer.state_dict())
    assert_same(low.state_dict()["state"], optimizer.state_dict()["state"])


@every()
@pytest.mark.parametrize("saved", [torch.float32, torch.float64], ids=["from fp32", "from fp64"])
def test_a_checkpoint_continues_in_any_dtype(case: Case, saved: torch.dtype) -> None:
    """Whatever became of the weights, the next steps run, and save and load again."""
    optimizer, params = case.mid_training(saved)
    for dtype in FLOATS:
        other = [param.detach().clone().to(dtype).requires_grad_() for param in params]
        resumed = case.make(other)
        resumed.load_state_dict(deepcopy(optimizer.state_dict()))
        assert all(param.isfinite().all() for param in train(resumed, other, range(3, 5))), dtype
        resumed.load_state_dict(through_a_file(resumed.state_dict()))
        train(resumed, other, range(5, 6))


@every(beyond_torch="goes on writing into the tensors it was given")
def test_loading_copies(case: Case) -> None:
    """The dict belongs to whoever gave it: a later step must not rewrite a checkpoint held in memory."""
    optimizer, params = case.mid_training()
    given = optimizer.state_dict()
    kept = deepcopy(given["state"])
    resumed = case.make(copies := copy_params(params))
    resumed.load_state_dict(given)
    train(resumed, copies, range(3, 5))
    assert_same(given["state"], kept)


@every("class", beyond_torch="keeps the very tensors it was given")
def test_loading_holds_on_to_nothing(case: Case) -> None:
    """When the dict is gone, so is its memory, however many times one loads."""
    optimizer, params = case.mid_training()
    given = deepcopy(optimizer.state_dict())
    tensors = [weakref.ref(value) for state in given["state"].values() for value in state.values()]
    resumed = case.make(copy_params(params))
    resumed.load_state_dict(given)
    del given
    gc.collect()
    assert not any(tensor() is not None for tensor in tensors)


@every()
def test_loading_takes_state_dict_by_name_and_leaves_it_whole(case: Case) -> None:
    """torch.distributed.checkpoint passes it by keyword."""
    optimizer, params = case.mid_training()
    given = optimizer.state_dict()
    keys, groups = {key: set(state) for key, state in given["state"].items()}, deepcopy(given["param_groups"])
    assert "state_dict" in inspect.signature(case.cls.load_state_dict).parameters
    case.make(copy_params(params)).load_state_dict(state_dict=given)
    assert {key: set(state) for key, state in given["state"].items()} == keys and given["param_groups"] == groups


@every()
@pytest.mark.parametrize("returns", [True, False], ids=["returned", "in place"])
def test_a_load_pre_hook_decides_what_is_loaded(case: Case, returns: bool) -> None:
    """Both ways a hook may alter the dict: a new one returned, or the shallow copy it was handed."""
    optimizer, params = case.mid_training(torch.bfloat16)
    resumed = case.make(copy_params(params))

    def double(_: Any, given: dict[str, Any]) -> dict[str, Any] | None:
        given["state"] = {
            key: {name: value if name == "step" else 2 * value for name, value in state.items()}
            for key, state in given["state"].items()
        }
        return dict(given) if returns else None

    resumed.register_load_state_dict_pre_hook(double)
    resumed.load_state_dict(optimizer.state_dict())
    for new, old in zip(resumed.state.values(), optimizer.state.values(), strict=True):
        assert_same({**new}, {name: value if name == "step" else 2 * value for name, value in old.items()})


@every()
def test_a_load_post_hook_sees_the_state_and_has_the_last_word(case: Case) -> None:
    """It runs when everything is in its place, and nothing is put over what it writes."""
    optimizer, params = case.mid_training(torch.bfloat16)
    resumed = case.make(copies := copy_params(params))
    seen = {}

    def zero(loaded: Any) -> None:
        seen.update(deepcopy(loaded.state_dict()["state"]))
        for state in loaded.state.values():
            for value in state.values():
                value.zero_()

    resumed.register_load_state_dict_post_hook(zero)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    assert_same(seen, optimizer.state_dict()["state"])
    assert not any(value.any() for copy in copies for value in resumed.state[copy].values())


@every()
def test_loading_restores_the_groups(case: Case) -> None:
    """Values and marks of every group come from the file."""
    params = make_params()
    saved = case.make([{"params": params[:2], "lr": 0.5, "name": "a"}, {"params": params[2:], "weight_decay": 0.25}])
    loaded = case.make([{"params": params[:2]}, {"params": params[2:]}])
    loaded.load_state_dict(through_a_file(saved.state_dict()))
    assert loaded.state_dict()["param_groups"] == saved.state_dict()["param_groups"]
    assert loaded.param_groups[0]["params"][0] is params[0]


@every()
@pytest.mark.parametrize("change", ["groups", "parameters"])
def test_loading_refuses_other_groups(case: Case, change: str) -> None:
    """Torch's errors for a checkpoint of another model; the optimizer stays as it was."""
    optimizer, params = case.mid_training()
    before = deepcopy(optimizer.state_dict()["state"])
    other = case.make([{"params": params[:2]}, {"params": params[2:]}] if change == "groups" else params[1:])
    words = "different number of parameter groups" if change == "groups" else "doesn't match the size"
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(other.state_dict())
    assert_same(optimizer.state_dict()["state"], before)


@every()
def test_an_untrained_state_dict_loads(case: Case) -> None:
    """Accelerate saves and loads at once, before the first step."""
    params = make_params()
    optimizer, twin = case.make(params), case.make(copies := copy_params(params))
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state
    assert_same(train(optimizer, params, range(3)), train(twin, copies, range(3)))


@every()
def test_a_partly_filled_state_dict_loads(case: Case) -> None:
    """Parameters that had no gradient yet are absent, and begin at their first."""
    optimizer, twin = case.make(params := make_params()), case.make(copies := copy_params(params))
    for each, tensors in ((optimizer, params), (twin, copies)):
        set_grads(tensors, 0)
        tensors[1].grad = None
        each.step()
    resumed = case.make(again := copy_params(params))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert again[1] not in resumed.state
    assert_same(train(resumed, again, range(1, 4)), train(twin, copies, range(1, 4)))


@every()
def test_a_checkpoint_from_before_the_flags_loads(case: Case) -> None:
    """A missing key means its default."""
    optimizer, params = case.mid_training()
    older = deepcopy(optimizer.state_dict())
    for flag in FLAGS:
        del older["param_groups"][0][flag]
    resumed = case.make(copies := copy_params(params))
    resumed.load_state_dict(older)
    assert {flag: resumed.param_groups[0][flag] for flag in FLAGS} == {flag: optimizer.defaults[flag] for flag in FLAGS}
    assert_same(train(resumed, copies, range(3, 5)), train(optimizer, params, range(3, 5)))


@every(beyond_torch="fills in its flags alone", raises=KeyError)
def test_a_checkpoint_from_before_a_hyper_parameter_loads(case: Case) -> None:
    """A knob added by a later version starts at what the running constructor says, and training goes on."""
    optimizer, params = case.mid_training()
    older = deepcopy(optimizer.state_dict())
    older["param_groups"] = [{"params": older["param_groups"][0]["params"], "lr": LR, **case.group}]
    resumed = case.make(copies := copy_params(params))
    resumed.load_state_dict(older)
    assert_same(train(resumed, copies, range(3, 5)), train(optimizer, params, range(3, 5)))


@every()
def test_a_step_saved_as_a_number_loads(case: Case) -> None:
    """Checkpoints of older trainers count in Python."""
    optimizer, params = case.mid_training()
    older = deepcopy(optimizer.state_dict())
    for state in older["state"].values():
        if "step" in state:
            state["step"] = state["step"].item()
    resumed = case.make(copies := copy_params(params))
    resumed.load_state_dict(older)
    assert all(isinstance(value, Tensor) for state in resumed.state.values() for value in state.values())
    assert_same(train(resumed, copies, range(3, 5)), train(optimizer, params, range(3, 5)))
