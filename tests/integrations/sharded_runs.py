"""What the ranks of test_sharded_steps.py do: train, and tell what came of it, what was sent and what was computed."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cases import CASES, LR, Case
from deep_optim.optimizers import sharding
from problem import gradient, make_params

# Rows that two and four ranks share unevenly, or not at all; some twice, to be stacked.
SHAPES = ((6, 4), (7, 5), (3, 8), (3, 8), (1, 6), (4, 3, 2, 2), (7,), (8, 8), (5, 4))
LAYOUTS = (
    *("rows", "columns", "replicas", "replicas of neighbours", "rows and columns", "rows twice", "replicated"),
    *("one row of the mesh", "two dimensions of three"),
)
SUB_MESHES = LAYOUTS[-2:]  # of two ranks, on which others do the same
STEPS = 3
TWISTS: dict[str, dict[str, Any]] = {  # options beside those of a case, after a comma in the layout
    "": {},
    "maximize": {"maximize": True},
    "tensor lr": {"lr": torch.tensor(LR)},
    "in small batches": {},
    "in bfloat16": {"kahan_sum": True},
}
SMALL_BATCH = 24  # entries per rank and tensor: a batch for every matrix or two


class Sent(TorchDispatchMode):
    """Counts the collectives and the bytes that this rank hands to each of them."""

    def __enter__(self) -> "Sent":
        self.calls: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and not func.__name__.startswith(("wait", "_wrap")):
            name = func.__name__.split(".")[0]
            given = args[1] if name == "alltoall_base_" else args[0]
            tensors = [given] if isinstance(given, Tensor) else list(_tensors(given))
            self.calls[name] = self.calls.get(name, 0) + 1
            self.bytes[name] = self.bytes.get(name, 0) + sum(each.numel() * each.element_size() for each in tensors)
        return func(*args, **(kwargs or {}))


def _tensors(given: Any) -> Iterable[Tensor]:
    for each in given if isinstance(given, (list, tuple)) else ():
        yield from [each] if isinstance(each, Tensor) else _tensors(each)


@functools.cache
def mesh(dimensions: int) -> DeviceMesh:
    """Return all ranks in a row, in two, or in two apart."""
    half = dist.get_world_size() // 2
    shape = {1: (2 * half,), 2: (2, half), 3: (2, 1, half)}[dimensions]
    return init_device_mesh("cpu", shape, mesh_dim_names=("stage", "outer", "inner")[-dimensions:])


def mesh_and_placements(layout: str, ndim: int) -> tuple[DeviceMesh, list[Placement]]:
    """Return where a parameter of so many dimensions is, in one of LAYOUTS."""
    columns = Shard(1) if ndim > 1 else Shard(0)
    if layout in ("rows", "columns", "replicated"):
        placement = {"rows": Shard(0), "columns": columns, "replicated": Replicate()}[layout]
        return mesh(1), [placement]
    return {
        "replicas": (mesh(2), [Replicate(), Shard(0)]),
        "replicas of neighbours": (mesh(2), [Shard(0), Replicate()]),
        "rows and columns": (mesh(2), [Shard(0), columns]),
        "rows twice": (mesh(2), [Shard(0), Shard(0)]),
        "one row of the mesh": (mesh(2)["inner"], [Shard(0)]),
        "two dimensions of three": (mesh(3)["outer", "inner"], [Replicate(), Shard(0)]),
    }[layout]


def dtype_of(twist: str) -> torch.dtype:
    return torch.bfloat16 if twist == "in bfloat16" else torch.float32


def train_sharded(case: Case, layout: str) -> dict[str, Any]:
    """Train SHAPES in a layout, and return what one process can be compared with."""
    layout, _, twist = layout.partition(", ")
    wheres = [mesh_and_placements(layout, len(shape)) for shape in SHAPES]
    plain = make_params(SHAPES, dtype_of(twist))
    params = [nn.Parameter(distribute_tensor(p.detach(), *where)) for p, where in zip(plain, wheres, strict=True)]
    optimizer = case.make(params, **TWISTS[twist])
    if twist == "in small batches":
        sharding._BATCH_NUMEL, usual = SMALL_BATCH, sharding._BATCH_NUMEL
    for step in range(STEPS):
        for index, (param, where) in enumerate(zip(params, wheres, strict=True)):
            param.grad = distribute_tensor(gradient(plain[index], step, index), *where)
        sent, flops = Sent(), FlopCounterMode(display=False)
        with sent, flops:
            optimizer.step()
    if twist == "in small batches":
        sharding._BATCH_NUMEL = usual
    states = [optimizer.state[param] for param in params]
    return {
        "params": [param.detach().full_tensor() for param in params],
        "states": [{name: gathered(value) for name, value in state.items()} for state in states],
        "plain": [{name: v for name, v in state.items() if not isinstance(v, DTensor)} for state in states],
        "elsewhere": [
            name
            for param, state in zip(params, states, strict=True)
            for name, value in state.items()
            if isinstance(value, DTensor)
            and (value.placements, value.device_mesh) != (param.placements, param.device_mesh)
        ],
        "calls": sent.calls,
        "bytes": sent.bytes,
        "flops": flops.get_total_flops(),
    }


def gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def runs(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Return `train_sharded` of (case, layout) by "case, layout"."""
    cases = {case.id: case for case in CASES}
    return {f"{case}, {layout}": train_sharded(cases[case], layout) for case, layout in pairs}
