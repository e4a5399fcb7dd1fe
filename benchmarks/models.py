"""What sequence models can learn of problems with a known answer: Hope beside Transformer, LSTM, DeltaNet and others.

1. Every model at every learning rate, if there are several, on one seed; the best is the one with the most right
   answers, the lower loss where they tie.
2. The same model at that rate, on other seeds.
3. Tests on strings as long as in training and longer ones, the same for all.
"""

import argparse
import statistics
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .command_line import add_arguments, carry_out, floats
from .hope_variants import VARIANTS
from .lesson import Lesson
from .measure import machine, versions
from .model_plots import draw_models
from .problems import languages, mad, make_problem, recall, translation
from .sequence_models import EVERY, MODELS
from .trials import Meter, Results, run_trials

RESULTS = Path(__file__).parent / "results"
SUITES = {
    "languages": tuple(languages.PROBLEMS),
    "recall": tuple(recall.PROBLEMS),
    "mad": tuple(mad.PROBLEMS),
    "translation": tuple(translation.PROBLEMS),
}
TUNING_SEED = 0
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": dict(dim=32, layers=2, steps=1000, batch=32, lrs=[2e-3, 6e-3], device="cpu"),
    "gpu": dict(dim=128, layers=4, steps=10_000, batch=128, lrs=[5e-4, 1e-3, 2e-3, 4e-3], device="cuda"),
}


def main(arguments: list[str]) -> int:
    return carry_out("models", arguments, parse(arguments), kind=Lesson, run=run, report=report)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line over preset."""
    parser = argparse.ArgumentParser("python -m benchmarks models", description=__doc__.splitlines()[0])
    every = [name for names in SUITES.values() for name in names]
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="cpu: hours for all of a suite on two cores")
    parser.add_argument(
        "--task", default="languages", help=f"comma-separated: {', '.join({**SUITES, **dict.fromkeys(every)})}"
    )
    parser.add_argument(
        "--models", default=",".join(MODELS), help="comma-separated, or: ablation; default: all but these"
    )
    parser.add_argument("--dim", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lrs", type=floats)
    parser.add_argument("--device", help="on cuda, --workers 1")
    add_arguments(parser)
    parser.set_defaults(**PRESETS[parser.parse_known_args(arguments)[0].preset])
    args = parser.parse_args(arguments)
    args.problems = [name for word in args.task.split(",") for name in SUITES.get(word, (word,))]
    args.models = [name for word in args.models.split(",") for name in (VARIANTS if word == "ablation" else (word,))]
    for wanted, known in ((args.problems, every), (args.models, EVERY)):
        if unknown := [name for name in wanted if name not in known]:
            parser.error(f"nothing named {unknown[0]!r}; there are: {', '.join(known)}")
    if not args.output:
        args.output = RESULTS / f"models-{args.task.replace(',', '-').replace(' ', '-')}.json"
    return args


def run(args: argparse.Namespace, results: Results, console: Console) -> None:
    """Fill `results`. Models run in the order given: the slowest first leave no worker idle at the end."""
    config = {key: getattr(args, key) for key in ("preset", "dim", "layers", "batch", "seeds", "device")}
    for key, value in results.document.get("config", {}).items():  # steps and rates may differ, and stand in each row
        if key in config and config[key] != value:
            sys.exit(f"{results.path} has runs with {key}={value}, not {config[key]}; write to another --output")
    results.document |= {"benchmark": "models", "machine": machine(), "versions": versions(), "config": config}
    problems: dict[str, Any] = results.document.setdefault("problems", {})
    console.print(f"{', '.join(args.problems)}: {', '.join(args.models)}; {args.steps} steps, seeds {args.seeds}")

    def lesson(problem: str, model: str, lr: float, seed: int) -> Lesson:
        return Lesson(problem, model, args.dim, args.layers, lr, seed, args.steps, args.batch, args.device)

    searched = args.lrs if len(args.lrs) > 1 else []
    pairs = [(problem, model) for model in args.models for problem in args.problems]
    with Meter(len(pairs) * (len(searched) + len(args.seeds)) * args.steps) as meter:
        tuning = {pair: [lesson(*pair, lr, TUNING_SEED) for lr in searched] for pair in pairs}
        run_trials("tune", chain.from_iterable(tuning.values()), results, meter, args.workers)
        best = {pair: _best(tuning[pair], results) if searched else args.lrs[0] for pair in pairs}
        scoring = {pair: [lesson(*pair, best[pair], seed) for seed in args.seeds] for pair in pairs}
        run_trials("score", chain.from_iterable(scoring.values()), results, meter, args.workers)
    for problem in args.problems:
        rows = problems.get(problem, {}) | {model: _summary(scoring[problem, model], results) for model in args.models}
        problems[problem] = {model: rows[model] for model in EVERY if model in rows}


def _best(tuning: list[Lesson], results: Results) -> float:
    def quality(lesson: Lesson) -> tuple[float, float]:
        result = results.trials[lesson]
        if result["diverged"]:
            return -1.0, 0.0
        return next(iter(result["scores"].values())), -result["loss"]  # at the lengths of training alone

    return max(tuning, key=quality).lr


def _summary(lessons: list[Lesson], results: Results) -> dict[str, Any]:
    """Learning rate, parameters, seconds, and of every test the scores of all seeds (0 for a run that diverged)."""
    finished = [results.trials[lesson] for lesson in lessons]
    tests = list(make_problem(lessons[0].problem).tests)
    return {
        "lr": lessons[0].lr,
        "steps": lessons[0].steps,
        "parameters": finished[0]["parameters"],
        "seconds": statistics.median(result.get("seconds", 0.0) for result in finished),
        "scores": {test: [result["scores"].get(test, 0.0) for result in finished] for test in tests},
    }


def report(results: Results, plot: Path, console: Console) -> None:
    for problem, rows in results.document["problems"].items():
        console.print(_table(problem, rows))
    draw_models(results.document, plot)


def _table(problem: str, rows: dict[str, Any]) -> Table:
    table = Table(title=f"{problem}: mean of the seeds (worst)", title_justify="left")
    tests = list(next(iter(rows.values()))["scores"])
    for heading in ("model", *tests, "lr", "steps", "parameters", "s a run"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for model, row in rows.items():
        scores = [f"{statistics.mean(row['scores'][test]):.3f} ({min(row['scores'][test]):.3f})" for test in tests]
        table.add_row(
            model, *scores, f"{row['lr']:g}", str(row["steps"]), f"{row['parameters']:,}", f"{row['seconds']:.0f}"
        )
    return table
