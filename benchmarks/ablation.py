"""What each part of an optimizer is worth: one change at a time, at one setting, on the same seeds.

Every row is compared with the reference seed by seed: the mean difference, its standard error and their ratio z. Rows
are not tuned for themselves: a row that loses may lose by its learning rate. With `--wall ROW` every row is trained
again, for as many steps as fit into the time of ROW's, and compared with ROW.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .command_line import add_arguments, carry_out
from .convergence import fitted_steps, step_times
from .measure import machine, versions
from .optimizers import Setting, find
from .plots import draw_ablation
from .report import compare
from .tasks import make_task
from .training import Trial
from .trials import Meter, Results, run_trials

DRIFT = "drift"  # the table whose rows are trained on a text that changes its alphabet
ALPHABETS = 4
TITLES = {"tables": "at equal steps", "equal_wall": "at equal wall time"}


@dataclass(frozen=True)
class Ablation:
    """The rows of one ablation.

    Args:
        name: of the command, and of its file in results/.
        about: one line for --help.
        reference: what every row is compared with, unless `--reference` says otherwise.
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
        return carry_out(self.name, arguments, args, kind=Trial, run=self._run, report=_report, width=120)

    def _run(self, args: argparse.Namespace, results: Results, console: Console) -> None:
        """Fill `results`."""
        task = make_task("text")
        rows = {table: self._rows(table, args) for table in args.tables}
        names = list(dict.fromkeys(name for each in rows.values() for name in each))
        lengths = {"tables": dict.fromkeys(names, args.steps)}
        if args.wall:
            if not {*names} <= {*results.document.get("step_time", ())}:
                console.print("timing one step of each, in shuffled rounds ...")
                settings = {name: self._setting(name) for name in names}
                results.document["step_time"] = step_times(task, settings, args.rounds)
            lengths["equal_wall"] = fitted_steps(results.document["step_time"], args.steps, args.wall)
        trials = {
            (kind, table): {name: self._trials(name, table, steps[name], args.seeds) for name in rows[table]}
            for kind, steps in lengths.items()
            for table in args.tables
        }
        every = dict.fromkeys(trial for names in trials.values() for runs in names.values() for trial in runs)
        with Meter(sum(trial.steps for trial in every)) as meter:
            run_trials("ablation", every, results, meter, args.workers)
        results.document.pop("equal_wall", None)
        results.document |= {
            "benchmark": self.name, "machine": machine(), "versions": versions(), "reference": args.reference,
            "config": {"steps": args.steps, "seeds": args.seeds, **task.describe(), "alphabets": ALPHABETS},
            "wall_reference": args.wall, **{kind: {} for kind in lengths},
        }  # fmt: skip
        for (kind, table), runs in trials.items():
            reference = args.wall if kind == "equal_wall" else args.reference
            results.document[kind][table] = _summarize(runs, reference, results)

    def _parse(self, arguments: list[str]) -> argparse.Namespace:
        output = Path(__file__).parent / "results" / f"{self.name}.json"
        parser = argparse.ArgumentParser(f"python -m benchmarks {self.name}", description=self.about)
        parser.add_argument("--tables", type=_words, default=list(self.tables), help="which parts; default: all")
        parser.add_argument("--rows", type=_words, help="which rows beside the reference; default: all")
        parser.add_argument("--steps", type=int, default=300)
        parser.add_argument("--wall", metavar="ROW", help="also train every row for as long as this one's steps take")
        parser.add_argument("--rounds", type=int, default=12, help="--wall: timing rounds")
        parser.add_argument("--reference", metavar="ROW", default=self.reference, help="default: %(default)s")
        add_arguments(parser, output=output, seeds=(11, 12, 13))
        args = parser.parse_args(arguments)
        if unknown := [table for table in args.tables if table not in self.tables]:
            parser.error(f"no table named {unknown[0]!r}; there are: {', '.join(self.tables)}")
        every = {self.reference: None} | {name: None for names in self.tables.values() for name in names}
        for option, row in (("--wall", args.wall), ("--reference", args.reference)):
            if row and row not in every:
                parser.error(f"{option}: no row named {row!r}; there are: {', '.join(every)}")
        return args

    def _rows(self, table: str, args: argparse.Namespace) -> list[str]:
        rows = self.tables[table]
        if args.rows:
            rows = tuple(name for name in rows if {name, _short(name)} & {*args.rows})
        return list(dict.fromkeys([args.reference, *([args.wall] if args.wall else []), *rows]))

    def _setting(self, name: str) -> Setting:
        return self.settings.get(name, self.setting)

    def _trials(self, name: str, table: str, steps: int, seeds: list[int]) -> list[Trial]:
        at = self._setting(name)
        options = (("alphabets", ALPHABETS),) if table == DRIFT else ()
        return [Trial("text", options, name, at.lr, at.second, seed, steps, steps) for seed in seeds]


def _summarize(rows: dict[str, list[Trial]], reference: str, results: Results) -> dict[str, dict[str, Any]]:
    """Per row: steps, mean loss, and the difference to the reference over the same seeds."""
    losses = {name: [results.trials[trial]["loss"] for trial in trials] for name, trials in rows.items()}
    return {name: {"steps": rows[name][0].steps} | compare(row, losses[reference]) for name, row in losses.items()}


def _words(text: str) -> list[str]:
    return text.split(",")


def _short(name: str) -> str:
    """A variant's name without its family's."""
    return name.partition(":")[2] or name


def _report(results: Results, plot: Path, console: Console) -> None:
    for kind, title in TITLES.items():
        for table, rows in results.document.get(kind, {}).items():
            console.print(_table(f"{table}, {title}", rows))
    draw_ablation(results.document, plot)


def _table(title: str, rows: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("", "steps", "loss", "minus the reference", "z"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, row in rows.items():
        if row["mean"] is None:
            table.add_row(find(name).title, str(row["steps"]), "diverged", "", "")
            continue
        z = "" if row["z"] is None else f"{row['z']:+.1f}"
        difference = f"{row['difference']:+.4f} ± {row['error']:.4f}"
        table.add_row(find(name).title, str(row["steps"]), f"{row['mean']:.4f}", difference, z)
    return table
