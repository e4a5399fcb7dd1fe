"""The figures; each is drawn from a benchmark's JSON alone, so it can be drawn again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .optimizers import OPTIMIZERS
from .training import Trial

# Okabe and Ito's palette and one of Tol's, distinguishable with any colour vision; dashes separate baselines from ours
# in print.
COLORS = {
    "adamw": "#000000",
    "sgd": "#999999",
    "muon": "#0072B2",
    "schedule_free_adamw": "#CC79A7",
    "soap": "#009E73",
    "momentum": "#56B4E9",
    "normuon": "#88CCEE",
    "preconditioned_momentum": "#E69F00",
    "delta_momentum": "#D55E00",
    "delta_identity": "#DDCC77",
    "dmgd": "#882255",
    "dmgd_linear": "#AA4499",
    "ademamix": "#117733",
    "input_delta": "#44AA99",
    "dgd": "#661100",
    "m3": "#332288",
}
OURS = [name for name, entry in OPTIMIZERS.items() if "(ours)" in entry.title]
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}


def draw_convergence(document: Mapping[str, Any], trials: Mapping[Trial, dict[str, Any]], path: Path) -> Path:
    """Loss against steps, against wall time, and against the learning rate where one was searched."""
    config, names = document["config"], list(document["best"])
    searched = config["tuned_here"]
    panels = 1 + bool(document["equal_wall"]) + searched
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, panels, figsize=(max(4.6 * panels, 6.4), 4.6), squeeze=False)
        panel = iter(axes[0])
        steps_axis = next(panel)
        _curves(steps_axis, document, trials, "equal_steps", scale=dict.fromkeys(names, 1.0))
        steps_axis.set(xlabel="step", ylabel=config["metric"], title=f"equal steps ({config['steps']})")
        if document["equal_wall"]:
            wall_axis = next(panel)
            times, clock = document["step_time"], document["step_time"]["adamw"]["ms"] / 1e3
            scale = {name: clock * times[name]["ratio"] for name in names}
            _curves(wall_axis, document, trials, "equal_wall", scale=scale)
            wall_axis.set(xlabel="seconds of training", title="equal wall time")
            limits = [axis.get_ylim() for axis in (steps_axis, wall_axis)]
            wall_axis.sharey(steps_axis)
            steps_axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        if searched:
            _sensitivity(next(panel), document, trials)
        handles, labels = steps_axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), panels + 1))
        figure.savefig(path)
        plt.close(figure)
    return path


def _curves(
    axis: Axes,
    document: Mapping[str, Any],
    trials: Mapping[Trial, dict[str, Any]],
    part: str,
    scale: Mapping[str, float],
) -> None:
    """Mean over seeds with a band from the best to the worst seed."""
    ends = []
    for name, row in document[part].items():
        setting = tuple(document["best"][name].values())
        curves = [
            result["curve"]
            for trial, result in trials.items()
            if (trial.optimizer, trial.steps, str(trial.seed)) in {(name, row["steps"], s) for s in row["losses"]}
            and (trial.lr, trial.second) == setting
        ]
        common = min(map(len, curves))
        if common == 0:
            continue
        steps = np.array([step for step, _ in curves[0][:common]]) * scale[name]
        losses = np.array([[loss for _, loss in curve[:common]] for curve in curves])  # [seeds, evaluations]
        axis.fill_between(steps, losses.min(0), losses.max(0), color=COLORS[name], alpha=0.15, linewidth=0)
        axis.plot(
            steps, losses.mean(0), color=COLORS[name], linestyle="-" if name in OURS else "--",
            linewidth=1.8, label=OPTIMIZERS[name].title,
            zorder=2 if name in OURS else 3,  # dashes over a line that is the same
        )  # fmt: skip
        ends.append(losses)
    _zoom(axis, ends)


def _zoom(axis: Axes, ends: list[np.ndarray]) -> None:
    """Cut the first tenth of the descent, which is alike for all, off the top."""
    ends = [losses for losses in ends if losses.shape[1] > 1]
    if not ends:  # runs too short for a curve
        return
    lowest, highest = min(losses.min() for losses in ends), max(losses.max() for losses in ends)
    if 0 < 100 * lowest < highest:
        axis.set_yscale("log")
        return
    top = max(losses[:, max(1, losses.shape[1] // 8)].max() for losses in ends)
    axis.set_ylim(lowest - 0.05 * (top - lowest), top)


def _sensitivity(axis: Axes, document: Mapping[str, Any], trials: Mapping[Trial, dict[str, Any]]) -> None:
    """The best loss at each learning rate, over the values of the second hyper-parameter."""
    config, finite = document["config"], []
    for name, best in document["best"].items():
        losses: dict[float, list[float]] = {}
        for trial, result in trials.items():
            key = (trial.optimizer, trial.seed, trial.steps)
            if key == (name, config["tuning_seed"], config["tune_steps"]) and result["loss"] is not None:
                losses.setdefault(trial.lr, []).append(result["loss"])
        rates = sorted(losses)
        values = [min(losses[rate]) for rate in rates]
        style = dict(color=COLORS[name], linestyle="-" if name in OURS else "--", marker="o", markersize=4)
        axis.plot(rates, values, **style)
        if best["lr"] in losses:
            axis.plot(best["lr"], min(losses[best["lr"]]), "*", color=COLORS[name], markersize=13)
        finite += values
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set(xlabel="learning rate", title="search on one seed (star: chosen)")
    if finite and min(finite) > 0 and max(finite) / min(finite) > 100:
        axis.set_yscale("log")


def draw_toy(document: Mapping[str, Any], path: Path) -> Path:
    """The paths of momentum and delta momentum, tuned on the start that is drawn, over the contours of each valley."""
    valleys = list({tuple(run["valley"].values()): None for run in document["runs"]})
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(1, len(valleys), figsize=(3.6 * len(valleys), 3.9), sharey=True)
        for axis, (k, a, omega) in zip(axes, valleys, strict=True):
            runs = [
                run
                for run in document["runs"]
                if tuple(run["valley"].values()) == (k, a, omega) and run["tuned_on"] == 1
            ]
            r, theta = np.meshgrid(np.linspace(-5, 5, 500), np.linspace(-5, 4, 400))
            height = np.log10(r**2 + k * (r - theta + a * np.sin(omega * r)) ** 2 + 1e-3)
            axis.contourf(r, theta, height, levels=24, cmap="Greys", alpha=0.55)
            for name, color in {"momentum": COLORS["muon"], "delta_momentum": COLORS["delta_momentum"]}.items():
                run = next(run for run in runs if run["optimizer"] == name)
                style = dict(color=color, marker=".", markersize=4, linewidth=1.2)
                beside = "/".join(str(steps or "never") for steps in run["steps"][1:])
                label = f"{name}: {len(run['path']) - 1} steps\n(starts beside it: {beside})"
                axis.plot(*np.array(run["path"]).T, **style, label=label)
            axis.plot(*document["starts"][0], "k^", markersize=7)
            axis.plot(0, 0, "k*", markersize=11, zorder=3)
            axis.set(xlim=(-5, 5), ylim=(-5, 4), xlabel="r", title=f"k = {k:g}, a = {a:g}, ω = {omega:g}")
            axis.legend(loc="lower right", fontsize=7.5, frameon=True, framealpha=0.85)
        axes[0].set_ylabel("θ")
        figure.savefig(path)
        plt.close(figure)
    return path


def draw_ablation(document: Mapping[str, Any], path: Path) -> Path:
    """Every row's difference to the reference, seed by seed and in the mean, table by table."""
    family = f"{document['benchmark']}:"
    tables = {table: (names, document["reference"]) for table, names in document["tables"].items()}
    for table, names in document.get("equal_wall", {}).items():
        tables[f"{table}, at equal wall time"] = names, document["wall_reference"]
    rows = [(table, name, row) for table, (names, _) in tables.items() for name, row in names.items() if row["mean"]]
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, axis = plt.subplots(figsize=(8.2, 0.24 * len(rows) + 0.4 * len(tables) + 1.2))
        position, limit, ticks, labels = 0.0, 0.12, [], []
        for index, (table, name, row) in enumerate(rows):
            if index == 0 or rows[index - 1][0] != table:
                position += 1.4
                axis.annotate(table, (0.0, position), xycoords=("axes fraction", "data"), weight="bold", va="center")
                position += 1
            names, reference = tables[table]
            each = [a - b for a, b in zip(row["losses"], names[reference]["losses"], strict=True)]
            color = COLORS.get(name, "#000000")
            axis.plot(each, [position] * len(each), "o", color=color, alpha=0.35, markersize=4)
            if row["difference"] > limit:
                axis.plot([limit], [position], ">", color=color, markersize=6, clip_on=False)
            axis.plot([row["difference"]], [position], "|", color=color, markersize=12, markeredgewidth=2)
            ticks.append(position)
            labels.append(name.removeprefix(family).replace("_momentum", " momentum"))
            position += 1
        axis.axvline(0, color="#000000", linewidth=0.8)
        axis.set(yticks=ticks, yticklabels=labels, ylim=(position, 0), xlim=(-0.03, limit))
        axis.set_xlabel("loss minus the reference's, in nats per byte (arrows: beyond the frame)")
        figure.savefig(path)
        plt.close(figure)
    return path


