"""What `optimizer.step()` alone costs: milliseconds in paired shuffled rounds, and bytes per parameter.

Every arm has its own copy of the parameters and random gradients of a realistic size; AdamW runs twice, and how far
the two come apart is how far any other ratio may be trusted. Beside the times: bytes of state, bytes of temporary
tensors at their peak, and two rates against what a large product and a large copy reach in the same run: of the
products, and of the bytes that no step of such a state can avoid. On a GPU also the time it is busy, the time until the
host is free again, and the time of a step replayed from a CUDA graph. Nothing is timed on shapes where `Momentum` does
not step as torch's Muon does.
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
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

import deep_optim
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
from .optimizers import OPTIMIZERS, Entry, Setting
from .timed_shapes import SHAPES
from .timing_plots import OTHERS, draw_step_time

AGAIN, OTHER_MUON = "adamw (again)", "muon (other)"
GRADIENT_SIZE = 1e-3
AUX_LR, WEIGHT_DECAY = 1e-3, 1e-2
TOLERANCE = 0.1  # of an update: torch's Muon rounds its iterates to bfloat16, which takes 0.02 to 0.03 of it


def _other_muon(groups: list[dict[str, Any]], at: Setting, aux_lr: float, warmup: int) -> list[Optimizer]:
    from pytorch_optimizer import Muon

    return [
        Muon(
            [
                {
                    "params": [param for _, param in group["params"]],
                    "weight_decay": group["weight_decay"],
                    "use_muon": group["rule"] == "memory",
                    "lr": at.lr if group["rule"] == "memory" else aux_lr,
                }
                for group in groups
            ],
            momentum=at.second,
            use_adjusted_lr=True,
        )
    ]


# To be timed, and not to be tuned: a second implementation of what the table has.
ENTRIES = OPTIMIZERS | {
    OTHER_MUON: Entry(
        OTHERS[OTHER_MUON], _other_muon, OPTIMIZERS["muon"].lowest_lr, "momentum", (0.7, 0.8, 0.9),
        package="pytorch_optimizer",
    )
}  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks step_time", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", default="text,small,tensors,gpt2-quarter,gpt2-block", help=f"of {', '.join(SHAPES)}"
    )
    parser.add_argument("--optimizers", default=",".join(ENTRIES), help="by default all that need no layer inputs")
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
        args.output.write_text(json.dumps(document, indent=1) + "\n")
        if not document["shapes"][shape]["correct"]:
            away = document["shapes"][shape]["from_muon"]
            console.print(
                f"[red]wrong[/red]: Momentum steps {100 * away:.0f} % away from torch's Muon; nothing is timed"
            )
            return 1
        console.print(_table(shape, document["shapes"][shape], document["ceilings"]))
    plot = draw_step_time(document, args.output.with_suffix(".png"))
    console.print(f"numbers: {args.output}\nplot:    {plot}")
    return 0


def timed() -> list[str]:
    """All that are installed and step by gradients alone: here are no layers that run."""
    return [name for name, entry in ENTRIES.items() if entry.installed and not entry.inputs]


def measure(shape: str, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Times and state of every optimizer on one set of shapes."""
    make, memory = SHAPES[shape]
    arms: dict[str, Callable[[], None]] = {}
    costs: dict[str, dict[str, float]] = {}
    count = 0
    with torch.device(args.device):
        gradients = [torch.randn_like(param) * GRADIENT_SIZE for param in make().parameters()]
    away = from_muon([gradient for gradient in gradients if gradient.ndim == 2])
    if away > TOLERANCE:
        return {"from_muon": away, "correct": False}
    if any(gradient.ndim > 2 for gradient in gradients):  # which torch's Muon does not take
        names = [name for name in names if name != "muon"]
    for arm in (*names, AGAIN):
        name = "adamw" if arm == AGAIN else arm
        with torch.device(args.device):
            model = make()
        for param, gradient in zip(model.parameters(), gradients, strict=True):  # foreign ones may write to them
            param.grad = gradient.clone() if ENTRIES[name].package else gradient
        setting = Setting(min(ENTRIES[name].lowest_lr.values()), ENTRIES[name].seconds[1])
        groups = deep_optim.param_groups(model, weight_decay=WEIGHT_DECAY, memory=memory)
        optimizers = ENTRIES[name].build(groups, setting, AUX_LR, 1)
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
    arms_of = {arm: times[arm] | costs[arm] for arm in arms}
    return {"parameters": count, "from_muon": away, "correct": True, "arms": arms_of}


