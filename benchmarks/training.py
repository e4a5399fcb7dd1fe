"""One training run of an optimizer on a task."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .optimizers import Setting, build, find
from .tasks import Task, make_task
from .trials import Run

WARMUP_STEPS = 30


@dataclass(frozen=True)
class Trial(Run):
    """One optimizer on one task, at one setting."""

    task: str
    options: tuple[tuple[str, Any], ...]
    optimizer: str
    lr: float
    second: float
    seed: int
    steps: int
    eval_every: int

    @property
    def setting(self) -> Setting:
        return Setting(self.lr, self.second)

    def run(self) -> dict[str, Any]:
        return run_trial(self)


# One task per process: reading a corpus costs more than a step, and the trials of a run share it.
cached_task = cache(lambda name, options: make_task(name, **dict(options)))


def run_trial(trial: Trial) -> dict[str, Any]:
    """Train once. {"diverged": True, "loss": None} where a loss was not finite, which ends the run at an evaluation."""
    task = cached_task(trial.task, trial.options)
    model = task.model(trial.seed)
    entry = find(trial.optimizer)
    warmup = min(WARMUP_STEPS, max(1, trial.steps // 10))
    optimizers = build(trial.optimizer, task, model, trial.setting, warmup=warmup)
    total: Tensor | float = 0.0  # a sum is finite as long as all of its terms are; read where the device waits anyway
    curve: list[tuple[int, float]] = []
    scores: dict[str, float] = {}
    start = time.perf_counter()
    for step, batch in enumerate(task.batches(trial.seed, trial.steps), start=1):
        if entry.scheduled:
            scale_rates(optimizers, relative_rate(step, trial.steps, warmup))
        total += train_step(task, model, optimizers, batch)
        if step % trial.eval_every == 0 or step == trial.steps:
            scores = _evaluate(task, model, optimizers)
            if not math.isfinite(total + scores["loss"]):
                return {"diverged": True, "loss": None, "curve": curve, "scores": {}, "stopped": step}
            curve.append((step, scores["loss"]))
    seconds = time.perf_counter() - start
    return {"diverged": False, "loss": curve[-1][1], "curve": curve, "scores": scores, "seconds": seconds}


def train_step(task: Task, model: torch.nn.Module, optimizers: Iterable[Optimizer], batch: Any) -> Tensor:
    """Forward, backward and step; the training loss. It does not wait for the device."""
    model.train()
    for optimizer in optimizers:
        set_mode(optimizer, "train")
    loss = task.loss(model, batch)
    model.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


def relative_rate(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then linear decay that would reach zero one step after the last; steps count from 1."""
    return min(step / warmup, (steps + 1 - step) / (steps + 1 - warmup), 1.0)


def scale_rates(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set every group's lr to `factor` times the one it was built with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def _evaluate(task: Task, model: torch.nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, float]:
    model.eval()
    for optimizer in optimizers:
        set_mode(optimizer, "eval")
    return task.evaluate(model)


def set_mode(optimizer: Optimizer, mode: str) -> None:
    """Schedule-free optimizers keep two sets of weights and must be told which one to show."""
    if hasattr(optimizer, mode):
        getattr(optimizer, mode)()
