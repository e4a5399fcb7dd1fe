"""What `optimizer.step()` alone costs: milliseconds in paired shuffled rounds, and bytes per parameter.

Every arm has its own copy of the parameters and random gradients of a realistic size; AdamW runs twice, and how far
the two come apart is how far any other ratio may be trusted. Beside the times: bytes of state, bytes of temporary
tensors at their peak, and the rate of the products against a large product measured in the same run. On a GPU also
the time it is busy, the time until the host is free again, and the time of a step replayed from a CUDA graph.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from deep_optim.ops.newton_schulz import working_dtype

from .device_time import device_time, replay_time
from .measure import (
    TransientMemory,
    ceilings,
    command,
    machine,
    paired_rounds,
    summarize,
    versions,
    waiting,
)
from .optimizers import OPTIMIZERS, Setting, available, build
from .tasks.text import ByteGPT
from .timing_plots import draw_step_time

AGAIN = "adamw (again)"
GRADIENT_SIZE = 1e-3


class Layers(nn.Module):
    """Linear layers of the given [outputs, inputs], each with a bias."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(inputs, outputs) for outputs, inputs in shapes])


class Stage:
    """What `build` asks of a task."""

    aux_lr = 1e-3
    weight_decay = 1e-2

    def __init__(self, memory: tuple[str, ...]) -> None:
        self.memory = memory


class ResNet50(nn.Module):
    """The weights of a ResNet-50: 53 convolutions, the scales and shifts after them, and the classifier."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False)]
        inputs = 64
        for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
            for block in range(blocks):
                layers += [
                    nn.Conv2d(inputs, width, 1, bias=False),
                    nn.Conv2d(width, width, 3, bias=False),
                    nn.Conv2d(width, 4 * width, 1, bias=False),
                ]
                if block == 0:
                    layers.append(nn.Conv2d(inputs, 4 * width, 1, bias=False))
                inputs = 4 * width
        self.hidden = nn.ModuleList([*layers, *[nn.BatchNorm2d(len(layer.weight)) for layer in layers]])  # type: ignore[arg-type]
        self.head = nn.Linear(inputs, 1000)


def gpt2_block(width: int) -> list[tuple[int, int]]:
    """The matrices of one block: attention in and out, MLP up and down."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "text": (ByteGPT, ()),
    "small": (lambda: Layers([(64, 64)] * 48), ("hidden",)),
    "gpt2-quarter": (lambda: Layers(gpt2_block(192) * 12), ("hidden",)),  # 12 layers, a quarter of the width
    "gpt2-block": (lambda: Layers(gpt2_block(768)), ("hidden",)),  # one layer of the 124M model
    "gpt2": (lambda: Layers(gpt2_block(768) * 12), ("hidden",)),
    "gpt3-xl": (lambda: Layers(gpt2_block(2048) * 24), ("hidden",)),  # the 1.3B model: 20 GB for each optimizer
    "resnet50": (ResNet50, ("hidden",)),
    "tensors": (lambda: Layers([(16, 16)] * 150), ("hidden",)),  # 300 small ones, half of them vectors
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks step_time", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", default="text,small,tensors,gpt2-quarter,gpt2-block", help=f"of {', '.join(SHAPES)}"
    )
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS), help="by default all that need no layer inputs")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--steps-per-call", type=int, default=1, help="10 for what works every tenth step, like SOAP")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "step_time.json")
    parser.add_argument("--plot-only", type=Path, metavar="FILE", help="only draw the plot of a JSON file")
    args = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 130)
    if args.plot_only:
        document = json.loads(args.plot_only.read_text())
        console.print(f"plot: {draw_step_time(document, args.plot_only.with_suffix('.png'))}")
        return 0
    torch.set_num_threads(args.threads)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    names = [name for name in timed() if name in {"adamw", *args.optimizers.split(",")}]
    document: dict[str, Any] = {
        "benchmark": "step_time", "command": command("step_time", arguments), "machine": machine(),
        "versions": versions(), "device": args.device, "rounds": args.rounds,
        "ceilings": ceilings(args.device, working_dtype(torch.empty(1, device=args.device))), "shapes": {},
    }  # fmt: skip
    for shape in args.shapes.split(","):
        console.print(f"timing {', '.join(names)} on {shape} ...", highlight=False)
        document["shapes"][shape] = measure(shape, names, args)
        console.print(_table(shape, document["shapes"][shape], document["ceilings"]["gflops"]))
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    plot = draw_step_time(document, args.output.with_suffix(".png"))
    console.print(f"numbers: {args.output}\nplot:    {plot}")
    return 0


def timed() -> list[str]:
    """All that are installed and step by gradients alone: here are no layers that run."""
    return [name for name in available() if not OPTIMIZERS[name].inputs]


