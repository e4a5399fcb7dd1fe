"""Forgetting against plasticity: what a run says, what an arm's runs say together, and the figure.

With s[i][j] the score of task j after task i, of T tasks:

    right after         mean of s[j][j]                            plasticity
    final               mean of s[T][j]
    backward transfer   mean over j < T of s[T][j] − s[j][j]       below 0: training on made it worse
    forgetting          mean over j < T of best s[i][j] − s[T][j]  over i < T, so never below 0 by more than a fluke

where the signs are turned for losses, of which less is better. Who learns less has less to forget: forgetting is read
at equal plasticity only, off the other arm's frontier, the polygon through its learning rates.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .continual import ARMS, Course
from .plots import COLORS, STYLE

MEASURES = ("right_after", "final", "backward_transfer", "forgetting")
MODES = {"carried": False, "reset": True}
_MORE_COLORS = {  # an arm and the lower rate that it is compared with share one; references and lower rates are dashed
    "multi_frequency": "#EE3377",
    "low_rate": "#EE3377",
    "multi_frequency_momentum": "#88CC00",
    "low_rate_momentum": "#88CC00",
    "ewc": "#885511",
    "replay": "#00CCEE",
}


def measures(scores: list[list[float]], higher_is_better: bool) -> dict[str, float]:
    """The four numbers of the module's docstring from one run's scores."""
    sign, last = (1.0 if higher_is_better else -1.0), len(scores) - 1
    earlier = range(last)
    best = [max((sign * scores[i][j] for i in range(j, last)), default=0.0) for j in earlier]
    return {
        "right_after": statistics.mean(scores[j][j] for j in range(last + 1)),
        "final": statistics.mean(scores[last]),
        "backward_transfer": statistics.mean(sign * (scores[last][j] - scores[j][j]) for j in earlier) if last else 0.0,
        "forgetting": statistics.mean(best[j] - sign * scores[last][j] for j in earlier) if last else 0.0,
    }


Point = tuple[float, float]  # right after, forgetting


def at_plasticity(frontier: Sequence[Point], right_after: float) -> float | None:
    """The least forgetting of the polygon through `frontier` at a plasticity; None beyond its ends."""
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(frontier):
        if min(x0, x1) <= right_after <= max(x0, x1):
            found.append(y0 + (right_after - x0) / (x1 - x0) * (y1 - y0) if x1 != x0 else min(y0, y1))
    return min(found, default=None)


def saved(own: Sequence[Point], reference: Sequence[Point]) -> float | None:
    """How much less is forgotten than at the same plasticity on the reference's frontier: mean over the own points.

    Points beyond the reference's plasticity are left out; None if all are.
    """
    pairs = [(at_plasticity(reference, right_after), forgetting) for right_after, forgetting in own]
    common = [there - here for there, here in pairs if there is not None]
    return statistics.mean(common) if common else None


def summarize(courses: Mapping[Course, dict[str, Any]], higher_is_better: bool) -> dict[str, dict[str, Any]]:
    """By mode and arm: every learning rate's measures over the seeds, the best rate, and forgetting against others."""
    summary: dict[str, dict[str, Any]] = {}
    for mode, reset in MODES.items():
        runs = {course: result for course, result in courses.items() if course.reset == reset}
        names = [name for name in ARMS if any(course.optimizer == name for course in runs)]
        seeds = sorted({course.seed for course in runs})
        frontiers = {
            (name, seed): [
                point for lr in _rates(runs, name) if (point := _point(runs, name, lr, seed, higher_is_better))
            ]
            for name in names
            for seed in seeds
        }
        for name in names:
            rates = [_over_seeds(runs, name, lr, seeds, higher_is_better) for lr in _rates(runs, name)]
            row: dict[str, Any] = {"rates": rates, "best": _best(rates, higher_is_better)}
            for key, reference in (("adamw", "adamw"), ("against", ARMS[name].against)):
                if reference in names and reference != name:
                    pairs = [saved(frontiers[name, seed], frontiers[reference, seed]) for seed in seeds]
                    whole = [value for value in pairs if value is not None]
                    row[f"saved_{key}"] = _mean_sd(whole) | {"reference": reference} if whole else None
            summary.setdefault(mode, {})[name] = row
    return summary


