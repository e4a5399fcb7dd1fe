"""What each part of DMGD is worth: one change at a time, at one setting, on the same seeds.

The reference is DMGD with 16 hidden features. Every row is trained at its tuned learning rate and momentum, on seeds no
search has seen, and compared with it seed by seed: the mean difference, its standard error and their ratio z. Rows are
not tuned for themselves: a row that loses may lose by its learning rate. Muon, Momentum and DeltaMomentum stand beside
them at settings tuned for them.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .measure import command, machine, versions
from .optimizers import TUNED, find
from .plots import draw_ablation
from .tasks import make_task
from .training import Trial
from .trials import Meter, Results, run_trials
from .variants import TABLES

RESULTS = Path(__file__).parent / "results" / "dmgd.json"
REFERENCE = "dmgd:reference"
BASELINES = ("muon", "momentum", "delta_momentum")
DRIFT = ("no hidden layer", "hidden_dim=128", "momentum=0.98")
ALPHABETS = 4


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks dmgd", description=__doc__.splitlines()[0])
    parser.add_argument("--tables", default=",".join([*TABLES, "drift"]), help="which parts; default: all")
    parser.add_argument(
        "--rows", type=lambda text: text.split(","), help="which rows beside the reference; default: all"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[11, 12, 13])
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file; the plot lies beside it")
    parser.add_argument("--resume", action="store_true", help="keep the finished trials of the JSON file")
    args = parser.parse_args(arguments)
    wanted = args.tables.split(",")
    if unknown := [table for table in wanted if table not in (*TABLES, "drift")]:
        parser.error(f"no table named {unknown[0]!r}; there are: {', '.join([*TABLES, 'drift'])}")
    torch.set_num_threads(1)
    results = Results(args.output, resume=args.resume)
    rows = {table: [REFERENCE, *(f"dmgd:{row}" for row in TABLES.get(table, DRIFT))] for table in wanted}
    for table in {"structure", "drift"} & set(rows):
        rows[table] += BASELINES
    if args.rows:
        kept = {REFERENCE, *args.rows, *(f"dmgd:{row}" for row in args.rows)}
        rows = {table: [name for name in names if name in kept] for table, names in rows.items()}
    rows = {table: list(dict.fromkeys(names)) for table, names in rows.items()}
    trials = {table: {name: _trials(name, table, args) for name in names} for table, names in rows.items()}
    every = list(dict.fromkeys(trial for names in trials.values() for runs in names.values() for trial in runs))
    with Meter(sum(trial.steps for trial in every)) as meter:
        run_trials("ablation", every, results, meter, args.workers)
    results.document |= {
        "benchmark": "dmgd", "command": command("dmgd", arguments), "machine": machine(), "versions": versions(),
        "config": {"steps": args.steps, "seeds": args.seeds, **make_task("text").describe(), "alphabets": ALPHABETS},
        "tables": {table: summarize_rows(names, results) for table, names in trials.items()},
    }  # fmt: skip
    results.save()
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table, summary in results.document["tables"].items():
        console.print(_table(table, summary))
    plot = draw_ablation(results.document, args.output.with_suffix(".png"))
    console.print(f"numbers: {args.output}\nplot:    {plot}")
    return 0


def _trials(name: str, table: str, args: argparse.Namespace) -> list[Trial]:
    at = TUNED["text"].get(name, TUNED["text"]["dmgd"])
    options = (("alphabets", ALPHABETS),) if table == "drift" else ()
    return [Trial("text", options, name, at.lr, at.second, seed, args.steps, args.steps) for seed in args.seeds]


def summarize_rows(names: dict[str, list[Trial]], results: Results) -> dict[str, dict[str, Any]]:
    """Per row: mean loss, and the difference to the reference over the same seeds."""
    losses = {name: [results.trials[trial]["loss"] for trial in trials] for name, trials in names.items()}
    return {name: compare(row, losses[REFERENCE]) for name, row in losses.items()}


def compare(losses: list[float | None], reference: list[float | None]) -> dict[str, Any]:
    """Mean, and the paired difference to `reference` with its standard error and z; None where a run diverged."""
    pairs = [(a, b) for a, b in zip(losses, reference, strict=True) if a is not None and b is not None]
    if len(pairs) < len(losses):
        return {"losses": losses, "mean": None, "difference": None, "error": None, "z": None}
    differences = [a - b for a, b in pairs]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    z = mean / error if error else None
    return {"losses": losses, "mean": statistics.mean(a for a, _ in pairs), "difference": mean, "error": error, "z": z}


def _table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("", "loss", "minus the reference", "z"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, row in rows.items():
        if row["mean"] is None:
            table.add_row(find(name).title, "diverged", "", "")
            continue
        z = "" if row["z"] is None else f"{row['z']:+.1f}"
        table.add_row(find(name).title, f"{row['mean']:.4f}", f"{row['difference']:+.4f} ± {row['error']:.4f}", z)
    return table
