"""DDP, FSDP2, ZeroRedundancyOptimizer and torch.distributed.checkpoint on two and four ranks."""

from typing import Any

import pytest
import torch

from deep_optim import list_optimizers
from parallel_runs import Model, everything, fit, load, make, on_four, on_two
from problem import assert_same
from ranks import on_ranks

pytestmark = pytest.mark.xdist_group("ranks")

NAMES = [*list_optimizers(), "MultiFrequency"]
KEYED = ["DGD", "InputDeltaMomentum"]
SOME = ["Momentum", "DMGD", "M3"]  # one of each kind of state
CHECKPOINTED = [(name, 3) for name in NAMES] + [("Momentum", 0), ("M3", 0)]  # 3: in the middle of a chunk of two
ON_FOUR = [("DMGD", 3), ("M3", 3), ("MultiFrequency", 3), ("Momentum", 0)]

Told = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def told(folder: str) -> Told:
    """What each rank tells of all its runs, by the number of ranks."""
    two = on_ranks(2, on_two, NAMES, SOME, CHECKPOINTED, folder)
    return {2: two, 4: on_ranks(4, on_four, SOME, ON_FOUR, folder)}


def alone(name: str, steps: int) -> dict[str, Any]:
    model = Model()
    optimizer = make(name, model)
    fit(model, optimizer, range(steps))
    return everything(model, optimizer)


def assert_close(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_replicas_stay_the_same_bit_for_bit(told: Told, name: str) -> None:
    """DDP: every rank steps by itself; weights, memories and counters never part."""
    first, second = (rank["ddp"][name] for rank in told[2])
    assert_same(second, first)


@pytest.mark.parametrize("name", NAMES)
def test_replicas_step_as_one_process_with_the_whole_batch(told: Told, name: str) -> None:
    """Also where a memory is keyed by inputs, of which each rank has seen its own."""
    assert_close(told[2][0]["ddp"][name], alone(name, 4), 1e-4)  # gradients are summed in another order


@pytest.mark.parametrize(
    "kind, name",
    [("fsdp", name) for name in NAMES]
    + [(kind, name) for kind in ("fsdp in bfloat16", "fsdp with offload") for name in SOME],
)
def test_fully_sharded_training_steps_as_one_process(told: Told, name: str, kind: str) -> None:
    """A tied weight, a frozen layer, clipping; one process steps along the same gradients."""
    for rank in told[2]:
        torch.testing.assert_close(
            rank[kind][name]["sharded"]["params"], rank[kind][name]["alone"]["params"], rtol=1e-6, atol=1e-6
        )
        assert_close(rank[kind][name]["sharded"], rank[kind][name]["alone"], 1e-5)


@pytest.mark.parametrize("kind", ["fsdp", "tensor parallel"])
@pytest.mark.parametrize("name", SOME)
def test_sharded_on_a_mesh_of_two_dimensions_it_steps_as_one_process(told: Told, name: str, kind: str) -> None:
    """Replicas of shards; shards of the shares of tensor parallelism, whose strided rows are gathered on every rank."""
    for rank in told[4]:
        torch.testing.assert_close(
            rank[kind][name]["sharded"]["params"], rank[kind][name]["alone"]["params"], rtol=1e-6, atol=1e-6
        )
        assert_close(rank[kind][name]["sharded"], rank[kind][name]["alone"], 1e-5)


@pytest.mark.parametrize("name", KEYED)
def test_sharded_memories_are_keyed_by_the_inputs_of_all_ranks(told: Told, name: str) -> None:
    assert_close(told[2][0]["inputs"][name], alone(name, 4), 1e-4)


@pytest.mark.parametrize("name", SOME)
def test_zero_redundancy_optimizer_changes_nothing(told: Told, name: str) -> None:
    for rank in told[2]:
        assert_same(rank["zero"][name]["sharded"], rank["zero"][name]["plain"])


@pytest.mark.parametrize("name, steps", CHECKPOINTED)
def test_a_checkpoint_of_two_ranks_goes_on_on_four_and_on_one(told: Told, folder: str, name: str, steps: int) -> None:
    """Saved in the middle of chunks, or before the first step, where torch makes state up to have some to save."""
    saved = told[2][0]["saved"][f"{name} {steps}"]
    assert_close(saved, alone(name, steps + 3), 1e-4)
    if (name, steps) in ON_FOUR:
        assert_close(told[4][0]["loaded"][f"{name} {steps}"], saved, 1e-4)
    assert_close(load(name, folder, steps), saved, 1e-4)
