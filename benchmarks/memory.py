"""What a DMGD memory knows about the gradients, over a training run: `memory_report()` every few steps.

For every hidden matrix: the inner loss before and after each step, the share of what its features can explain, the
angle between the update and the gradient, and how the memory's weights grow. The report reads the training and does
not touch it; what it costs is measured on the way.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import deep_optim

from .measure import command, machine, versions
from .optimizers import AUX_BETAS, TUNED
from .plots import draw_memory
from .tasks import make_task
from .training import WARMUP_STEPS, relative_rate, scale_rates

RESULTS = Path(__file__).parent / "results" / "memory.json"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks memory", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=10, help="steps between two reports")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hidden-dim", type=int, default=16)
    parser.add_argument("--hidden-lr", type=float, default=0.0)
    parser.add_argument("--inner-steps", type=int, help="default: DMGD's own")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file; the plot lies beside it")
    parser.add_argument("--plot-only", type=Path, metavar="FILE", help="only draw the plot of a JSON file")
    args = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 110)
    if args.plot_only:
        plot = draw_memory(json.loads(args.plot_only.read_text()), args.plot_only.with_suffix(".png"))
        console.print(f"plot: {plot}")
        return 0
    torch.set_num_threads(1)
    options: dict[str, Any] = {"hidden_dim": args.hidden_dim, "hidden_lr": args.hidden_lr}
    if args.inner_steps:
        options["inner_steps"] = args.inner_steps
    document = {
        "benchmark": "memory", "command": command("memory", arguments), "machine": machine(), "versions": versions(),
        "config": {"steps": args.steps, "every": args.every, "seed": args.seed, **options},
        **watch(args, options),
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    plot = draw_memory(document, args.output.with_suffix(".png"))
    last = {name: rows[-1] for name, rows in document["reports"].items()}
    console.print(
        f"validation loss {document['loss']:.4f}; one report costs {document['report_to_step']:.2f} of a step"
    )
    console.print(f"explained at the end: {statistics.mean(row['explained'] for row in last.values()):.2f} on average")
    console.print(f"numbers: {args.output}\nplot:    {plot}")
    return 0


def watch(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """Train the text task once, and report on the way."""
    task, at = make_task("text"), TUNED["text"]["dmgd"]
    model = task.model(args.seed)
    groups = deep_optim.param_groups(model, weight_decay=task.weight_decay, memory=task.memory)
    aux = dict(lr=task.aux_lr, adamw_betas=AUX_BETAS)
    groups = [group | aux if group["rule"] == "adamw" else group for group in groups]
    optimizer = deep_optim.DMGD(groups, lr=at.lr, momentum=at.second, fused=True, **options)
    reports: dict[str, list[dict[str, float]]] = defaultdict(list)
    seconds: dict[str, list[float]] = {"report": [], "step": []}
    warmup = min(WARMUP_STEPS, max(1, args.steps // 10))
    batches = task.batches(args.seed, args.steps)
    for step, batch in enumerate(track(batches, "training", total=args.steps, disable=not sys.stdout.isatty()), 1):
        scale_rates([optimizer], relative_rate(step, args.steps, warmup))
        model.zero_grad()
        task.loss(model, batch).backward()
        start = time.perf_counter()
        if step % args.every == 0:
            for name, report in optimizer.memory_report().items():
                reports[name].append({"step": step, **report._asdict()})
            seconds["report"].append(time.perf_counter() - start)
            start = time.perf_counter()
        optimizer.step()
        seconds["step"].append(time.perf_counter() - start)
    ratio = statistics.median(seconds["report"]) / statistics.median(seconds["step"])
    return {"loss": task.evaluate(model)["loss"], "report_to_step": ratio, "reports": dict(reports)}