def _rates(runs: Mapping[Course, Any], name: str) -> list[float]:
    return sorted({course.lr for course in runs if course.optimizer == name})


def _found(runs: Mapping[Course, Any], name: str, lr: float, seed: int, higher: bool) -> dict[str, float] | None:
    (result,) = (r for c, r in runs.items() if (c.optimizer, c.lr, c.seed) == (name, lr, seed))
    return None if result["diverged"] else measures(result["scores"], higher)


def _point(runs: Mapping[Course, Any], name: str, lr: float, seed: int, higher: bool) -> Point | None:
    found = _found(runs, name, lr, seed, higher)
    return found and (found["right_after"], found["forgetting"])


def _over_seeds(runs: Mapping[Course, Any], name: str, lr: float, seeds: list[int], higher: bool) -> dict[str, Any]:
    every = [_found(runs, name, lr, seed, higher) for seed in seeds]
    whole = [found for found in every if found is not None]
    row: dict[str, Any] = {"lr": lr, "diverged": len(every) - len(whole)}
    if len(whole) == len(every):  # one diverged seed leaves no mean
        row |= {key: _mean_sd([found[key] for found in whole]) for key in MEASURES}
    return row


def _mean_sd(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def _best(rates: list[dict[str, Any]], higher_is_better: bool) -> float | None:
    """The learning rate with the best final average, on the seeds it is shown with: the frontier has all of them."""
    finite = [row for row in rates if "final" in row]
    pick = max if higher_is_better else min
    return pick(finite, key=lambda row: row["final"]["mean"])["lr"] if finite else None


def draw_forgetting(document: Mapping[str, Any], path: Path) -> Path:
    """Above, the frontiers; below, the final average at each learning rate. Left, state carried over; right, reset."""
    config, summary = document["config"], document["summary"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(summary), figsize=(5.6 * len(summary) + 1.6, 8.4), squeeze=False, sharey="row"
        )
        for (mode, arms), above, below in zip(summary.items(), axes[0], axes[1], strict=True):
            for name, row in arms.items():
                _line(above, name, row, "right_after", "forgetting")
                _line(below, name, row, "lr", "final")
            above.set(title=f"optimizer state {mode}", xlabel=f"{config['metric']} right after each task")
            below.set(xlabel="learning rate", xscale="log")
            above.axhline(0, color="#000000", linewidth=0.8)
            if not config["higher_is_better"]:
                above.invert_xaxis()  # better learning to the right, as for accuracies
        if config["log_axes"]:
            for axis in axes[0]:
                axis.set_xscale("log")
                axis.set_yscale("symlog", linthresh=1e-4)
                axis.set_xlim(right=max(axis.get_xlim()[1], 1e-6))  # SGD solves it to rounding
            for axis in axes[1]:
                axis.set_yscale("log")
                axis.set_ylim(bottom=max(axis.get_ylim()[0], 1e-6))
        axes[0][0].set_ylabel(f"forgetting ({config['metric'].split(' (')[0]})")
        axes[1][0].set_ylabel(f"{config['metric']}, mean at the end")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(summary) + 1)
        figure.savefig(path)
        plt.close(figure)
    return path


def _line(axis: Axes, name: str, row: Mapping[str, Any], x: str, y: str) -> None:
    rates = [rate for rate in row["rates"] if y in rate]
    xs = [rate["lr"] if x == "lr" else rate[x]["mean"] for rate in rates]
    dashed = name in ("ewc", "replay", "low_rate", "low_rate_momentum")
    axis.errorbar(
        xs, [rate[y]["mean"] for rate in rates], [rate[y]["sd"] for rate in rates],
        [0.0 if x == "lr" else rate[x]["sd"] for rate in rates], label=ARMS[name].title, marker="o", markersize=4,
        color=(COLORS | _MORE_COLORS).get(name), linewidth=1.4, elinewidth=0.7, linestyle="--" if dashed else "-",
    )  # fmt: skip
