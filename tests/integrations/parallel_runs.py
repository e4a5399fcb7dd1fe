"""What the ranks of test_parallel_training.py do: train one small model as DDP and FSDP2 do, beside one process."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from cases import LR
from deep_optim import MultiFrequency, create_optimizer

BATCH, LENGTH, WORDS, WIDTH = 8, 3, 11, 6  # rows that two and four ranks share unevenly
MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
OFFLOAD = CPUOffloadPolicy(pin_memory=False)


class Model(nn.Module):
    """A tied embedding, a frozen layer, two blocks with a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 10), nn.Tanh(), nn.Linear(10, WIDTH), nn.LayerNorm(WIDTH)) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.frozen(self.embed(words))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def words(step: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """Return this rank's share of the batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(WORDS, (BATCH, LENGTH + 1), generator=generator)[rank::world_size]


def backward(model: nn.Module, batch: Tensor) -> None:
    logits = model(batch[:, :-1])
    nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()


def fit(model: nn.Module, optimizer: Any, steps: range, rank: int = 0, world_size: int = 1) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, words(step, rank, world_size))
        optimizer.step()


def fit_here(model: nn.Module, optimizer: Any, steps: range) -> None:
    fit(model, optimizer, steps, dist.get_rank(), dist.get_world_size())


def make(name: str, model: nn.Module, **options: Any) -> Any:
    """Return an optimizer by name; "MultiFrequency" is Momentum, whose memories step every second time."""
    if name == "MultiFrequency":
        optimizer = create_optimizer("Momentum", model, lr=LR, **options)
        return MultiFrequency(optimizer, [2 if group["rule"] == "memory" else 1 for group in optimizer.param_groups])
    return create_optimizer(name, model, lr=LR, **OPTIONS.get(name, {}), **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "M3": {"chunk_size": 2, "alpha_warmup": 1},
    "DMGD": {"hidden_dim": 4, "hidden_lr": 0.1},
    "PreconditionedMomentum": {"preconditioner": "shampoo", "precondition_interval": 2},
    "DGD": {"every": 1, "rho": 0.5},
    "InputDeltaMomentum": {"every": 1},
}


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def everything(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return all parameters and all state, whole."""
    states = [optimizer.state[param] for group in optimizer.param_groups for param in group["params"]]
    return {
        "params": [whole(param) for param in model.parameters()],
        "states": [{name: whole(value) for name, value in state.items()} for state in states],
    }


def with_ddp(name: str) -> dict[str, Any]:
    """Train four steps on this rank's share of the data."""
    model = DistributedDataParallel(Model())
    optimizer = make(name, model)
    fit_here(model, optimizer, range(4))
    return everything(model, optimizer)


def with_fsdp(name: str, mesh_shape: tuple[int, ...], **policies: Any) -> dict[str, Any]:
    """Train four steps sharded."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    model = Model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **policies)
    fully_shard(model, mesh=mesh, **policies)
    return beside_one_process(name, model)


def with_tensor_parallel(name: str) -> dict[str, Any]:
    """Train four steps on two ranks that share every block, and two that shard those shares."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    model = Model()
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    return beside_one_process(name, model, mesh["shard"])


def beside_one_process(name: str, model: nn.Module, data: DeviceMesh | None = None) -> dict[str, Any]:
    """Train four steps; return also what one process makes of the very gradients of this training.

    Every rank of `data` has its share of the batch, by default every rank of all.
    """
    rank, size = (data.get_local_rank(), data.size()) if data else (dist.get_rank(), dist.get_world_size())
    twin = Model()
    options = {} if "Input" not in name and name != "DGD" else {"missing": "gradient"}
    optimizer, other = make(name, model, **options), make(name, twin, **options)
    if options:
        optimizer.inputs = other.inputs = None  # go by the gradients, as the twin can
    for step in range(4):
        optimizer.zero_grad()
        backward(model, words(step, rank, size))
        if data is None:  # torch clips no gradients of several meshes together
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.grad = None if ours.grad is None else whole(ours.grad).clone()
        optimizer.step()
        other.step()
    return {"sharded": everything(model, optimizer), "alone": everything(twin, other)}


def with_fsdp_and_inputs(name: str) -> dict[str, Any]:
    """Train four steps sharded, keyed by the inputs that all ranks have seen."""
    model = Model()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = make(name, model)
    fit_here(model, optimizer, range(4))
    return everything(model, optimizer)


def with_zero(name: str) -> dict[str, Any]:
    """Train DDP with the optimizer's state shared out by torch's ZeroRedundancyOptimizer, and with all of it."""
    results = []
    for sharded in (True, False):
        model = DistributedDataParallel(Model())
        plain = make(name, model)
        if sharded:
            groups = [{"params": g["params"], "rule": g["rule"]} for g in plain.param_groups]
            options = {key: value for key, value in plain.defaults.items() if key not in ("lr", "inputs")}
            optimizer: Any = ZeroRedundancyOptimizer(groups, type(plain), lr=LR, **options)
        else:
            optimizer = plain
            for group in plain.param_groups:
                group["weight_decay"] = plain.defaults["weight_decay"]
        fit_here(model, optimizer, range(3))
        results.append([whole(param) for param in model.parameters()])
    return {"sharded": results[0], "plain": results[1]}


def sharded_model() -> nn.Module:
    model = Model()
    if dist.is_initialized():
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    return model


def _fit_all(model: nn.Module, optimizer: Any, steps: range) -> None:
    if dist.is_initialized():
        fit_here(model, optimizer, steps)
    else:
        fit(model, optimizer, steps)


def save(name: str, folder: str, steps: int) -> dict[str, Any]:
    """Train, save with torch.distributed.checkpoint, and train on."""
    model = sharded_model()
    optimizer = make(name, model)
    _fit_all(model, optimizer, range(steps))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(Path(folder, f"{name}-{steps}")))
    _fit_all(model, optimizer, range(steps, steps + 3))
    return everything(model, optimizer)


def load(name: str, folder: str, steps: int) -> dict[str, Any]:
    """Load into a fresh model and optimizer, and train on."""
    model = sharded_model()
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    optimizer = make(name, model)
    weights, state = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=str(Path(folder, f"{name}-{steps}")))
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    _fit_all(model, optimizer, range(steps, steps + 3))
    return everything(model, optimizer)


def on_two(names: list[str], some: list[str], checkpointed: list[tuple[str, int]], folder: str) -> dict[str, Any]:
    keyed = [name for name in names if name in ("DGD", "InputDeltaMomentum")]
    return {
        "ddp": {name: with_ddp(name) for name in names},
        "fsdp": {name: with_fsdp(name, (2,)) for name in names},
        "fsdp in bfloat16": {name: with_fsdp(name, (2,), mp_policy=MIXED) for name in some},
        "fsdp with offload": {name: with_fsdp(name, (2,), offload_policy=OFFLOAD) for name in some},
        "inputs": {name: with_fsdp_and_inputs(name) for name in keyed},
        "zero": {name: with_zero(name) for name in some},
        "saved": {f"{name} {steps}": save(name, folder, steps) for name, steps in checkpointed},
    }


def on_four(names: list[str], checkpointed: list[tuple[str, int]], folder: str) -> dict[str, Any]:
    return {
        "fsdp": {name: with_fsdp(name, (2, 2)) for name in names},
        "tensor parallel": {name: with_tensor_parallel(name) for name in names},
        "loaded": {f"{name} {steps}": load(name, folder, steps) for name, steps in checkpointed},
    }
