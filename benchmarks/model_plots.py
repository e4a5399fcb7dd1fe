"""The figure of `models`: right answers per problem and model, every seed a dot."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from .plots import STYLE
from .sequence_models import MODELS

_COLORS = dict(
    zip(
        MODELS,
        ("#999999", "#ccbb44", "#ee6677", "#aa3377", "#cc99bb", "#228833", "#66ccee", "#4477aa", "#332288"),
        strict=True,
    )
)


def draw_models(document: Mapping[str, Any], path: Path) -> Path:
    """One row of bars per problem, one panel per test."""
    problems = document["problems"]
    columns = max(len(next(iter(rows.values()))["scores"]) for rows in problems.values())
    with plt.rc_context(STYLE | {"axes.grid": False}):
        size = (3.2 * columns + 1.4, 0.32 * sum(map(len, problems.values())) + 0.6 * len(problems) + 0.6)
        heights = [len(rows) for rows in problems.values()]
        figure, axes = plt.subplots(
            len(problems), columns, figsize=size, squeeze=False, sharex=True, height_ratios=heights
        )
        for line, (problem, rows) in zip(axes, problems.items(), strict=True):
            tests = list(next(iter(rows.values()))["scores"])
            for axis in line[len(tests) :]:
                axis.set_visible(False)
            for axis, test in zip(line, tests, strict=False):
                for row, (model, numbers) in enumerate(rows.items()):
                    scores = numbers["scores"][test]
                    axis.barh(row, statistics.mean(scores), color=_COLORS.get(model, _COLORS["hope"]), alpha=0.85)
                    axis.plot(scores, [row] * len(scores), "o", color="black", markersize=2.5)
                axis.set(title=f"{problem}: {test}", xlim=(0, 1.02))
                axis.set_yticks(range(len(rows)), list(rows) if axis is line[0] else [""] * len(rows))
                axis.invert_yaxis()
        figure.supxlabel("right answers (bar: mean over seeds, dots: seeds)", fontsize=10)
        figure.savefig(path)
        plt.close(figure)
    return path


def draw_language(document: Mapping[str, Any], path: Path) -> Path:
    """Training loss against steps and against seconds, and the held-out loss against parameters."""
    rows = [row for row in document["rows"] if row["curve"]]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), sharey=True)
        for row in rows:
            color = _COLORS.get(row["model"])
            steps, losses = zip(*row["curve"], strict=True)
            label = f"{row['model']} ({row['dim']})"
            (line,) = axes[0].plot(steps, losses, label=label, color=color, linewidth=1.4)
            axes[1].plot([row["seconds"] * step / row["steps"] for step in steps], losses, color=line.get_color())
            found = [loss for loss in row["loss"] if loss is not None]
            axes[2].plot([row["parameters"]] * len(found), found, "o", color=line.get_color(), markersize=4)
        axes[0].set(xlabel="steps", ylabel="nats per byte, in training")
        axes[1].set(xlabel="seconds of training")
        sizes = [row["parameters"] for row in rows]
        around = (0.8 * min(sizes), 1.2 * max(sizes))  # so that sizes that are almost alike stand together
        axes[2].set(xlabel="parameters", title="held-out documents, seeds are dots", xlim=around)
        lowest = min(loss for row in rows for loss in row["loss"] if loss is not None)
        axes[0].set_ylim(lowest - 0.1, lowest + 1.5)
        figure.legend(loc="outside lower center", ncols=4)
        figure.savefig(path)
        plt.close(figure)
    return path
