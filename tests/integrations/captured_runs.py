"""What the ranks of test_captured_inputs.py do: run one small model under DDP in many ways, noting collectives."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from deep_optim import capture_inputs

STEPS, WIDTH = 2, 4


class Experts(nn.Module):
    """A layer, experts of which some are called, a head; the first two layers perhaps under a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor, *experts: int) -> Tensor:
        def body(x: Tensor) -> Tensor:
            x = self.first(x).tanh()
            for expert in experts:
                x = x + self.experts[expert](x).tanh()
            return x

        x = body(x) if self.reentrant is None else checkpoint(body, x, use_reentrant=self.reentrant)
        return self.head(x)


_step = 0  # of the run that is on: each has other data


def begin(step: int) -> None:
    global _step
    _step = step


def draw(rank: int, part: int = 0) -> Tensor:
    """More rows than features on rank 0, whose Gram is kept, and fewer on rank 1, which are kept themselves."""
    generator = torch.Generator().manual_seed(100 * _step + 10 * part + rank)
    return torch.randn(9 if rank == 0 else 2, WIDTH, generator=generator).requires_grad_()


def usual(model: Any, rank: int, part: int = 0) -> None:
    model(draw(rank, part), 0, 1, 2).sum().backward()


def accumulated(model: Any, rank: int) -> None:
    for part in range(3):
        with without_sync(model, part < 2):
            usual(model, rank, part)


def accumulated_without_no_sync(model: Any, rank: int) -> None:
    for part in range(3):
        usual(model, rank, part)


def two_passes_and_one_backward(model: Any, rank: int) -> None:
    (model(draw(rank), 0, 1, 2) + model(draw(rank, 1), 0, 1, 2)).sum().backward()


def other_experts_on_each_rank(model: Any, rank: int) -> None:
    model(draw(rank), rank).sum().backward()  # and the last one on none


def more_experts_in_a_later_pass(model: Any, rank: int) -> None:
    for part in range(3):
        with without_sync(model, part < 2):
            model(draw(rank, part), *range(part if rank else 0)).sum().backward()


def checkpointed_as_a_whole(model: Any, rank: int) -> None:
    """DDP's own forward pass ends a second time, inside backward."""
    with set_checkpoint_early_stop(False):
        checkpoint(model, draw(rank), 0, 1, 2, use_reentrant=False).sum().backward()


def reentrant_as_a_whole(model: Any, rank: int) -> None:
    checkpoint(model, draw(rank), 0, 1, 2, use_reentrant=True).sum().backward()


def with_autocast(model: Any, rank: int) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(draw(rank), 0, 1, 2).sum()
    loss.backward()


def evaluated_on_one_rank(model: Any, rank: int) -> None:
    if rank == 1:
        model.eval()
        model(draw(rank, 1), 0, 1, 2)
        with torch.no_grad():
            model.train()(draw(rank, 2), 0, 1, 2)
    usual(model, rank)


def without_the_wrapper_on_one_rank(model: Any, rank: int) -> None:
    usual(model, rank)
    if rank == 1:
        bare(model)(draw(rank, 1), 0)


def a_step_left_out(model: Any, rank: int) -> None:
    """Its gradients and its inputs are kept, and the next step's added."""
    usual(model, rank)
    usual(model, rank, part=1)


RUNS: dict[str, Callable[[Any, int], None]] = {
    "usual": usual,
    "accumulated": accumulated,
    "accumulated without no_sync": accumulated_without_no_sync,
    "two passes and one backward": two_passes_and_one_backward,
    "other experts on each rank": other_experts_on_each_rank,
    "more experts in a later pass": more_experts_in_a_later_pass,
    "checkpointed": usual,
    "checkpointed as a whole": checkpointed_as_a_whole,
    "reentrant": usual,
    "reentrant as a whole": reentrant_as_a_whole,
    "frozen": usual,
    "autocast": with_autocast,
    "evaluated on one rank": evaluated_on_one_rank,
    "without the wrapper on one rank": without_the_wrapper_on_one_rank,
    "a step left out": a_step_left_out,
}


