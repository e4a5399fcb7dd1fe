"""Does a learned initial memory help? Meta-train DMGD's W₂ and its rates on small tasks, test them on others.

`meta train` learns (meta_learning.py) and writes what it learned to a file; `meta test` reads the file and runs it on
tasks and lengths that no meta-training has seen, seed by seed against the same rule, at the same rates, with W₂ as the
package draws it and without a hidden layer. W₂ = 0 is no third arm: its features are zero, and the weights end where
they end without a hidden layer.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .command_line import integers
from .measure import command, machine, versions
from .meta_learning import ARMS, HAND_SET, HIDDEN_DIM, TRAINED, Budget, learn
from .meta_scores import comparisons, meta_seeds, parts, runs, score_all, what_moved
from .plots import draw_meta
from .tasks.stacked import WIDTH
from .unroll import Rates

RESULTS = Path(__file__).parent / "results"
MEMORY, SCORES = RESULTS / "meta-memory.json", RESULTS / "meta.json"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks meta", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train, test = (commands.add_parser(name) for name in ("train", "test"))
    for part in (train, test):
        part.add_argument("--memory", type=Path, default=MEMORY, help="the JSON file of what was learned")
    train.add_argument("--steps", type=int, default=24, help="length of a training run")
    train.add_argument("--iterations", type=int, default=25, help="steps of Adam")
    train.add_argument("--stack", type=int, default=2, help="runs of every task in an iteration")
    train.add_argument("--meta-seeds", type=integers, default=[1, 2])
    train.add_argument("--resume", action="store_true", help="keep the finished arms of the JSON file")
    test.add_argument("--seeds", type=integers, default=list(range(1, 7)))
    test.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    test.add_argument("--output", type=Path, default=SCORES, help="the JSON file; the plot lies beside it")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    return (_train if args.command == "train" else _test)(args, command("meta", arguments))


def _train(args: argparse.Namespace, repeat: str) -> int:
    document: dict[str, Any] = json.loads(args.memory.read_text()) if args.resume and args.memory.exists() else {}
    done = {(record["arm"], record["meta_seed"]): record for record in document.get("learned", [])}
    budget = Budget(args.steps, args.iterations, args.stack)
    document |= {
        "benchmark": "meta train", "command": repeat, "machine": machine(), "versions": versions(),
        "config": {**vars(budget), "tasks": list(TRAINED), "hidden_dim": HIDDEN_DIM, "width": WIDTH},
    }  # fmt: skip
    for meta_seed, (name, arm) in itertools.product(args.meta_seeds, ARMS.items()):
        if (name, meta_seed) in done:
            continue
        start = time.perf_counter()
        given = Rates(**done[arm.start, meta_seed]["rates"]) if arm.start else HAND_SET
        record = {"arm": name, "meta_seed": meta_seed, **learn(arm, given, meta_seed, budget)}
        record["seconds"] = time.perf_counter() - start
        done[name, meta_seed] = record
        _write(args.memory, document | {"learned": list(done.values())})
        rates = ", ".join(f"{key}={value:.3g}" for key, value in record["rates"].items() if key in arm.learns)
        first, last = (mean(part) for part in (record["meta_losses"][:5], record["meta_losses"][-5:]))
        count = f"[{len(done)} of {len(ARMS) * len(args.meta_seeds)}, {record['seconds']:.0f} s]"
        print(f"{name}, meta-seed {meta_seed}: {first:.4f} -> {last:.4f}  {rates}  {count}", flush=True)
    print(f"learned: {args.memory}")
    return 0


def _write(path: Path, document: dict[str, Any]) -> None:
    """One line for every arm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, allow_nan=False, separators=(",", ":")).replace('{"arm"', '\n{"arm"') + "\n")


def _test(args: argparse.Namespace, repeat: str) -> int:
    memory = json.loads(args.memory.read_text())
    learned = {(record["arm"], record["meta_seed"]): record for record in memory["learned"]}
    steps = memory["config"]["steps"]
    scores: dict[str, Any] = {}
    start = time.perf_counter()
    total = len(runs(steps))
    for count, (run, summary) in enumerate(score_all(learned, args.seeds, steps, args.workers), start=1):
        scores.setdefault(run.part, {}).setdefault(run.task, {})[run.row] = summary
        seconds = time.perf_counter() - start
        line = f"{run.part}: {run.task}, {run.row}: {mean(summary['scores']):.4f}"
        print(f"{line}  [{count} of {total}, {seconds:.0f} s]", flush=True)
    document = {
        "benchmark": "meta test", "command": repeat, "machine": machine(), "versions": versions(),
        "config": {
            "seeds": args.seeds, "meta_seeds": meta_seeds(learned), "training": memory["config"],
            "lengths": {part: next(iter(tasks.values()))[1] for part, tasks in parts(steps).items()},
        },
        "what_moved": what_moved(learned),
        "comparisons": {part: comparisons(tasks) for part, tasks in scores.items()},
        "scores": scores,
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_table(document["comparisons"]))
    for arm, moved in document["what_moved"].items():
        numbers = ", ".join(f"{key} {value:.2f}" for key, value in moved.items())
        console.print(f"{arm}: {numbers}", highlight=False)
    plot = draw_meta(document, args.output.with_suffix(".png"))
    console.print(f"numbers: {args.output}\nplot:    {plot}")
    return 0


def _table(differences: dict[str, dict[str, Any]]) -> Table:
    """Differences of the log loss, times 100: about per cent of the loss."""
    table = Table(title="difference of the log loss x 100, and z", title_justify="left")
    for heading in ("", *differences):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for title in next(iter(differences.values())):
        rows = [part[title]["all"] for part in differences.values()]
        table.add_row(title, *(_cell(row) for row in rows))
    return table


def _cell(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return "diverged"
    z = "" if row["z"] is None else f" ({row['z']:+.1f})"
    return f"{100 * row['difference']:+.2f} ± {100 * row['error']:.2f}{z}"
