"""The figure of `python -m benchmarks scaling`, drawn from its JSON alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

COLORS = {
    "AdamW": "#000000",
    "Momentum": "#56B4E9",
    "DeltaMomentum": "#D55E00",
    "DMGD": "#882255",
    "M3": "#332288",
    "DGD": "#661100",
    "Muon on every rank": "#0072B2",
}


def draw_scaling(document: Mapping[str, Any], path: Path) -> Path:
    """Draw the optimizer's share of the training step over the number of GPUs, a panel per model."""
    models = document["predictions"]
    figure, panels = plt.subplots(1, len(models), figsize=(4 * len(models), 3.6), sharey=True, layout="constrained")
    for axes, (size, rows) in zip(panels, models.items(), strict=True):
        for name, color in COLORS.items():
            ranks = [int(each) for each in rows[name]]
            shares = [100 * each["share"] for each in rows[name].values()]
            axes.plot(ranks, shares, color=color, label=name, linestyle="--" if name in ("AdamW",) else "-")
        axes.set(title=f"{size}, predicted", xscale="log", yscale="log", xlabel="GPUs")
        axes.set_xticks(ranks, [str(each) for each in ranks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("optimizer, % of the training step")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
