"""Checkpoints of update frequencies: in mid-chunk, by name, and those that do not fit."""

import pickle
from collections import defaultdict
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
from torch.optim import AdamW

from deep_optim import Momentum, MultiFrequency
from periods import LR, Make, inner, sgd, two_groups
from problem import (
    assert_same,
    copy_params,
    make_model,
    make_params,
    model_loss,
    snapshot,
    train,
)
from test_contract_loading import through_a_file


@inner
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumes_bit_for_bit_in_mid_chunk(make: Make, dtype: torch.dtype) -> None:
    """Saved at every position of the chunk, through a file."""
    for saved in range(1, 8):
        params = make_params([(6, 4), (3, 5), (4, 3)], dtype)
        optimizer = MultiFrequency(make(two_groups(params)), [1, 3])
        train(optimizer, params, range(saved))
        resumed = MultiFrequency(make(two_groups(copies := copy_params(params))), [1, 3])
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"])
        more = range(saved, saved + 4)
        assert_same(train(resumed, copies, more), train(optimizer, params, more))


def test_loading_copies_the_chunk() -> None:
    """A later step must not write into a checkpoint that is held in memory."""
    optimizer, params = sgd([1, 3])
    train(optimizer, params, [0])
    saved = optimizer.state_dict()
    kept = deepcopy(saved["state"])
    resumed, copies = sgd([1, 3])
    resumed.load_state_dict(saved)
    train(resumed, copies, [1])
    assert_same(saved["state"], kept)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_resumes_from_a_distributed_checkpoint_in_mid_chunk(flat: bool) -> None:
    """Saved by name, into an optimizer whose state torch first makes by an empty step, which is no part of a chunk."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def build(model: nn.Module) -> MultiFrequency:
        params = list(model.parameters())
        return MultiFrequency(Momentum([{"params": params[:2]}, {"params": params[2:]}], lr=LR), [1, 4])

    def fit(model: nn.Module, optimizer: MultiFrequency, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model_loss(model, step).backward()
            optimizer.step()

    model = make_model()
    optimizer = build(model)
    fit(model, optimizer, range(6))
    optimizer.zero_grad()
    saved = deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed = build(other := deepcopy(model))
    set_optimizer_state_dict(other, resumed, saved, options=options)
    fit(model, optimizer, range(6, 13))
    fit(other, resumed, range(6, 13))
    assert_same(snapshot(other.parameters()), snapshot(model.parameters()))


def spoiled(name: str, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint that is not this optimizer's."""
    state_dict = deepcopy(state_dict)
    if name == "plain":
        for group in state_dict["param_groups"]:
            del group["period"]
    elif name == "period":
        state_dict["param_groups"][1]["period"] = 4
    elif name == "no chunk":
        del state_dict["state"][1]["chunk_count"]
    elif name == "shape":
        state_dict["state"][1]["chunk_sum"] = torch.zeros(9)
    elif name == "inner":  # which Momentum refuses
        state_dict["state"][1]["exp_avg"] = state_dict["state"][1].pop("memory")
    return state_dict


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "plain",
            "period None in group 1, not 3; a checkpoint made without MultiFrequency is loaded into the optimizer",
        ),
        ("period", "period 4 in group 1, not 3"),
        ("no chunk", r"no chunk of gradients for a parameter of size \(3, 5\)"),
        ("shape", r"chunk_sum of size \(9,\) for a parameter of size \(3, 5\)"),
        ("inner", "has no memory"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_whole(name: str, words: str) -> None:
    """In words, and with nothing half loaded."""
    params = make_params([(6, 4), (3, 5)])
    optimizer = MultiFrequency(Momentum(two_groups(params), lr=LR), [1, 3])
    train(optimizer, params, range(5))
    other = MultiFrequency(Momentum(two_groups(copies := make_params([(6, 4), (3, 5)], seed=1)), lr=LR / 2), [1, 3])
    train(other, copies, range(4))
    before = deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(spoiled(name, optimizer.state_dict()))
    assert_same(other.state_dict()["state"], before["state"])
    assert other.state_dict()["param_groups"] == before["param_groups"]


def test_a_plain_checkpoint_goes_into_the_optimizer_before_it_is_wrapped() -> None:
    """As the refusal says; where nothing is slow, there is nothing to refuse."""
    plain = AdamW(two_groups(params := make_params([(3,), (4,)])), lr=LR)
    train(plain, params, range(3))
    inside = AdamW(two_groups(copies := copy_params(params)), lr=1.0)
    inside.load_state_dict(deepcopy(plain.state_dict()))
    train(MultiFrequency(inside, [1, 2]), copies, range(2))
    assert inside.state[copies[1]]["step"] == 4
    fast = MultiFrequency(AdamW(two_groups(copies := copy_params(params)), lr=1.0))
    fast.load_state_dict(deepcopy(plain.state_dict()))
    assert_same(train(fast, copies, range(3, 5)), train(plain, params, range(3, 5)))


@pytest.mark.parametrize("way", [deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_a_copy_carries_the_chunk_under_way(way: Any) -> None:
    """And shares nothing with the optimizer it was copied from."""
    params = make_params([(3,), (4,)])
    optimizer = MultiFrequency(AdamW(two_groups(params), lr=LR), [1, 3], reduction="sum")
    train(optimizer, params, range(4))
    copy, copies = way((optimizer, params))
    assert copy.reduction == "sum" and copy.param_groups[1]["params"][0] is copies[1]
    after = train(copy, copies, range(4, 8))
    assert_same(train(optimizer, params, range(4, 8)), after)


def test_saving_leaves_no_hook_behind() -> None:
    """A hook that is put first after a save still has its say in the next."""
    optimizer, _ = sgd([1, 3])
    optimizer.state_dict()
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "epoch": 4}, prepend=True)
    assert optimizer.state_dict()["epoch"] == 4


def test_a_load_hook_may_write_into_the_dict_it_is_given() -> None:
    """It is a shallow copy, as with any torch optimizer."""
    optimizer, params = sgd([1, 3])
    train(optimizer, params, [0])
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda o, given: given.update(state={}))
    optimizer.load_state_dict(saved)
    assert saved["state"] and not optimizer.state


