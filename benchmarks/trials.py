"""Run many trials over worker processes, show how long is left, and keep each finished one in a file at once."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Result = dict[str, Any]


class Run:
    """One training run: a frozen dataclass of everything that decides the outcome, besides the machine.

    Its fields are plain values, so that it can run in any process and be found again in a file, where pairs of name and
    value are an object. `title` names the fields that its label is made of.
    """

    title: ClassVar[str] = "{optimizer}"
    steps: int

    @property
    def label(self) -> str:
        """What is shown of it."""
        return (self.title + " lr={lr:g} seed={seed}").format(**vars(self))

    def to_json(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Run":
        return cls(**{k: tuple(value.items()) if isinstance(value, dict) else value for k, value in values.items()})

    def run(self) -> Result:
        """Train: at least whether it "diverged", and its "loss"."""
        raise NotImplementedError


class Results:
    """A benchmark's JSON file; `document` is everything in it but the trials."""

    def __init__(self, path: Path, *, resume: bool, kind: type[Run]) -> None:
        self.path = path
        self.document: dict[str, Any] = {}
        self.trials: dict[Any, Result] = {}
        if resume and path.exists():
            self.document = json.loads(path.read_text())
            for record in self.document.pop("trials", []):
                self.trials[kind.from_json(record["trial"])] = record["result"]

    def save(self) -> None:
        """Write beside the file, then move over it: an interruption leaves the old file or the new one."""
        records = [{"trial": trial.to_json(), "result": result} for trial, result in self.trials.items()]
        text = json.dumps(self.document | {"trials": records}, indent=1, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".json.part")
        draft.write_text(text + "\n")
        os.replace(draft, self.path)


class Meter:
    """A progress bar counted in training steps; plain lines where the output is no terminal."""

    def __init__(self, total_steps: int) -> None:
        self.total, self.done, self.start = total_steps, 0, time.perf_counter()
        columns = (TextColumn("{task.description:<48}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        # The estimate looks at the whole run: trials finish in lumps, which the usual 30 seconds cannot average.
        self.bar = Progress(
            *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            speed_estimate_period=1e9, disable=not sys.stdout.isatty(),
        )  # fmt: skip
        self.task = self.bar.add_task("", total=total_steps)

    def __enter__(self) -> "Meter":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def advance(self, phase: str, trial: Run, result: Result) -> None:
        """Count a finished trial and show it."""
        self.done += trial.steps
        loss = "diverged" if result["diverged"] else f"{result['loss']:.4g}"
        line = f"{phase}: {trial.label} -> {loss}"
        self.bar.update(self.task, description=line, completed=self.done, total=max(self.total, self.done))
        if self.bar.disable:
            elapsed = time.perf_counter() - self.start
            left = elapsed * max(self.total - self.done, 0) / self.done
            print(f"{line}  [{elapsed:.0f} s, about {left:.0f} s left]", flush=True)

    def skip(self, steps: int) -> None:
        """Trials that need not be run."""
        self.total -= steps


def run_trials(phase: str, trials: Iterable[Run], results: Results, meter: Meter, workers: int) -> list[Result]:
    """The result of every trial, in order; only those not yet in `results` are run."""
    trials = list(trials)
    missing = list(dict.fromkeys(trial for trial in trials if trial not in results.trials))
    meter.skip(sum(trial.steps for trial in trials) - sum(trial.steps for trial in missing))
    for trial, result in _finished(missing, workers):
        results.trials[trial] = result
        results.save()
        meter.advance(phase, trial, result)
    return [results.trials[trial] for trial in trials]


def _finished(trials: list[Run], workers: int) -> Iterator[tuple[Run, Result]]:
    workers = min(workers, len(trials))
    if workers <= 1:
        yield from map(_run, trials)
        return
    with multiprocessing.get_context("spawn").Pool(workers, start_worker) as pool:  # leaving it ends the workers
        yield from pool.imap_unordered(_run, trials)


def _run(trial: Run) -> tuple[Run, Result]:
    return trial, trial.run()


def cores() -> int:
    """How many processes can run at a time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker() -> None:
    """Set a worker process up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
