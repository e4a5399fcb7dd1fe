"""What is left of earlier tasks, against how well each was learnt: a frontier over learning rates for every optimizer.

1. A sequence of tasks (`--task`): orthogonal quadratics, images, classes, texts, languages.
2. Every arm, over a grid of learning rates, with its state carried from task to task, and again with fresh state.
3. Forgetting is compared at equal plasticity: against AdamW, and for slow groups against a lower learning rate.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .command_line import add_arguments, carry_out
from .continual import ARMS, PERIOD, Course, available, cached_sequence
from .frontier import MODES, draw_forgetting, summarize
from .measure import machine, versions
from .tasks.languages import MODELS
from .tasks.sequences import SEQUENCES
from .trials import Meter, Results, run_trials

RESULTS = Path(__file__).parent / "results"
FULL = (
    "adamw,muon,delta_momentum,dmgd,ademamix,multi_frequency,low_rate,"
    "multi_frequency_momentum,low_rate_momentum,ewc,replay"
)
PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(
        task="permuted", images="digits", tasks=3, steps=100, seeds=[1],
        optimizers="adamw,muon,multi_frequency,low_rate,ewc,replay",
    ),
    "full": dict(optimizers=FULL),
}  # fmt: skip


def main(arguments: list[str]) -> int:
    return carry_out("forgetting", arguments, parse(arguments), kind=Course, run=run, report=report, width=180)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line over preset over the sequence's own defaults."""
    parser = argparse.ArgumentParser("python -m benchmarks forgetting", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset", choices=PRESETS, help="demo: under a minute; full: the published arms, half an hour"
    )
    parser.add_argument("--task", choices=SEQUENCES, default="permuted")
    parser.add_argument("--images", choices=["fashion", "digits"], help="permuted, split, classes: what to look at")
    parser.add_argument("--corpus", choices=["20newsgroups", "reuters-r52"], help="topics: whose")
    parser.add_argument("--domains", help="text: corpora or files, comma-separated, in order")
    parser.add_argument("--model", choices=MODELS, help="languages: who learns them")
    parser.add_argument("--tasks", type=int, help="how many; default: the sequence's")
    parser.add_argument("--steps", type=int, help="of each task; default: the sequence's")
    parser.add_argument("--lrs", type=int, help="how many learning rates of each, lowest first; default: 4")
    parser.add_argument("--state", choices=MODES, help="only with the optimizer's state carried over, or only reset")
    parser.add_argument("--optimizers", help=f"comma-separated; default: all installed of {', '.join(ARMS)}")
    add_arguments(parser)
    preset = parser.parse_known_args(arguments)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    args = parser.parse_args(arguments)
    wanted = args.optimizers.split(",") if args.optimizers else list(ARMS)
    if unknown := [name for name in wanted if name not in ARMS]:
        parser.error(f"no optimizer named {unknown[0]!r}; there are: {', '.join(ARMS)}")
    installed = available()
    args.optimizers = [name for name in ARMS if name in wanted and name in installed]  # the table's order
    keys = {
        "orthogonal": ("tasks",),
        "permuted": ("images", "tasks"),
        "split": ("images", "tasks"),
        "classes": ("images", "tasks"),
        "topics": ("corpus", "tasks"),
        "text": ("domains",),
        "languages": ("model", "tasks"),
    }
    args.options = {key: getattr(args, key) for key in keys[args.task] if getattr(args, key)}
    if not args.output:
        words = ["forgetting", *(["demo"] if preset == "demo" else []), args.options.get("corpus", args.task)]
        args.output = RESULTS / f"{'-'.join(words)}.json"
    return args


def run(args: argparse.Namespace, results: Results, console: Console) -> None:
    """Fill `results`."""
    options = tuple(sorted(args.options.items()))
    sequence = cached_sequence(args.task, options)
    steps = args.steps or sequence.steps
    rates = {
        name: [ARMS[name].lowest_lr[sequence.unit] * factor for factor in sequence.factors[: args.lrs]]
        for name in args.optimizers
    }
    modes = [args.state] if args.state else list(MODES)
    results.document |= {
        "benchmark": "forgetting",
        "config": {
            "task": args.task, "metric": sequence.metric, "higher_is_better": sequence.higher_is_better,
            "log_axes": args.task == "orthogonal", **sequence.describe(), "steps_per_task": steps,
            "seeds": args.seeds, "period": PERIOD, "lrs": rates,
        },
        "machine": machine(), "versions": versions(),
    }  # fmt: skip
    console.print(f"{args.task}: {sequence.tasks} tasks of {steps} steps; {', '.join(args.optimizers)}")
    courses = [
        Course(args.task, options, name, lr, seed, sequence.tasks, steps, MODES[mode])
        for seed in args.seeds
        for mode in modes
        for name in args.optimizers
        for lr in rates[name]
    ]
    with Meter(sum(course.steps for course in courses)) as meter:
        run_trials("learn", courses, results, meter, args.workers)
    chosen = {course: results.trials[course] for course in courses}
    results.document["summary"] = summarize(chosen, sequence.higher_is_better)
    results.document["core_minutes"] = sum(each.get("cpu_seconds", 0.0) for each in chosen.values()) / 60


def report(results: Results, plot: Path, console: Console) -> None:
    config = results.document["config"]
    for mode, arms in results.document["summary"].items():
        console.print(_table(config, mode, arms))
    console.print(_legend(config), highlight=False)
    draw_forgetting(results.document, plot)


def _table(config: dict[str, Any], mode: str, arms: dict[str, Any]) -> Table:
    table = Table(title=f"{config['task']}, optimizer state {mode}: {config['metric']}", title_justify="left")
    for heading in ("optimizer", "best lr", "right after", "at the end", "forgetting", "transfer", "saved to AdamW"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right", no_wrap=True)
    table.add_column("saved to a low rate", justify="right", no_wrap=True)
    for name, row in arms.items():
        at = next((rate for rate in row["rates"] if rate["lr"] == row["best"]), None)
        if at is None:
            table.add_row(ARMS[name].title, "diverged")
            continue
        numbers = [_pm(at[key]) for key in ("right_after", "final", "forgetting", "backward_transfer")]
        compared = [_pm(row.get(f"saved_{key}")) for key in ("adamw", "against")]
        table.add_row(ARMS[name].title, f"{row['best']:.2g}", *numbers, *compared)
    return table


def _pm(value: dict[str, Any] | None) -> str:
    return "-" if value is None else f"{value['mean']:.3g} ± {value['sd']:.1g}"


def _legend(config: dict[str, Any]) -> str:
    return (
        f"mean ± standard deviation over seeds {config['seeds']}, at the rate with the best end. Saved: how much less\n"
        "is forgotten than by the other at equal plasticity, over the rates whose plasticity the other reaches too;\n"
        "below 0 it is more. A low rate: period 1, and a rate of the slow group that is as much lower."
    )
