"""What the trials say together: means, spreads, steps to a target, warnings; and the table that prints them."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from .optimizers import OPTIMIZERS, Setting, search_space
from .training import Trial
from .trials import Results

TARGETS = ("adamw", "muon", "momentum")  # whose final mean loss the others are timed to; the last two are one algorithm


def edges(best: Mapping[str, Setting], task: str) -> list[str]:
    """A warning for every best value that has no searched value beyond it: the true best may lie outside."""
    warnings = []
    for name, at in best.items():
        space = search_space(name, task)
        for label, value, grid in (
            ("lr", at.lr, {point.lr for point in space}),
            (OPTIMIZERS[name].second, at.second, {point.second for point in space}),
        ):
            if len(grid) > 1 and value in (min(grid), max(grid)):
                warnings.append(f"{name}: the best {label}, {value:g}, is at the edge of its grid")
    return warnings


def summarize_runs(runs: Mapping[str, list[Trial]], results: Results) -> dict[str, dict[str, Any]]:
    """Per optimizer: final losses by seed, their mean, spread and worst, and the steps to each target."""
    summary: dict[str, dict[str, Any]] = {}
    for name, trials in runs.items():
        outcomes = [results.trials[trial] for trial in trials]
        losses = [outcome["loss"] for outcome in outcomes]
        finite = [loss for loss in losses if loss is not None]
        whole = len(finite) == len(losses)  # one diverged seed leaves no mean
        summary[name] = {
            "steps": trials[0].steps,
            "losses": dict(zip([str(trial.seed) for trial in trials], losses, strict=True)),
            "mean": statistics.mean(finite) if whole else None,
            "sd": statistics.stdev(finite) if whole and len(finite) > 1 else None,
            "worst": max(finite) if whole else None,
            "diverged": len(losses) - len(finite),
        }
        extras = [key for key in outcomes[0]["scores"] if key != "loss"]
        if whole:
            summary[name] |= {key: statistics.mean(outcome["scores"][key] for outcome in outcomes) for key in extras}
    for target in TARGETS:
        goal = summary.get(target, {}).get("mean")
        for name, trials in runs.items():
            curve = mean_curve([results.trials[trial]["curve"] for trial in trials])
            summary[name][f"steps_to_{target}"] = None if goal is None else steps_to(goal, curve)
    return summary


def compare(losses: list[float | None], reference: list[float | None]) -> dict[str, Any]:
    """Mean, and the difference to `reference`, seed by seed, with its standard error and z; None where a run diverged.

    `z_unpaired` has the error that two independent samples would have: pairs that happen to move together make z large.
    """
    pairs = [(a, b) for a, b in zip(losses, reference, strict=True) if a is not None and b is not None]
    if len(pairs) < len(losses):
        return {"losses": losses, "mean": None, "difference": None, "error": None, "z": None, "z_unpaired": None}
    own, others = (list(column) for column in zip(*pairs, strict=True))
    differences = [a - b for a, b in pairs]
    mean = statistics.mean(differences)
    error, unpaired = 0.0, 0.0
    if len(pairs) > 1:
        error = (statistics.variance(differences) / len(pairs)) ** 0.5
        unpaired = ((statistics.variance(own) + statistics.variance(others)) / len(pairs)) ** 0.5
    return {
        "losses": losses,
        "mean": statistics.mean(own),
        "difference": mean,
        "error": error,
        "z": mean / error if error else None,
        "z_unpaired": mean / unpaired if unpaired else None,
    }


def mean_curve(curves: list[list[Any]]) -> list[tuple[int, float]]:
    """The mean over seeds, as far as all seeds go."""
    return [(points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*curves, strict=False)]


def steps_to(goal: float, curve: list[tuple[int, float]]) -> float | None:
    """The first step at or below `goal`, interpolated between two evaluations; None if it is never reached."""
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= goal:
            if before is None or math.isclose(before[1], loss):
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - goal) / (before[1] - loss)
        before = (step, loss)
    return None


def print_report(document: dict[str, Any], console: Console) -> None:
    """The table, the meaning of its columns, and the warnings."""
    config, times, wall = document["config"], document["step_time"], document["equal_wall"]
    reference = document["wall_reference"]
    versus = next((name for name in ("muon", "momentum") if name in document["equal_steps"]), reference)
    table = Table(title=f"{config['task']}: {config['metric']}", title_justify="left")
    table.add_column("optimizer", no_wrap=True)
    table.add_column("setting")
    for heading in (
        f"after {config['steps']} steps", f"steps to reach\nadamw | {versus}", "ms a step\n(to AdamW)",
        f"in the time of\n{config['steps']} {reference} steps", f"minus {versus}\n(z, unpaired z)",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in document["equal_steps"].items():
        timed = wall.get(name)
        table.add_row(
            OPTIMIZERS[name].title,
            " ".join(f"{key}={value:g}" for key, value in document["best"][name].items()),
            _loss(row),
            " | ".join(_steps(row.get(f"steps_to_{who}")) for who in ("adamw", versus)),
            f"{times[name]['ms']:.1f} ({times[name]['ratio']:.2f}x)",
            f"{_loss(timed)} @{timed['steps']}" if timed else "-",
            "" if name == versus else _difference(row, document["equal_steps"][versus]),
        )
    console.print(table)
    again = times["adamw (again)"]
    console.print(
        f"mean ± standard deviation (worst) over seeds {config['seeds']}; @n: the steps that fit into the time.\n"
        f"AdamW timed against itself: {again['ratio']:.3f} [{again['ratio_q1']:.3f}, {again['ratio_q3']:.3f}].",
        highlight=False,
    )
    for warning in document["edges"]:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)


def _steps(steps: float | None) -> str:
    return "-" if steps is None else f"{steps:.0f}"


def _difference(row: dict[str, Any], other: dict[str, Any]) -> str:
    """Of final losses at equal steps, over the seeds that both have."""
    seeds = [seed for seed in row["losses"] if seed in other["losses"]]
    if not seeds:
        return "-"
    numbers = compare(*([each["losses"][seed] for seed in seeds] for each in (row, other)))
    if numbers["z"] is None:
        return "-"
    return f"{numbers['difference']:+.3g} ± {numbers['error']:.2g} ({numbers['z']:+.1f}, {numbers['z_unpaired']:+.1f})"


def _loss(row: dict[str, Any]) -> str:
    if row["mean"] is None:
        return f"{row['diverged']} of {len(row['losses'])} diverged"
    return f"{row['mean']:.4g} ± {row['sd'] or 0:.2g} ({row['worst']:.4g})"
