"""The figures of `step_time` and `kernels`: times as ratios, with their quartiles."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from .optimizers import OPTIMIZERS
from .plots import COLORS, STYLE

OTHERS = {"adamw (again)": "AdamW again", "muon (other)": "Muon (pytorch_optimizer)"}  # in the colour of what they copy


def draw_step_time(document: Mapping[str, Any], path: Path) -> Path:
    """Ratio of step times to AdamW's, with quartiles; milliseconds and state beside the bars."""
    shapes = document["shapes"]
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(1, len(shapes), figsize=(4.4 * len(shapes) + 3.2, 3.4), sharey=True, squeeze=False)
        for axis, (shape, result) in zip(axes[0], shapes.items(), strict=True):
            arms = result["arms"]
            for row, (arm, numbers) in enumerate(arms.items()):
                name = arm.partition(" ")[0]
                spread = [[numbers["ratio"] - numbers["ratio_q1"]], [numbers["ratio_q3"] - numbers["ratio"]]]
                fade = 0.45 if arm != name else 0.9
                axis.barh(row, numbers["ratio"], xerr=spread, color=COLORS[name], alpha=fade, error_kw={"lw": 1})
                kept, made = numbers["state_bytes_per_parameter"], numbers["transient_bytes_per_parameter"]
                note = f"  {_digits(numbers['ms'])} ms, {kept:.3g} + {made:.2g} B"
                axis.text(numbers["ratio_q3"], row, note, va="center", fontsize=8)
            titles = [OPTIMIZERS[arm].title if arm in OPTIMIZERS else OTHERS[arm] for arm in arms]
            axis.set_yticks(range(len(arms)), titles)
            axis.set(xscale="log", title=f"{shape}, {result['parameters'] / 1e6:.2f}M parameters")
            axis.set_xlim(
                min(0.3, *(n["ratio_q1"] for n in arms.values())), 12 * max(n["ratio"] for n in arms.values())
            )
            axis.axvline(1, color="black", linewidth=0.8)
        axes[0][0].invert_yaxis()
        label = (
            "time of one step relative to fused AdamW (then milliseconds, bytes of state + temporaries per parameter)"
        )
        figure.supxlabel(label, fontsize=10)
        figure.savefig(path)
        plt.close(figure)
    return path


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def draw_kernels(document: Mapping[str, Any], path: Path) -> Path:
    """Time relative to the plain way, per operation and shape; GFLOP/s and the share of the ceiling beside it."""
    kernels, ceiling = document["kernels"], document["ceilings"]["gflops"]
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(
            1, len(kernels), figsize=(3.4 * len(kernels) + 0.8, 2.8), sharey=True, squeeze=False
        )
        for axis, (name, results) in zip(axes[0], kernels.items(), strict=True):
            for row, result in enumerate(results.values()):
                if not result["correct"]:
                    axis.text(0.1, row, "wrong", va="center", color="red", fontsize=8)
                    continue
                ratio = result["ratio"]
                spread = [[ratio - result["ratio_q1"]], [result["ratio_q3"] - ratio]]
                axis.barh(row, ratio, xerr=spread, color="#4477aa", alpha=0.9, error_kw={"lw": 1})
                note = f"  {result['ms']:.3g} ms"
                if result["gflops"] > 0:
                    note += f", {100 * result['gflops'] / ceiling:.0f} %"
                axis.text(result["ratio_q3"], row, note, va="center", fontsize=8)
            axis.set_yticks(range(len(results)), list(results))
            axis.set(title=name, xlim=(0, 2.0))
            axis.axvline(1, color="black", linewidth=0.8)
        axes[0][0].invert_yaxis()
        figure.supxlabel(
            "time relative to the plain way (then milliseconds, share of the fastest product)", fontsize=10
        )
        figure.savefig(path)
        plt.close(figure)
    return path
