"""What was meta-learned, on tasks it was not learned on: every rule on the same seeds, and how they differ.

The score of a run is the mean logarithm of its held-out loss over the second half: 0.01 more is a loss 1 % higher.
"""

import multiprocessing
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ablation import compare
from .meta_learning import ARMS, TRAINED, TRAINING_SEEDS, drawn_w2, make, make_rule
from .tasks.stacked import Bytes, Images, StackedTask, Teacher
from .trials import start_worker
from .unroll import DMGD, Muon, Rates, unroll

UNSEEN = {
    "teacher relu": (Teacher, "relu"),
    "Fashion-MNIST": (Images, "fashion"),
    "Shakespeare": (Bytes, "shakespeare"),
}
DEEPER = {"teacher sin, 4 blocks": (Teacher, "sin", 4)}  # another network, so not for what one network's memory learned
LONGER = 4
POINTS = 12  # evaluations of a run

# Row: the arm whose rates it has, and its W₂. "moving w2" without hidden features is "w2" without them.
NONE, DRAWN, LEARNED = "none", "drawn", "learned"
ROWS = {
    "muon": ("muon", NONE),
    "rates": ("rates", NONE),
    "no inner step": ("no inner step", NONE),
    **{f"{arm}: {kind}": (arm, kind) for arm in ("w2", "w2 and rates") for kind in (NONE, DRAWN, LEARNED)},
    **{f"moving w2: {kind}": ("moving w2", kind) for kind in (DRAWN, LEARNED)},
}
ONE_NETWORK = {f"one network: {kind}": ("one network", kind) for kind in (NONE, DRAWN, LEARNED)}

# What each comparison holds against what: the worth of hidden features, of learning them, of both; then of the rates.
PAIRS = {
    "hand-set rates: drawn - none": ("w2: drawn", "w2: none"),
    "hand-set rates: learned - drawn": ("w2: learned", "w2: drawn"),
    "hand-set rates: learned - none": ("w2: learned", "w2: none"),
    "learned rates: drawn - none": ("w2 and rates: drawn", "w2 and rates: none"),
    "learned rates: learned - drawn": ("w2 and rates: learned", "w2 and rates: drawn"),
    "learned rates: learned - none": ("w2 and rates: learned", "w2 and rates: none"),
    "W2 steps too: drawn - none": ("moving w2: drawn", "w2: none"),
    "W2 steps too: learned - drawn": ("moving w2: learned", "moving w2: drawn"),
    "W2 steps too: learned - none": ("moving w2: learned", "w2: none"),
    "one network: drawn - none": ("one network: drawn", "one network: none"),
    "one network: learned - drawn": ("one network: learned", "one network: drawn"),
    "one network: learned - none": ("one network: learned", "one network: none"),
    "no hidden layer: rates learned - hand-set": ("rates", "w2: none"),
    "no hidden layer: rates learned beside W2 - hand-set": ("w2 and rates: none", "w2: none"),
    "Muon - no hidden layer, hand-set rates": ("muon", "w2: none"),
    "Muon - no hidden layer, rates learned": ("muon", "rates"),
    "no inner step, rates learned - no hidden layer, rates learned": ("no inner step", "rates"),
}

Learned = dict[tuple[str, int], dict[str, Any]]  # arm, meta-seed: the record of its meta-training


def parts(steps: int) -> dict[str, dict[str, tuple[Any, int]]]:
    """The parts of the test: tasks and lengths of their runs."""
    return {
        "trained on": {name: (which, steps) for name, which in TRAINED.items()},
        "unseen": {name: (which, steps) for name, which in (UNSEEN | DEEPER).items()},
        "unseen, 4 times as long": {name: (which, LONGER * steps) for name, which in UNSEEN.items()},
    }


class Run(NamedTuple):
    """A row on a task, over all seeds and meta-seeds."""

    part: str
    task: str
    which: Any  # the task's class and its arguments
    row: str
    steps: int


def runs(steps: int) -> list[Run]:
    """Everything there is to score."""
    return [
        Run(part, task, which, row, length)
        for part, tasks in parts(steps).items()
        for task, (which, length) in tasks.items()
        for row in (*ROWS, *(ONE_NETWORK if task not in DEEPER else ()))
    ]