def draw_memory(document: Mapping[str, Any], path: Path) -> Path:
    """Per kind of matrix, the mean over layers: inner loss, explained share, angle to the gradient, sizes."""
    kinds: dict[str, list[list[dict[str, float]]]] = {}
    for name, rows in document["reports"].items():
        kinds.setdefault(name.split(".")[-2], []).append(rows)
    colors = dict(zip(kinds, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), strict=False))

    def mean(layers: list[list[dict[str, float]]], key: str) -> list[float]:
        return [float(np.mean([row[key] for row in rows])) for rows in zip(*layers, strict=True)]

    with plt.rc_context(STYLE):
        figure, ((losses, explained), (angles, sizes)) = plt.subplots(2, 2, figsize=(9.2, 6.4), sharex=True)
        for kind, layers in kinds.items():
            steps, color = [int(step) for step in mean(layers, "step")], colors.get(kind, "#999999")
            losses.plot(steps, mean(layers, "loss_before"), color=color, linewidth=1, linestyle=":")
            losses.plot(steps, mean(layers, "loss_after"), color=color, linewidth=1.4, label=kind)
            explained.plot(steps, mean(layers, "explained"), color=color, linewidth=1.4)
            angle = np.degrees(np.arccos(np.clip(mean(layers, "cosine"), -1, 1)))
            angles.plot(steps, angle, color=color, linewidth=1.4)
            relative = np.divide(mean(layers, "w1_norm"), np.maximum(mean(layers, "linear_norm"), 1e-30))
            sizes.plot(steps, relative, color=color, linewidth=1.4)
        losses.axhline(1, color="#000000", linewidth=0.8)
        losses.set(ylabel="inner loss, before (dotted) and after", title="1 is an empty memory's")
        losses.legend()
        explained.set(ylabel="explained share", title="after the step, of what its features can answer")
        angles.axhline(90, color="#000000", linewidth=0.8)
        angles.set(xlabel="step", ylabel="degrees", title="angle between update and gradient (below 90: descent)")
        sizes.set(xlabel="step", ylabel="‖W₁‖ / ‖M‖", title="size of the hidden part")
        figure.savefig(path)
        plt.close(figure)
    return path


