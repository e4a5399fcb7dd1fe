"""The paper's two-dimensional valley: plain momentum overshoots it, delta momentum forgets in time.

    ψ(r, θ) = r² + k (r − θ + a sin(ω r))²                  started at (−3.5, 2)

Nested Learning, arXiv:2512.24695, Eq. 53 and Fig. 4. The paper gives neither k, a, ω nor any rate, so four valleys are
tried, and each optimizer is tuned on each for the fewest steps to ψ < 1e-6: from the paper's start, and again for the
median over five starts close to it, because early steps bounce chaotically and one start rewards a lucky bounce. The
search runs the rules on arrays, all settings at once; the winner is then run by the package's optimizer, whose path is
the one that is drawn.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.optim import Optimizer

from deep_optim import DeltaMomentum, Momentum

from .measure import command, machine, versions
from .plots import draw_toy

Point = tuple[float, float]
Valley = tuple[float, float, float]  # (k, a, ω)

VALLEYS: list[Valley] = [(1.0, 0.5, 3.0), (1.0, 1.0, 5.0), (5.0, 0.3, 5.0), (1.0, 2.0, 4.0)]
STARTS: list[Point] = [(-3.5, 2.0), (-3.6, 2.0), (-3.4, 2.0), (-3.5, 1.9), (-3.5, 2.1)]  # the paper's first
GOAL = 1e-6
MOST_STEPS = 1000
LRS = [1e-4 * 5000 ** (power / 59) for power in range(60)]  # 1e-4 to 0.5
MOMENTA = [0.5, 0.7, 0.8, 0.9, 0.95, 0.98]
INNER_LRS = [0.05, 0.1, 0.25, 0.5, 1.0]
FIXED_INNER_LR = 0.25  # delta momentum without its extra hyper-parameter: as many trials as momentum


def psi(r: Any, theta: Any, valley: Valley) -> Any:
    """The height, of a point or of arrays of points."""
    k, a, omega = valley
    return r**2 + k * (r - theta + a * np.sin(omega * r)) ** 2


def gradient(r: Any, theta: Any, valley: Valley) -> tuple[Any, Any]:
    k, a, omega = valley
    error = r - theta + a * np.sin(omega * r)
    return 2 * r + 2 * k * error * (1 + a * omega * np.cos(omega * r)), -2 * k * error


def steps_needed(valley: Valley, grid: list[dict[str, float]]) -> np.ndarray:
    """Steps to ψ < GOAL from each start under each setting, infinite beyond MOST_STEPS: [settings, starts].

    M ← momentum · M − inner_lr · (M · K) K + G with K = G / ‖G‖, and W ← W − lr · M.
    """
    lr, momentum, inner_lr = (np.array([[at.get(key, 0.0)] for at in grid]) for key in ("lr", "momentum", "inner_lr"))
    r, theta = (np.tile(column, (len(grid), 1)) for column in np.array(STARTS).T)
    first, second, needed = np.zeros_like(r), np.zeros_like(r), np.full(r.shape, np.inf)
    with np.errstate(over="ignore", invalid="ignore"):  # a diverged point is no number and never arrives
        for step in range(1, MOST_STEPS + 1):
            g1, g2 = gradient(r, theta, valley)
            erased = inner_lr * (first * g1 + second * g2) / (g1 * g1 + g2 * g2)
            first, second = momentum * first - erased * g1 + g1, momentum * second - erased * g2 + g2
            r, theta = r - lr * first, theta - lr * second
            needed[(psi(r, theta, valley) < GOAL) & (needed == np.inf)] = step
    return needed


def fastest(grid: list[dict[str, float]], needed: np.ndarray, starts: int) -> dict[str, Any]:
    """The setting with the lowest median over the first `starts`, and what all starts need under it (None: never)."""
    best = np.median(needed[:, :starts], axis=1).argmin()
    return {
        "tuned_on": starts,
        "setting": grid[best],
        "steps": [int(steps) if np.isfinite(steps) else None for steps in needed[best]],
    }


def path(valley: Valley, setting: dict[str, float]) -> list[Point]:
    """The points that the package's optimizer visits from the first start until ψ < GOAL."""
    weight = torch.tensor([STARTS[0]], dtype=torch.float64, requires_grad=True)  # [1, 2]: a memory of one output
    plain = dict(weight_decay=0.0, nesterov=False, output="identity", **setting)
    optimizer: Optimizer
    if "inner_lr" in setting:
        # The paper's rule with the one repair it needs: a gradient as a key has length 1.
        optimizer = DeltaMomentum([weight], side="right", gram_norm="trace", feature_map="identity", **plain)
    else:
        optimizer = Momentum([weight], **plain)
    points = [STARTS[0]]
    while len(points) <= MOST_STEPS and psi(*points[-1], valley) >= GOAL:
        weight.grad = torch.tensor([gradient(*points[-1], valley)], dtype=torch.float64)
        optimizer.step()
        points.append(tuple(weight[0].tolist()))
    return points


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks toy", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "toy.json")
    parser.add_argument("--plot-only", type=Path, metavar="FILE", help="only draw the plot of a JSON file")
    args = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    if args.plot_only:
        document = json.loads(args.plot_only.read_text())
        console.print(f"plot: {draw_toy(document, args.plot_only.with_suffix('.png'))}")
        return 0
    torch.set_num_threads(1)
    plain = [dict(lr=lr, momentum=beta) for beta, lr in itertools.product(MOMENTA, LRS)]
    grids = {
        "momentum": plain,
        "delta_momentum": [at | dict(inner_lr=inner_lr) for inner_lr in INNER_LRS for at in plain],
        "delta_momentum, fixed inner_lr": [at | dict(inner_lr=FIXED_INNER_LR) for at in plain],
    }
    runs = []
    for valley, name in track(list(itertools.product(VALLEYS, grids)), "searching", console=console):
        needed = steps_needed(valley, grids[name])
        described = dict(zip(("k", "a", "omega"), valley, strict=True))
        for starts in (1, len(STARTS)):
            best = fastest(grids[name], needed, starts)
            points = path(valley, best["setting"])
            runs.append({"valley": described, "optimizer": name, "trials": len(grids[name])} | best | {"path": points})
    document = {
        "benchmark": "toy", "command": command("toy", arguments), "starts": STARTS, "goal": GOAL, "runs": runs,
        "search_spaces": {"lr": LRS, "momentum": MOMENTA, "inner_lr": INNER_LRS}, "most_steps": MOST_STEPS,
        "machine": machine(), "versions": versions(),
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document, indent=1) + "\n")
    title = "steps to ψ < 1e-6 from the paper's start | from each of four starts beside it"
    table = Table("k, a, ω", "tuned on", *grids, title=title, title_justify="left")
    for valley, starts in itertools.product(VALLEYS, (1, len(STARTS))):
        rows = [run for run in runs if (tuple(run["valley"].values()), run["tuned_on"]) == (valley, starts)]
        counts = [[str(steps or "never") for steps in run["steps"]] for run in rows]
        cells = (f"{first} | {' '.join(others)}" for first, *others in counts)
        table.add_row(", ".join(f"{value:g}" for value in valley), f"{starts} of {len(STARTS)} starts", *cells)
    console.print(table)
    plot = draw_toy(document, args.output.with_suffix(".png"))
    console.print(f"numbers: {args.output}\nplot:    {plot}")
    return 0