def score_all(learned: Learned, seeds: list[int], steps: int, workers: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Yield every run with its scores [seed] and its curve, means over meta-seeds."""
    if max(seeds) >= TRAINING_SEEDS:
        raise ValueError(f"seeds from {TRAINING_SEEDS} on are for meta-training, got {max(seeds)}")
    one = partial(_score, learned, seeds)
    if workers <= 1:
        yield from map(one, runs(steps))
        return
    with multiprocessing.get_context("spawn").Pool(workers, start_worker) as pool:  # leaving it ends the workers
        yield from pool.imap(one, runs(steps))


def _score(learned: Learned, seeds: list[int], run: Run) -> tuple[Run, dict[str, Any]]:
    arm, _ = (ROWS | ONE_NETWORK)[run.row]
    problem = make(*run.which, one_network=ARMS[arm].one_network)
    rules = [make_row(learned, run.row, meta_seed, problem.family) for meta_seed in meta_seeds(learned)]
    return run, summarize(torch.stack([held_out(problem, rule, seeds, run.steps) for rule in rules]))


def meta_seeds(learned: Learned) -> list[int]:
    return sorted({meta_seed for _, meta_seed in learned})


def make_row(learned: Learned, row: str, meta_seed: int, family: str) -> Muon | DMGD:
    """The optimizer of a row, as one meta-training left it."""
    name, kind = (ROWS | ONE_NETWORK)[row]
    record = learned[name, meta_seed]
    w2: Tensor | None = None
    if kind == LEARNED:
        w2 = torch.tensor(record["w2"][family if ARMS[name].one_network else "any"], dtype=torch.float64)
    elif kind == DRAWN:
        w2 = drawn_w2()
    return make_rule(ARMS[name], Rates(**record["rates"]), w2)


def held_out(problem: StackedTask, rule: Muon | DMGD, seeds: list[int], steps: int) -> Tensor:  # [points, seeds]
    """The logarithm of the held-out loss, every few steps of a run."""
    every, batch, points = max(1, steps // POINTS), problem.held_out(seeds), []
    for step, (_, weights) in enumerate(unroll(problem, rule, seeds, steps, graph=False), start=1):
        if step % every == 0 or step == steps:
            with torch.no_grad():
                points.append(problem.loss(weights, batch).log())
    return torch.stack(points)


def summarize(logs: Tensor) -> dict[str, Any]:  # [meta-seeds, points, seeds]
    second_half = logs[:, logs.shape[1] // 2 :].mean(1)  # [meta-seeds, seeds]
    return {
        "scores": second_half.mean(0).tolist(),
        "by_meta_seed": second_half.mean(1).tolist(),
        "last": logs[:, -1].mean(0).tolist(),
        "curve": logs.mean((0, 2)).tolist(),
    }


def comparisons(scores: dict[str, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Every pair over the tasks of a part that have both rows: seed by seed, the mean over tasks; and task by task."""
    summary: dict[str, Any] = {}
    for title, (row, against) in PAIRS.items():
        both = {task: rows for task, rows in scores.items() if row in rows and against in rows}
        summary[title] = {"all": _difference(list(both.values()), row, against)}
        summary[title] |= {task: _difference([rows], row, against) for task, rows in both.items()}
    return summary


def _difference(tasks: list[dict[str, Any]], row: str, against: str) -> dict[str, Any]:
    ours, theirs = (
        [mean(seed) for seed in zip(*(rows[name]["scores"] for rows in tasks), strict=True)] for name in (row, against)
    )
    return {key: value for key, value in compare(ours, theirs).items() if key in ("difference", "error", "z")}


def what_moved(learned: Learned) -> dict[str, dict[str, float]]:
    """Per arm that learns W₂: how far it went from where it started, and how alike the meta-seeds' ways are.

    The length of W₂ and of the way in units of the start's length; the cosine between two ways, the mean over pairs.
    """
    summary = {}
    for arm in (name for name in ARMS if "w2" in ARMS[name].learns):
        after = [record["w2"] for (name, _), record in sorted(learned.items()) if name == arm]
        lengths, ways, cosines = [], [], []
        for family in after[0]:
            w2 = [torch.tensor(each[family], dtype=torch.float64) for each in after]
            moves = [weights - drawn_w2() for weights in w2]
            size = drawn_w2().expand_as(w2[0]).norm()
            lengths += [(weights.norm() / size).item() for weights in w2]
            ways += [(move.norm() / size).item() for move in moves]
            cosines += [torch.cosine_similarity(a.flatten(), b.flatten(), 0).item() for a, b in combinations(moves, 2)]
        summary[arm] = {"length": mean(lengths), "way": mean(ways), "agreement": mean(cosines) if cosines else 0.0}
    return summary
