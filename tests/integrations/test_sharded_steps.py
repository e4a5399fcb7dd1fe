"""Sharded parameters on two and four ranks: the step of one process, spread, each matrix sent once each way."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scaling import COSTS
from cases import CASES
from problem import assert_same, make_params, train
from ranks import on_ranks
from sharded_runs import LAYOUTS, SHAPES, STEPS, SUB_MESHES, TWISTS, dtype_of, runs

pytestmark = pytest.mark.xdist_group("ranks")  # one worker starts them, once

TABLE = {case.id: case for case in CASES if not case.control}
ONLY_COMPUTED_OTHERWISE = (  # options by which nothing else travels than in another line
    "momentum-plain",
    "momentum-sign",
    "preconditioned-identity",
    "preconditioned-diagonal-identity",
    "preconditioned-shampoo-identity",
    "preconditioned-newton-schulz-adam",
    "delta-right",
    "delta-left",
    "delta-trace",
    "delta-inner-steps",
    "delta-no-inner-lr",
    "dmgd-adam",
    "m3-gradient",
    "input-delta-identity",
    "input-delta-adam",
    "dgd-adam",
)
ON_TWO = [(case, "rows") for case in TABLE if case not in ONLY_COMPUTED_OTHERWISE]
ON_TWO += [(case, f"rows, {twist}") for case in ("momentum", "delta") for twist in TWISTS if twist]
ON_FOUR = [(case, layout) for case in ("momentum", "dgd") for layout in LAYOUTS]  # one tensor travels; all do
ON_FOUR += [(case, "replicas") for case in ("dmgd", "m3")]
ENTRY_BY_ENTRY = (  # nothing is needed whole
    "momentum-identity",
    "momentum-adam",
    "momentum-adamw-rule",
    "preconditioned-diagonal-identity",
    "preconditioned-diagonal-adam",
    "multi-frequency-adam",
)
BOTH = [*((2, *pair) for pair in ON_TWO), *((4, *pair) for pair in ON_FOUR)]


@pytest.fixture(scope="module")
def told() -> dict[int, list[dict[str, Any]]]:
    """What each rank tells of all its runs, by the number of ranks."""
    return {2: on_ranks(2, runs, ON_TWO), 4: on_ranks(4, runs, ON_FOUR)}


Told = dict[int, list[dict[str, Any]]]


@functools.cache
def alone(case: str, twist: str = "") -> dict[str, Any]:
    """The same training in one process."""
    params = make_params(SHAPES, dtype_of(twist))
    optimizer = TABLE[case].make(params, **TWISTS[twist])
    train(optimizer, params, range(STEPS - 1))
    with FlopCounterMode(display=False) as flops:
        train(optimizer, params, range(STEPS - 1, STEPS))
    return {"params": params, "states": [optimizer.state[param] for param in params], "flops": flops.get_total_flops()}


def weights(run: dict[str, Any]) -> list[Tensor]:
    return [param.detach() for param in run["params"]]


def every_run(test: Any) -> Any:
    return pytest.mark.parametrize("world_size, case, layout", BOTH)(test)


@every_run
def test_the_step_is_that_of_one_process(told: Told, world_size: int, case: str, layout: str) -> None:
    expected = alone(case, layout.partition(", ")[2])
    for rank in told[world_size]:
        ours = rank[f"{case}, {layout}"]
        torch.testing.assert_close(weights(ours), weights(expected), rtol=1e-6, atol=1e-6)
        for new, old in zip(ours["states"], expected["states"], strict=True):
            torch.testing.assert_close(new, {**old}, rtol=1e-5, atol=1e-6)


@every_run
def test_state_is_sharded_as_its_parameter_or_the_same_on_every_rank(
    told: Told, world_size: int, case: str, layout: str
) -> None:
    first, *others = [rank[f"{case}, {layout}"] for rank in told[world_size]]
    assert first["elsewhere"] == []
    for other in others:
        assert_same(other["plain"], first["plain"])
        assert_same(other["params"], first["params"])


@every_run
def test_each_matrix_is_gathered_once_and_scattered_once(told: Told, world_size: int, case: str, layout: str) -> None:
    """One all_to_all each way in a batch, whatever the optimizer, and none where nothing is needed whole.

    Gradients in bfloat16 and memories in float32 are two messages.
    DMGD asks all ranks beforehand whether gradients are finite, and M3 orthogonalises its slow memories apart from the
    fast ones, at the beginning of a chunk.
    """
    calls = told[world_size][0][f"{case}, {layout}"]["calls"]
    group = TABLE[case].make(make_params()).param_groups[0]
    begins_chunk = group.get("mix") == "post" and group["alpha"] > 0 and (STEPS - 1) % group["chunk_size"] == 0
    exchanges = calls.pop("alltoall_base_", 0)
    if "in small batches" in layout:
        assert exchanges > 4 and exchanges % 2 == 0
    else:
        two_dtypes = "in bfloat16" in layout and case == "delta"
        assert exchanges == (0 if case in ENTRY_BY_ENTRY else 4 if begins_chunk else 2) + two_dtypes
    assert set(calls) <= ({"all_reduce"} if "nonfinite" in group else set())


@every_run
def test_the_work_is_spread(told: Told, world_size: int, case: str, layout: str) -> None:
    """Matrix products: all ranks together do those of one process, no rank more than 0.6 of them."""
    flops = [rank[f"{case}, {layout}"]["flops"] for rank in told[world_size]]
    total = alone(case)["flops"]
    assert sum(flops) == total * (2 if layout in SUB_MESHES else 1)
    assert max(flops) <= 0.6 * total


@pytest.mark.parametrize("case", ["momentum", "delta", "dmgd-no-hidden", "input-delta", "dgd", "m3"])
def test_what_is_sent_is_what_the_cost_model_says(told: Told, case: str) -> None:
    """`python -m benchmarks scaling` predicts from these bytes per entry of a matrix."""
    sent = sum(rank[f"{case}, rows"]["bytes"]["alltoall_base_"] for rank in told[2])
    matrices = [shape for shape in SHAPES if len(shape) > 1]
    cost = COSTS[TABLE[case].cls.__name__]
    expected = sum(math.prod(shape) for shape in matrices) * (cost.gathered + cost.scattered)
    if case == "m3":  # a chunk begins; and the sizes of rows go whole to both ranks
        expected += sum(math.prod(shape) * 8 + shape[0] * 4 * 2 for shape in matrices)
    assert sent == expected


@pytest.mark.parametrize("case", ["momentum", "delta", "dmgd-no-hidden", "input-delta", "dgd", "m3-no-slow-memory"])
def test_what_is_kept_is_what_the_cost_model_says(told: Told, case: str) -> None:
    states = [s for s, shape in zip(told[2][0][f"{case}, rows"]["states"], SHAPES, strict=True) if len(shape) > 1]
    kept = sum(v.numel() * v.element_size() for state in states for name, v in state.items() if name != "exp_avg_sq")
    kept -= sum(4 for state in states if "step" in state)
    entries = sum(math.prod(shape) for shape in SHAPES if len(shape) > 1)
    assert kept == entries * (COSTS[TABLE[case].cls.__name__].state - (8 if case == "m3-no-slow-memory" else 0))