def from_muon(gradients: list[Tensor]) -> float:
    """How far a first step of `Momentum` is from one of torch's Muon, relative to it: the most for a size of matrix."""
    furthest = 0.0
    for gradient in {gradient.shape: gradient for gradient in gradients}.values():
        ours, theirs = (nn.Parameter(torch.zeros_like(gradient)) for _ in range(2))
        for param, optimizer in (
            (ours, deep_optim.Momentum([ours], lr=1.0)),
            (theirs, torch.optim.Muon([theirs], lr=1.0, adjust_lr_fn="match_rms_adamw")),
        ):
            param.grad = gradient.clone()
            optimizer.step()
        furthest = max(furthest, ((ours - theirs).norm() / theirs.norm()).item())
    return furthest


def bytes_and_flops(optimizers: list[Optimizer], parameters: int) -> dict[str, float]:
    """State, temporaries, products and traffic of one step, per parameter.

    The traffic is what has to pass through memory even if all else stayed in registers: the gradient is read, the
    weight and all of the state are read and written. A little less for state that is not written at every step.
    """
    with TransientMemory() as transient, FlopCounterMode(display=False) as flops:
        for optimizer in optimizers:
            optimizer.step()
    weights = [param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
    return {
        "traffic_bytes_per_parameter": (3 * tensor_bytes(weights) + 2 * state_bytes(optimizers)) / parameters,
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


def _table(shape: str, result: dict[str, Any], ceilings: dict[str, float]) -> Table:
    table = Table(title=f"{shape}: {result['parameters'] / 1e6:.2f}M parameters", title_justify="left")
    on_gpu = "device_ms" in result["arms"]["adamw"]
    headings = ("optimizer", "ms a step", "to AdamW", "quartiles", "state B", "temporary B", "GB/s", "GFLOP/s")
    if on_gpu:
        headings = (*headings[:-1], "GPU busy ms", "to AdamW", "host ms", "launches", "replayed ms")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "optimizer" else "right", no_wrap=True)
    for arm, numbers in result["arms"].items():
        quartiles = f"[{numbers['ratio_q1']:.2f}, {numbers['ratio_q3']:.2f}]"
        billions = result["parameters"] / numbers["device_ms" if on_gpu else "ms"] / 1e6  # of parameters a second
        last = [_rate(numbers["flops_per_parameter"] * billions, ceilings["gflops"])]
        if on_gpu:  # where counting FLOPs misses the kernels
            busy = numbers["device_ms"], numbers["device_ms"] / result["arms"]["adamw"]["device_ms"], numbers["host_ms"]
            replayed = f"{numbers['replay_ms']:.3f}" if "replay_ms" in numbers else ""
            last = [*(f"{number:.2f}" for number in busy), f"{numbers['launches']:.0f}", replayed]
        table.add_row(
            OTHERS[arm] if arm == AGAIN else ENTRIES[arm].title,
            f"{numbers['ms']:.3f}",
            f"{numbers['ratio']:.2f}",
            quartiles,
            f"{numbers['state_bytes_per_parameter']:.2f}",
            f"{numbers['transient_bytes_per_parameter']:.2f}",
            _rate(numbers["traffic_bytes_per_parameter"] * billions, ceilings["gbytes"]),
            *last,
        )
    return table


def _rate(rate: float, ceiling: float) -> str:
    return f"{rate:.3g} ({100 * rate / ceiling:.0f} %)" if rate else ""
