"""What watching the layers' inputs, and chunks of gradients, add to a whole training step.

Every arm trains (forward, backward, step) its own copy of a model under `Momentum`, in paired rounds of shuffled order;
the ratio is to the plain arm's time in the same round. The plain arm runs twice, and how far the two come apart is how
far any other ratio may be trusted. The `capture` arms only watch: what they saw is forgotten at the end of the step.
`MultiFrequency` wraps the same optimizer. A call is eight steps, so that it holds a whole chunk of the arm whose hidden
matrices step every eighth time.
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

import deep_optim

from .measure import command, machine, paired_rounds, summarize, versions
from .tasks import Task, make_task
from .training import train_step

PLAIN, AGAIN = "plain", "plain again"
TASKS: dict[str, dict[str, str]] = {"text": {}, "vision-vit": {"model": "vit"}, "vision-resnet": {"model": "resnet"}}
EVERY = {"by default": None, "every=1": 1}
PERIOD = 8  # also the steps of one call of every arm

Step = Callable[[Any], object]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "overhead.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 120)
    document: dict[str, Any] = {
        "benchmark": "overhead", "command": command("overhead", arguments), "machine": machine(),
        "versions": versions(), "rounds": args.rounds, "tasks": {},
    }  # fmt: skip
    for name in args.tasks.split(","):
        console.print(f"timing training steps on {name} ...", highlight=False)
        task = make_task(name.partition("-")[0], **TASKS[name])
        times = summarize(paired_rounds(_arms(task), rounds=args.rounds, warmup=1), reference=PLAIN)
        document["tasks"][name] = {
            arm: numbers | {key: numbers[key] / PERIOD for key in ("ms", "min_ms")} for arm, numbers in times.items()
        }
        console.print(_table(name, document["tasks"][name]))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"numbers: {args.output}")
    return 0


def _arms(task: Task) -> dict[str, Callable[[], None]]:
    """Each with a model of its own, on the same batches."""
    batches = list(task.batches(0, PERIOD))
    steps = {
        PLAIN: _momentum(task),
        AGAIN: _momentum(task),
        **{f"capture, {name}": _watching(task, every) for name, every in EVERY.items()},
        "InputDeltaMomentum": _input_delta(task),
        "MultiFrequency, period 1": _momentum(task, period=1),
        f"MultiFrequency, period {PERIOD}": _momentum(task, period=PERIOD),
    }

    def arm(step: Step) -> Callable[[], None]:
        def call() -> None:
            for batch in batches:
                step(batch)

        return call

    return {name: arm(step) for name, step in steps.items()}


def _groups(task: Task, model: nn.Module) -> list[dict[str, Any]]:
    return deep_optim.param_groups(model, weight_decay=task.weight_decay, memory=task.memory)


def _momentum(task: Task, period: int | None = None) -> Step:
    """`Momentum`, or the same in `MultiFrequency` with the hidden matrices at `period`."""
    model = task.model(0)
    optimizer: torch.optim.Optimizer = deep_optim.Momentum(_groups(task, model), lr=1e-3, fused=True)
    if period is not None:
        periods = [period if group["rule"] == "memory" else 1 for group in optimizer.param_groups]
        optimizer = deep_optim.MultiFrequency(optimizer, periods)
    return lambda batch: train_step(task, model, [optimizer], batch)


def _watching(task: Task, every: int | None) -> Step:
    """`Momentum`, with hooks that look at the inputs of the same layers for nobody."""
    model = task.model(0)
    groups = _groups(task, model)
    capture = deep_optim.capture_inputs(model, groups, every=every)
    optimizer = deep_optim.Momentum(groups, lr=1e-3, fused=True)

    def step(batch: Any) -> None:
        train_step(task, model, [optimizer], batch)
        capture.clear()

    return step


def _input_delta(task: Task) -> Step:
    model = task.model(0)
    groups = _groups(task, model)
    capture = deep_optim.capture_inputs(model, groups)
    optimizer = deep_optim.InputDeltaMomentum(groups, lr=1e-3, fused=True, inputs=capture)
    return lambda batch: train_step(task, model, [optimizer], batch)


def _table(task: str, arms: dict[str, dict[str, float]]) -> Table:
    table = Table(title=task, title_justify="left")
    for heading in ("", "ms a step", "to plain", "quartiles"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for arm, numbers in arms.items():
        quartiles = f"[{numbers['ratio_q1']:.3f}, {numbers['ratio_q3']:.3f}]"
        table.add_row(arm, f"{numbers['ms']:.2f}", f"{numbers['ratio']:.3f}", quartiles)
    return table
