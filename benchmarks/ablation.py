"""What each part of an optimizer is worth: one change at a time, at one setting, on the same seeds.

Every row is compared with the reference seed by seed: the mean difference, its standard error and their ratio z. Rows
are not tuned for themselves: a row that loses may lose by its learning rate.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .measure import command, machine, versions
from .optimizers import Setting, find
from .plots import draw_ablation
from .tasks import make_task
from .training import Trial
from .trials import Meter, Results, run_trials

DRIFT = "drift"  # the table whose rows are trained on a text that changes its alphabet
ALPHABETS = 4


@dataclass(frozen=True)
class Ablation:
    """The rows of one ablation.

    Args:
        name: of the command, and of its file in results/.
        about: one line for --help.
        reference: what every row is compared with.
        tables: row names by table, without the reference; all are names that `optimizers.find` knows.
        settings: learning rate and momentum (or what the entry has in its place) by row.
        setting: of every other row.
    """

    name: str
    about: str
    reference: str
    tables: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, Setting]
    setting: Setting

    def main(self, arguments: list[str]) -> int:
        args = self._parse(arguments)
        torch.set_num_threads(1)
        results = Results(args.output, resume=args.resume)
        trials = {
            table: {name: self._trials(name, table, args) for name in self._rows(table, args.rows)}
            for table in args.tables
        }
        every = list(dict.fromkeys(trial for names in trials.values() for runs in names.values() for trial in runs))
        with Meter(sum(trial.steps for trial in every)) as meter:
            run_trials("ablation", every, results, meter, args.workers)
        task = make_task("text").describe()
        results.document |= {
            "benchmark": self.name, "command": command(self.name, arguments), "machine": machine(),
            "versions": versions(), "reference": self.reference,
            "config": {"steps": args.steps, "seeds": args.seeds, **task, "alphabets": ALPHABETS},
            "tables": {table: self._summarize(names, results) for table, names in trials.items()},
        }  # fmt: skip
        results.save()
        console = Console(width=None if sys.stdout.isatty() else 120)
        for table, summary in results.document["tables"].items():
            console.print(_table(table, summary))
        plot = draw_ablation(results.document, args.output.with_suffix(".png"))
        console.print(f"numbers: {args.output}\nplot:    {plot}")
        return 0

    def _parse(self, arguments: list[str]) -> argparse.Namespace:
        output = Path(__file__).parent / "results" / f"{self.name}.json"
        parser = argparse.ArgumentParser(f"python -m benchmarks {self.name}", description=self.about)
        parser.add_argument("--tables", type=_words, default=list(self.tables), help="which parts; default: all")
        parser.add_argument("--rows", type=_words, help="which rows beside the reference; default: all")
        parser.add_argument("--steps", type=int, default=300)
        parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in _words(text)], default=[11, 12, 13])
        parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
        parser.add_argument("--output", type=Path, default=output, help="the JSON file; the plot lies beside it")
        parser.add_argument("--resume", action="store_true", help="keep the finished trials of the JSON file")
        args = parser.parse_args(arguments)
        if unknown := [table for table in args.tables if table not in self.tables]:
            parser.error(f"no table named {unknown[0]!r}; there are: {', '.join(self.tables)}")
        return args

    def _rows(self, table: str, wanted: list[str] | None) -> list[str]:
        rows = [self.reference, *self.tables[table]]
        if wanted:
            rows = [name for name in rows if name == self.reference or {name, _short(name)} & {*wanted}]
        return list(dict.fromkeys(rows))

    def _trials(self, name: str, table: str, args: argparse.Namespace) -> list[Trial]:
        at = self.settings.get(name, self.setting)
        options = (("alphabets", ALPHABETS),) if table == DRIFT else ()
        return [Trial("text", options, name, at.lr, at.second, seed, args.steps, args.steps) for seed in args.seeds]

    def _summarize(self, names: dict[str, list[Trial]], results: Results) -> dict[str, dict[str, Any]]:
        """Per row: mean loss, and the difference to the reference over the same seeds."""
        losses = {name: [results.trials[trial]["loss"] for trial in trials] for name, trials in names.items()}
        return {name: compare(row, losses[self.reference]) for name, row in losses.items()}


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


def _words(text: str) -> list[str]:
    return text.split(",")


def _short(name: str) -> str:
    """A variant's name without its family's."""
    return name.partition(":")[2] or name


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