def draw_meta(document: Mapping[str, Any], path: Path) -> Path:
    """Held-out loss on the longest unseen runs: as it is, and relative to DMGD's without a hidden layer."""
    part = "unseen, 4 times as long"
    styles = {
        "muon": ("Muon", COLORS["muon"], "-"),
        "w2: none": ("no hidden layer", "#000000", "-"),
        "w2: drawn": ("W₂ as drawn", "#E69F00", "-"),
        "w2: learned": ("W₂ learned", "#D55E00", "-"),
        "rates": ("rates learned, no hidden layer", "#000000", "--"),
        "w2 and rates: learned": ("rates and W₂ learned", "#D55E00", "--"),
    }
    tasks = document["scores"][part]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, len(tasks), figsize=(3.7 * len(tasks), 6.2), sharex=True, squeeze=False)
        for (task, rows), (losses, relative) in zip(tasks.items(), axes.T, strict=True):
            reference = np.array(rows["w2: none"]["curve"])
            steps = document["config"]["lengths"][part] * np.arange(1, len(reference) + 1) / len(reference)
            for row, (label, color, dashes) in styles.items():
                curve = np.array(rows[row]["curve"])
                line = dict(color=color, linestyle=dashes, linewidth=1.4)
                losses.plot(steps, np.exp(curve), label=label, **line)
                relative.plot(steps, 100 * (np.exp(curve - reference) - 1), **line)
            losses.set(title=task, yscale="log")
            for formatted in (losses.yaxis.set_major_formatter, losses.yaxis.set_minor_formatter):
                formatted(FuncFormatter(lambda loss, _: f"{loss:g}"))
            relative.set(xlabel="step")
        axes[0, 0].set_ylabel("held-out loss")
        axes[1, 0].set_ylabel("% above no hidden layer")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.savefig(path)
        plt.close(figure)
    return path