def make(run: str) -> Experts:
    model = Experts()
    model.reentrant = {"checkpointed": False, "reentrant": True}.get(run)
    model.experts.requires_grad_(run != "frozen")
    return model


def bare(model: Any) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def without_sync(model: Any, wanted: bool) -> AbstractContextManager[None]:
    return model.no_sync() if wanted and isinstance(model, DistributedDataParallel) else nullcontext()


def grams(capture: Any, model: nn.Module) -> dict[str, Tensor]:
    """What the next step would be keyed by, used up as a step does."""
    capture.collect()
    weights = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    found = {}
    for name, weight in weights.items():
        if weight in capture:
            rows, gram = capture.keys(weight)
            found[name] = (rows.mT @ rows if gram is None else gram).squeeze(0)
            capture.discard(weight)
    return found


class Log(list[str]):
    """Collectives in the order of their launch.

    "sent 2" is a buffer of two layers' sums, "sum" that of one layer at the step, "called" the question before it which
    layers there are, "bucket" one of gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Any] = []

    def arrives(self) -> bool:
        """Whether what was sent comes to its end with nobody waiting for it."""
        patience = time.monotonic() + 30
        while not (arrived := all(work.is_completed() for work in self.sent)) and time.monotonic() < patience:
            time.sleep(0.001)
        return arrived

    @contextmanager
    def kept(self) -> Iterator[None]:
        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            layers, rest = divmod(tensor.numel(), WIDTH**2 + 1)
            self.append("called" if not tensor.is_floating_point() else "sum" if rest else f"sent {layers}")
            work = _all_reduce(tensor, *args, **kwargs)
            if self[-1].startswith("sent"):
                self.sent.append(work)
            return work

        with patch.object(dist, "all_reduce", all_reduce):
            yield

    def bucket(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.append("bucket")
        work = _all_reduce(bucket.buffer() / dist.get_world_size(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])


_all_reduce = dist.all_reduce


def run(name: str, given: str = "wrapper") -> dict[str, Any]:
    """Train; `given` says whether capture_inputs was given the model itself, or the "wrapper" around it."""
    model, log = make(name), Log()
    ddp = DistributedDataParallel(model, bucket_cap_mb=1e-5, find_unused_parameters="experts" in name)  # many buckets
    ddp.register_comm_hook(None, log.bucket)
    told = []
    with log.kept(), capture_inputs(ddp if given == "wrapper" else model, every=1) as capture:
        for step in range(STEPS):
            begin(step)
            ddp.zero_grad()
            RUNS[name](ddp, dist.get_rank())
            arrived = log.arrives()
            log.append("step")
            told.append({"grams": grams(capture, model), "log": list(log), "arrived": arrived})
            log.clear()
    begin(0)
    return {"steps": told, "grads": [param.grad for param in model.parameters() if param.grad is not None]}


def alone(name: str) -> list[dict[str, Tensor]]:
    """The same in one process, which runs what each rank does."""
    model = make(name)
    capture, told = capture_inputs(model, every=1), []
    for step in range(STEPS):
        begin(step)
        for rank in range(2):
            model.train()
            RUNS[name](model, rank)
        told.append(grams(capture, model))
    begin(0)
    return told


def forgotten() -> dict[str, Any]:
    """Sums that have arrived or are under way when they are cleared, or when the hooks are removed."""
    model, rank = Experts(), dist.get_rank()
    ddp, log = DistributedDataParallel(model), Log()
    with log.kept():
        capture = capture_inputs(ddp, every=1)
        usual(ddp, rank)
        usual(ddp, rank, part=2)
        capture.clear()
        nothing = grams(capture, model)
        usual(ddp, rank, part=1)
        second = grams(capture, model)
        usual(ddp, rank)
        capture.remove()
        log.clear()
        usual(ddp, rank)
    return {"nothing": nothing, "second": second, "after": list(log), "hooks": len(model._forward_hooks)}


def copied() -> dict[str, Any]:
    """A moving average is a copy, hooks included, and runs on one rank or on all."""
    model, rank = Experts(), dist.get_rank()
    ddp, log = DistributedDataParallel(model), Log()
    capture = capture_inputs(ddp, every=1)
    copy = DistributedDataParallel(deepcopy(model))
    with log.kept():
        usual(copy, rank)
        usual(ddp, rank)
        return {"log": list(log), "grams": grams(capture, model)}


def of_other_ranks() -> dict[str, Any]:
    """Sums over a group that DDP does not reduce over."""
    model, log, group = Experts(), Log(), dist.new_group([0, 1])
    ddp = DistributedDataParallel(model)
    capture = capture_inputs(ddp, every=1, process_group=group)
    with log.kept():
        usual(ddp, dist.get_rank())
        return {"log": list(log), "grams": grams(capture, model)}


def of_a_part() -> dict[str, Any]:
    """Sums over one layer of the model, whose calls DDP does not keep in step."""
    model, log = Experts(), Log()
    ddp = DistributedDataParallel(model)
    capture = capture_inputs(model.first, every=1)
    with log.kept():
        usual(ddp, dist.get_rank())
        return {"log": list(log), "grams": grams(capture, model)}


def of_one_layer() -> dict[str, Any]:
    layer, log = nn.Linear(WIDTH, 2), Log()
    ddp = DistributedDataParallel(layer)
    capture = capture_inputs(ddp, every=1)
    with log.kept():
        ddp(draw(dist.get_rank())).sum().backward()
        return {"log": list(log), "grams": grams(capture, layer)}


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = (
            nn.Linear(WIDTH, 2, dtype=torch.bfloat16),
            nn.Linear(WIDTH, 2, dtype=torch.float64),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.low(x.bfloat16()) + self.high(x.double())


def of_two_dtypes() -> dict[str, Any]:
    model, log = Mixed(), Log()
    ddp = DistributedDataParallel(model)
    capture = capture_inputs(ddp, every=1)
    with log.kept():
        ddp(draw(dist.get_rank())).sum().backward()
        return {"log": list(log), "grams": grams(capture, model)}


def compiled(how: str) -> dict[str, Any]:
    """Compiled within DDP, around it, or in place: then one rank gives up at the second step, and runs eagerly."""
    torch._dynamo.reset()
    model, rank, log = Experts(), dist.get_rank(), Log()
    ddp = call = DistributedDataParallel(torch.compile(model, backend="eager") if how == "within" else model)
    capture, told = capture_inputs(ddp, every=1), []
    if how == "around":
        call = torch.compile(ddp, backend="eager")
    elif how == "one rank gives up":
        model.compile(backend="eager", dynamic=False)
    limit = 1 if how == "one rank gives up" and rank == 1 else 8
    with log.kept(), patch.object(torch._dynamo.config, "recompile_limit", limit):
        for step in range(STEPS):
            ddp.zero_grad()
            call(rows(step, rank), 0, 1, 2).sum().backward()
            log.append("step")
            told.append({"grams": grams(capture, model), "log": list(log)})
            log.clear()
    torch._dynamo.reset()
    return {"steps": told}


def compiled_alone() -> list[dict[str, Tensor]]:
    model = Experts()
    capture, told = capture_inputs(model, every=1), []
    for step in range(STEPS):
        for rank in range(2):
            model(rows(step, rank), 0, 1, 2).sum().backward()
        told.append(grams(capture, model))
    return told


def rows(step: int, rank: int) -> Tensor:
    """Other numbers of rows at each step, for which a graph of fixed sizes is compiled again."""
    return draw(0, 10 * step + rank)[step:]


COMPILED = ["within", "around", "one rank gives up"]


def on_two() -> dict[str, Any]:
    return {
        **{f"{name}, given the {given}": run(name, given) for name in RUNS for given in ("wrapper", "model")},
        "forgotten": forgotten(),
        "copied": copied(),
        "other ranks": of_other_ranks(),
        "a part": of_a_part(),
        "one layer": of_one_layer(),
        "two dtypes": of_two_dtypes(),
    }


def compiled_on_two() -> dict[str, Any]:
    return {how: compiled(how) for how in COMPILED}