def measure(shape: str, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Times and state of every optimizer on one set of shapes."""
    make, memory = SHAPES[shape]
    arms: dict[str, Callable[[], None]] = {}
    costs: dict[str, dict[str, float]] = {}
    count = 0
    with torch.device(args.device):
        gradients = [torch.randn_like(param) * GRADIENT_SIZE for param in make().parameters()]
    if any(gradient.ndim > 2 for gradient in gradients):  # which torch's Muon does not take
        names = [name for name in names if name != "muon"]
    for arm in (*names, AGAIN):
        name = "adamw" if arm == AGAIN else arm
        with torch.device(args.device):
            model = make()
        for param, gradient in zip(model.parameters(), gradients, strict=True):  # foreign ones may write to them
            param.grad = gradient.clone() if OPTIMIZERS[name].package else gradient
        lr = min(OPTIMIZERS[name].lowest_lr.values())
        setting = Setting(lr, OPTIMIZERS[name].seconds[1])
        optimizers = build(name, Stage(memory), model, setting, warmup=1)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            if "chunk_size" in group:  # M3's default: the table's short chunks are for short runs
                group["chunk_size"] = 100
        for optimizer in optimizers:
            if hasattr(optimizer, "train"):  # schedule-free AdamW steps in this mode only
                optimizer.train()
            optimizer.step()
        count = sum(param.numel() for param in model.parameters())
        costs[arm] = bytes_and_flops(optimizers, count)
        if args.device != "cpu":
            costs[arm] |= on_the_gpu(optimizers, count)
        arms[arm] = _arm(optimizers, args.steps_per_call, args.device)
    times = summarize(paired_rounds(arms, rounds=args.rounds), reference="adamw")
    for numbers in times.values():
        numbers |= {key: numbers[key] / args.steps_per_call for key in ("ms", "min_ms")}
    return {"parameters": count, "arms": {arm: times[arm] | costs[arm] for arm in arms}}


def bytes_and_flops(optimizers: list[Optimizer], parameters: int) -> dict[str, float]:
    """State, temporaries and products of one step, per parameter."""
    with TransientMemory() as transient, FlopCounterMode(display=False) as flops:
        for optimizer in optimizers:
            optimizer.step()
    return {
        "state_bytes_per_parameter": state_bytes(optimizers) / parameters,
        "transient_bytes_per_parameter": transient.peak / parameters,
        "flops_per_parameter": flops.get_total_flops() / parameters,
    }


def on_the_gpu(optimizers: list[Optimizer], parameters: int) -> dict[str, float]:
    """Where the time of a step goes, and its temporaries by the allocator's count, cuBLAS's included."""

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    made = torch.cuda.max_memory_allocated() - before
    costs = device_time(step) | {"transient_bytes_per_parameter": made / parameters}
    replayed = replay_time(optimizers)
    return costs if replayed is None else costs | {"replay_ms": replayed}


def state_bytes(optimizers: list[Optimizer]) -> int:
    """Bytes of all tensors the optimizers keep."""
    return sum(tensor_bytes(dict(optimizer.state)) for optimizer in optimizers)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _arm(optimizers: list[Optimizer], steps: int, device: str) -> Callable[[], None]:
    def arm() -> None:
        for _ in range(steps):
            for optimizer in optimizers:
                optimizer.step()

    return waiting(arm, device)


def _table(shape: str, result: dict[str, Any], ceiling: float) -> Table:
    table = Table(title=f"{shape}: {result['parameters'] / 1e6:.2f}M parameters", title_justify="left")
    on_gpu = "device_ms" in result["arms"]["adamw"]
    headings = ("optimizer", "ms a step", "to AdamW", "quartiles", "state B", "temporary B", "GFLOP/s")
    if on_gpu:
        headings = (*headings[:-1], "GPU busy ms", "to AdamW", "host ms", "launches", "replayed ms")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "optimizer" else "right", no_wrap=True)
    for arm, numbers in result["arms"].items():
        quartiles = f"[{numbers['ratio_q1']:.2f}, {numbers['ratio_q3']:.2f}]"
        rate = numbers["flops_per_parameter"] * result["parameters"] / numbers["ms"] / 1e6
        last = [f"{rate:.0f} ({100 * rate / ceiling:.0f} %)" if rate else ""]
        if on_gpu:  # where counting FLOPs misses the kernels
            busy = numbers["device_ms"], numbers["device_ms"] / result["arms"]["adamw"]["device_ms"], numbers["host_ms"]
            replayed = f"{numbers['replay_ms']:.3f}" if "replay_ms" in numbers else ""
            last = [*(f"{number:.2f}" for number in busy), f"{numbers['launches']:.0f}", replayed]
        table.add_row(
            "AdamW again" if arm == AGAIN else OPTIMIZERS[arm].title,
            f"{numbers['ms']:.3f}",
            f"{numbers['ratio']:.2f}",
            quartiles,
            f"{numbers['state_bytes_per_parameter']:.2f}",
            f"{numbers['transient_bytes_per_parameter']:.2f}",
            *last,
        )
    return table
