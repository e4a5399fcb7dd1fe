"""Captured inputs under DDP: summed over two ranks once, beside backward, whatever each rank calls."""

from typing import Any

import pytest
import torch

from captured_runs import COMPILED, RUNS, STEPS, alone, compiled_alone, compiled_on_two, on_two
from problem import assert_same
from ranks import on_ranks

pytestmark = pytest.mark.xdist_group("ranks")

SENT = "sent 5, buckets, step, called"  # the five layers in one buffer; at the step only the question what is left
LAUNCHES = dict.fromkeys(RUNS, [SENT] * STEPS) | {
    "accumulated without no_sync": [f"{'sent 5, buckets, ' * 3}step, called"] * STEPS,
    "a step left out": [f"{'sent 5, buckets, ' * 2}step, called"] * STEPS,
    "two passes and one backward": ["2 × sent 5, buckets, step, called"] * STEPS,
    "frozen": ["sent 2, buckets, step, called"] * STEPS,
    # what no rank has called until then is not sent again: here one expert; there what the checkpoint hides
    "other experts on each rank": [SENT, "sent 4, buckets, step, called"],
    "more experts in a later pass": [SENT, "sent 4, buckets, step, called"],
    "reentrant": [f"{SENT}, 4 × sum", "sent 1, buckets, step, called, 4 × sum"],
    "reentrant as a whole": ["buckets, step, called, 5 × sum"] * STEPS,
    "without the wrapper on one rank": [f"{SENT}, 3 × sum"] * STEPS,
}


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    return on_ranks(2, on_two)


@pytest.fixture(scope="module")
def told_of_graphs() -> list[dict[str, Any]]:
    return on_ranks(2, compiled_on_two)


def launches(log: list[str]) -> str:
    """A log in words: how many in a row, except of buckets, of which DDP makes more or fewer."""
    words: list[tuple[str, int]] = []
    for word in log:
        count = words.pop()[1] if words and words[-1][0] == word else 0
        words.append((word, count + 1))
    return ", ".join("buckets" if w == "bucket" else w if n == 1 else f"{n} × {w}" for w, n in words)


@pytest.mark.parametrize("given", ["wrapper", "model"])
@pytest.mark.parametrize("name", RUNS)
def test_ranks_key_by_the_inputs_of_all_of_them(told: list[dict[str, Any]], name: str, given: str) -> None:
    """As one process does that runs what each rank ran; and bit for bit the same on both ranks."""
    first, second = (rank[f"{name}, given the {given}"] for rank in told)
    assert_same([step["grams"] for step in first["steps"]], [step["grams"] for step in second["steps"]])
    torch.testing.assert_close([step["grams"] for step in first["steps"]], alone(name))
    assert_same(first["grads"], second["grads"])


@pytest.mark.parametrize("given", ["wrapper", "model"])
@pytest.mark.parametrize("name", RUNS)
def test_sums_are_sent_before_the_gradients_and_once(told: list[dict[str, Any]], name: str, given: str) -> None:
    """And arrive before the step, which itself only asks whether anything is left."""
    for rank in told:
        steps = rank[f"{name}, given the {given}"]["steps"]
        assert [launches(step["log"]) for step in steps] == LAUNCHES[name]
        assert all(step["arrived"] for step in steps)


def test_what_is_under_way_can_be_forgotten(told: list[dict[str, Any]]) -> None:
    for rank in told:
        assert rank["forgotten"]["nothing"] == {}
        assert rank["forgotten"]["after"] == [] and rank["forgotten"]["hooks"] == 0
        assert_same(rank["forgotten"]["second"], told[0]["forgotten"]["second"])
        usual = rank["usual, given the wrapper"]["steps"][0]["grams"]
        assert not torch.allclose(rank["forgotten"]["second"]["first"], usual["first"])


@pytest.mark.parametrize("run, log", [("copied", ["sent 5"]), ("other ranks", []), ("a part", [])])
def test_only_what_ddp_keeps_in_step_is_sent(told: list[dict[str, Any]], run: str, log: list[str]) -> None:
    """The model, by the ranks of DDP; no copy of it, no part of it, no other ranks."""
    for rank in told:
        assert rank[run]["log"] == log
        expected = alone("usual")[0]
        torch.testing.assert_close(rank[run]["grams"], {"first": expected["first"]} if run == "a part" else expected)


def test_a_model_of_one_layer_sends_what_it_has_just_seen(told: list[dict[str, Any]]) -> None:
    for rank in told:
        assert rank["one layer"]["log"] == ["sent 1"]
        torch.testing.assert_close(rank["one layer"]["grams"][""], alone("usual")[0]["first"])


def test_each_dtype_has_a_buffer(told: list[dict[str, Any]]) -> None:
    for rank in told:
        assert rank["two dtypes"]["log"] == ["sent 1", "sent 1"]
        low, high = rank["two dtypes"]["grams"]["low"], rank["two dtypes"]["grams"]["high"]
        assert (low.dtype, high.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(low.double(), high, rtol=0, atol=0.01)  # of inputs that were rounded


@pytest.mark.parametrize("how", COMPILED)
def test_compiled_models_agree(told_of_graphs: list[dict[str, Any]], how: str) -> None:
    """A graph sends nothing, nor does a rank that has given up compiling; around a graph inside DDP all is as ever."""
    for rank in told_of_graphs:
        assert_same(
            [step["grams"] for step in rank[how]["steps"]], [step["grams"] for step in told_of_graphs[0][how]["steps"]]
        )
        torch.testing.assert_close([step["grams"] for step in rank[how]["steps"]], compiled_alone())
        expected = "sent 5, step, called" if how == "within" else "step, called, 5 × sum"
        assert {launches(step["log"]) for step in rank[how]["steps"]} == {expected}
