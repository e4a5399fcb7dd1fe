"""What is left of a first language after a second, by model: forgetting against plasticity over learning rates.

1. Every model learns one synthetic language after the other with AdamW, at every learning rate; the Transformer also
   with EWC and with replay, as references.
2. Forgetting is compared at equal plasticity, against the Transformer's frontier (see frontier.py).
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from .command_line import add_arguments, carry_out, floats
from .continual import Course, cached_sequence
from .frontier import measures, saved
from .measure import machine, versions
from .plots import STYLE
from .tasks.languages import MODELS
from .trials import Meter, Results, run_trials

RESULTS = Path(__file__).parent / "results"
REFERENCE = "transformer"
ARMS = {model: (model, "adamw") for model in reversed(MODELS)} | {
    f"{REFERENCE} + {name}": (REFERENCE, name) for name in ("ewc", "replay")
}  # the slowest first
COLORS = dict(zip(ARMS, ("#4477aa", "#66ccee", "#999999", "#885511", "#00CCEE"), strict=True))
Point = tuple[float, float]  # right after, forgetting


def main(arguments: list[str]) -> int:
    return carry_out("two_languages", arguments, parse(arguments), kind=Course, run=run, report=report)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks two_languages", description=__doc__.splitlines()[0])
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated; default: all")
    parser.add_argument("--steps", type=int, default=300, help="of each language")
    parser.add_argument("--lrs", type=floats, default=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3])
    add_arguments(parser, output=RESULTS / "two_languages.json")
    args = parser.parse_args(arguments)
    args.arms = args.arms.split(",")
    if unknown := [name for name in args.arms if name not in ARMS]:
        parser.error(f"no arm named {unknown[0]!r}; there are: {', '.join(ARMS)}")
    return args


def run(args: argparse.Namespace, results: Results, _: Console) -> None:
    """Fill `results`."""
    courses = {
        (arm, lr): [
            Course("languages", (("model", ARMS[arm][0]),), ARMS[arm][1], lr, seed, 2, args.steps, reset=False)
            for seed in args.seeds
        ]
        for arm in args.arms
        for lr in args.lrs
    }
    every = [course for group in courses.values() for course in group]
    with Meter(sum(course.steps for course in every)) as meter:
        run_trials("learn", every, results, meter, args.workers)
    sequence = cached_sequence("languages", (("model", args.arms[0]),) if args.arms[0] in MODELS else ())
    results.document |= {
        "benchmark": "two_languages", "machine": machine(), "versions": versions(),
        "config": {
            **{key: value for key, value in sequence.describe().items() if key != "model"},
            "metric": sequence.metric, "steps": args.steps, "lrs": args.lrs, "seeds": args.seeds,
        },
        "arms": summarize(args, courses, results),
    }  # fmt: skip


def summarize(
    args: argparse.Namespace, courses: dict[tuple[str, float], list[Course]], results: Results
) -> dict[str, Any]:
    """By arm, the four measures at every rate, seed by seed, and what is saved to the reference at equal plasticity."""
    found = {
        at: [None if results.trials[c]["diverged"] else measures(results.trials[c]["scores"], False) for c in group]
        for at, group in courses.items()
    }

    def frontier(arm: str, seed: int) -> list[Point]:
        points = [found[arm, lr][seed] for lr in sorted(args.lrs)]
        return [(point["right_after"], point["forgetting"]) for point in points if point is not None]

    summary: dict[str, Any] = {}
    for arm in args.arms:
        summary[arm] = {"rates": {f"{lr:g}": found[arm, lr] for lr in args.lrs}}
        if arm != REFERENCE and REFERENCE in args.arms:
            pairs = [saved(frontier(arm, seed), frontier(REFERENCE, seed)) for seed in range(len(args.seeds))]
            summary[arm]["saved"] = [pair for pair in pairs if pair is not None]
    return summary


def report(results: Results, plot: Path, console: Console) -> None:
    console.print(_table(results.document))
    draw(results.document, plot)


def _table(document: dict[str, Any]) -> Table:
    config = document["config"]
    table = Table(title=f"{config['metric']}: mean of the seeds ± standard deviation", title_justify="left")
    for heading in ("arm", "lr", "right after", "at the end", "forgetting", f"saved to {REFERENCE}"):
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for arm, row in document["arms"].items():
        for index, (lr, seeds) in enumerate(row["rates"].items()):
            first = (arm, _pm(row.get("saved"))) if index == 0 else ("", "")
            if None in seeds:
                table.add_row(first[0], lr, "diverged", "", "", first[1])
                continue
            numbers = [_pm([seed[key] for seed in seeds]) for key in ("right_after", "final", "forgetting")]
            table.add_row(first[0], lr, *numbers, first[1])
    return table


def _pm(values: list[float] | None) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def draw(document: dict[str, Any], path: Path) -> Path:
    """The frontiers: every arm a line through its learning rates, means of the seeds."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.6, 4.6))
        for arm, row in document["arms"].items():
            rates = [seeds for seeds in row["rates"].values() if None not in seeds]
            x, y = (
                [statistics.mean(seed[key] for seed in seeds) for seeds in rates]
                for key in ("right_after", "forgetting")
            )
            axis.plot(x, y, "--o" if "+" in arm else "-o", markersize=4, linewidth=1.4, color=COLORS[arm], label=arm)
        axis.set(xlabel=f"{document['config']['metric']},\nright after each language", ylabel="forgetting of the first")
        axis.invert_xaxis()  # better learning to the right
        figure.legend(loc="outside lower center", ncols=3)
        figure.savefig(path)
        plt.close(figure)
    return path