def test_hooks_of_both_run_around_saving_and_loading() -> None:
    """Those of this optimizer see all of it; those of the wrapped one see what it sees without chunks."""
    optimizer, params = sgd([1, 3])
    train(optimizer, params, [0])
    calls: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(("pre", o)))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "outer": "inner" in saved})
    optimizer.optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "inner": True})
    saved = optimizer.state_dict()
    assert calls == [("pre", optimizer)] and saved["outer"] is True
    assert saved["state"][1]["chunk_count"] == 1

    resumed, copies = sgd([1, 3])
    resumed.register_load_state_dict_pre_hook(lambda o, given: {**given, "state": {1: halved(given["state"][1])}})
    resumed.optimizer.register_load_state_dict_pre_hook(lambda o, given: calls.append(given["state"]))
    resumed.register_load_state_dict_post_hook(lambda o: calls.append(o.state[copies[1]]["chunk_sum"].clone()))
    resumed.load_state_dict(saved)
    assert calls[1] == {}
    assert_same(calls[2], params[1].grad / 2)
    assert_same(optimizer.state[params[1]]["chunk_sum"], params[1].grad)  # the dict given stays whole


def halved(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "chunk_sum": state["chunk_sum"] / 2}


def test_resetting_the_state_reaches_the_wrapped_optimizer() -> None:
    """Between tasks, users write `optimizer.state = defaultdict(dict)`."""
    params = make_params([(3,), (4,)])
    optimizer = MultiFrequency(AdamW(two_groups(params), lr=LR), [1, 2])
    train(optimizer, params, range(4))
    optimizer.state = defaultdict(dict)
    fresh = MultiFrequency(AdamW(two_groups(copies := copy_params(params)), lr=LR), [1, 2])
    assert_same(train(optimizer, params, range(3)), train(fresh, copies, range(3)))
