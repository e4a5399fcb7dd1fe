"""The figure of `models`: right answers per problem and model, every seed a dot."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from .plots import STYLE
from .sequence_models import MODELS

_COLORS = dict(
    zip(MODELS, ("#999999", "#ccbb44", "#ee6677", "#aa3377", "#228833", "#66ccee", "#4477aa", "#332288"), strict=True)
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
