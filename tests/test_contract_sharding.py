"""What every optimizer owes torch's sharding wrappers, in a process group of one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from cases import LR, Case, every
from deep_optim import capture_inputs
from deep_optim.optimizers.sharded_step import on_whole
from problem import assert_same, copy_params, make_model, make_params, model_loss, train


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in a process group of this process alone."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every()
def test_zero_redundancy_optimizer_shards_it(case: Case) -> None:
    """It builds cls(params, **keywords) for the share of each rank, and copies the groups' values over."""
    params = make_params()
    plain = case.make(copies := copy_params(params))
    sharded = ZeroRedundancyOptimizer(case.groups(params), case.cls, lr=LR, **case.kwargs)
    assert_same(train(sharded, params, range(3)), train(plain, copies, range(3)))
    sharded.consolidate_state_dict()
    assert_same(sharded.state_dict()["state"], plain.state_dict()["state"])


def whole(tensor: Any) -> Tensor:
    """Return the tensor that a DTensor is a share of."""
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


@every()
def test_fully_sharded_parameters_train(case: Case) -> None:
    """FSDP2: parameters, gradients and state are DTensors, which do not mix with plain tensors."""
    sharded, plain = make_model(), make_model()
    fully_shard(sharded)
    optimizers = [(model, case.make(model.parameters())) for model in (sharded, plain)]
    for step in range(2):
        for model, optimizer in optimizers:
            optimizer.zero_grad()
            model_loss(model, step).backward()
            optimizer.step()
    for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(ours).detach(), theirs.detach())  # float32: other kernels


@pytest.mark.parametrize("split", [1, 2])
def test_what_is_needed_whole_is_computed_in_stacks(split: int) -> None:
    """Matrices of one shape together, sharded or not, and each answer where its question was."""
    mesh = init_device_mesh("cpu", (1,))
    plain = [torch.full(shape, float(i)) for i, shape in enumerate([(6, 4), (4, 6), (6, 4), (6, 4)])]
    sharded = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in plain]
    stacks = []

    def function(stacked: Tensor) -> Tensor:
        stacks.append(tuple(stacked.shape))
        return (stacked + 10).double()

    answers = on_whole([*plain, *sharded], function, {"split": split}, {})
    assert_same(answers, [tensor + 10 for tensor in plain] * 2)
    assert sorted(stacks) == sorted([(3 * split, 6 // split, 4), (split, 4 // split, 6)] * 2)


def test_inputs_of_tensor_parallel_layers_are_refused_in_words() -> None:
    model = parallelize_module(nn.Linear(4, 6), init_device_mesh("cpu", (1,)), ColwiseParallel())
    with capture_inputs(model), pytest.raises(RuntimeError, match=r"tensor parallelism.*missing='gradient'"):
        model(torch.ones(3, 4))
    model(torch.ones(3, 4))
