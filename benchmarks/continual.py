"""One model, one task after another: who trains it, and what is left of each task in the end.

Every arm is an optimizer, or AdamW with one of the two classical remedies beside it, as references: a quadratic
penalty on what mattered to earlier tasks (EWC, arXiv:1612.00796), or a store of their batches that is replayed. The
learning rate is constant, and the same for all parts of the model: on a frontier over learning rates nothing may keep
a rate of its own. There is no weight decay, which forgets by itself.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import deep_optim

from .optimizers import OPTIMIZERS, Setting, attach
from .tasks.sequences import Sequence, make_sequence
from .training import set_mode, train_step
from .trials import Run

PERIOD = 8  # of the hidden matrices in slow arms, and how much smaller their rate is in the arms without one
FISHER_SAMPLES = 128
STORED_BATCHES = 4  # per task
Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Arm:
    """How a sequence is learnt.

    Args:
        title: its name in tables and plots.
        build: from the model's parameter groups and a learning rate to torch optimizers.
        lowest_lr: the unit of its learning rates, by task; see optimizers.py.
        penalty: EWC's λ.
        replay: whether every step also sees a stored batch of an earlier task.
        against: the arm, beside AdamW, whose frontier it must beat to be more than a slower rate.
    """

    title: str
    build: Callable[[Groups, float], list[Optimizer]]
    lowest_lr: Mapping[str, float]
    penalty: float = 0.0
    replay: bool = False
    against: str | None = None


def _tabled(groups: Groups, lr: float, *, name: str) -> list[Optimizer]:
    """As in optimizers.py, with the middle value of its second hyper-parameter."""
    entry = OPTIMIZERS[name]
    return entry.build(groups, Setting(lr, entry.seconds[1]), lr, 1)


def _paced(groups: Groups, lr: float, *, name: str, period: int = 1, slower: int = 1) -> list[Optimizer]:
    """An optimizer of the table whose hidden matrices step every `period` steps, or at a `slower` times lower rate."""
    (optimizer,) = _tabled(groups, lr, name=name)
    hidden = {param for group in groups if group["rule"] == "memory" for _, param in group["params"]}
    for group in optimizer.param_groups:
        if hidden & set(group["params"]):
            group["lr"], group["period"] = lr / slower, period
    return [deep_optim.MultiFrequency(optimizer)] if period > 1 else [optimizer]


def _from_table(name: str) -> Arm:
    entry = OPTIMIZERS[name]
    return Arm(entry.title, partial(_tabled, name=name), entry.lowest_lr)


_ADAMW, _MOMENTUM = OPTIMIZERS["adamw"].lowest_lr, OPTIMIZERS["momentum"].lowest_lr

ARMS = {name: _from_table(name) for name in OPTIMIZERS} | {
    "multi_frequency": Arm(
        f"MultiFrequency({PERIOD}) of AdamW (ours)", partial(_paced, name="adamw", period=PERIOD), _ADAMW,
        against="low_rate",
    ),
    "low_rate": Arm(f"AdamW, hidden lr / {PERIOD}", partial(_paced, name="adamw", slower=PERIOD), _ADAMW),
    "multi_frequency_momentum": Arm(
        f"MultiFrequency({PERIOD}) of Momentum (ours)", partial(_paced, name="momentum", period=PERIOD), _MOMENTUM,
        against="low_rate_momentum",
    ),
    "low_rate_momentum": Arm(
        f"Momentum, hidden lr / {PERIOD} (ours)", partial(_paced, name="momentum", slower=PERIOD), _MOMENTUM
    ),
    "ewc": Arm("AdamW + EWC", partial(_tabled, name="adamw"), _ADAMW, penalty=100.0),
    "replay": Arm("AdamW + replay", partial(_tabled, name="adamw"), _ADAMW, replay=True),
}  # fmt: skip


def available() -> list[str]:
    """The arms whose package is installed."""
    return [name for name in ARMS if name not in OPTIMIZERS or OPTIMIZERS[name].installed]


@dataclass(frozen=True)
class Course(Run):
    """One arm through one sequence, at one learning rate."""

    sequence: str
    options: tuple[tuple[str, Any], ...]
    optimizer: str
    lr: float
    seed: int
    tasks: int
    steps_per_task: int
    reset: bool  # whether every task starts with a fresh optimizer

    @property
    def steps(self) -> int:
        return self.tasks * self.steps_per_task

    def run(self) -> dict[str, Any]:
        """Train through the sequence; scores[i][j] is that of task j after task i."""
        return run_course(self)


# One sequence per process, as in training.py.
cached_sequence = cache(lambda name, options: make_sequence(name, **dict(options)))


@dataclass
class Lesson:
    """What `train_step` asks of a task: the loss at hand, with what the arm adds to remember the tasks before."""

    sequence: Sequence
    arm: Arm
    task: int = 0
    anchors: list[tuple[list[Tensor], list[Tensor]]] = field(default_factory=list)  # weights, their importance
    stored: list[tuple[int, Any]] = field(default_factory=list)  # task and batch
    rng: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = self.sequence.loss(model, batch, self.task)
        for weights, importance in self.anchors:
            for param, weight, factor in zip(model.parameters(), weights, importance, strict=True):
                loss = loss + 0.5 * self.arm.penalty * (factor * (param - weight).square()).sum()
        if self.stored:
            task, old = self.stored[int(torch.randint(len(self.stored), (), generator=self.rng))]
            loss = loss + self.sequence.loss(model, old, task)
        return loss

    def learnt(self, model: nn.Module, seed: int) -> None:
        """Take along what the arm remembers of the task that ends."""
        if self.arm.penalty:
            weights = [param.detach().clone() for param in model.parameters()]
            self.anchors.append((weights, importance(self.sequence, model, self.task, seed)))
        if self.arm.replay:
            batches = self.sequence.batches(seed, self.task, STORED_BATCHES)
            self.stored += [(self.task, batch) for batch in batches]
        self.task += 1


def importance(sequence: Sequence, model: nn.Module, task: int, seed: int) -> list[Tensor]:
    """The diagonal of the empirical Fisher information: mean squares of the gradients of single examples."""
    squares = [torch.zeros_like(param) for param in model.parameters()]
    for batch in sequence.batches(seed, task, FISHER_SAMPLES, batch=1):
        grads = torch.autograd.grad(sequence.loss(model, batch, task), list(model.parameters()))
        for square, grad in zip(squares, grads, strict=True):
            square += grad.square() / FISHER_SAMPLES
    return squares


def run_course(course: Course) -> dict[str, Any]:
    """Train once. A run that leaves the finite numbers ends there: {"diverged": True, "loss": None}."""
    sequence, arm = cached_sequence(course.sequence, course.options), ARMS[course.optimizer]
    model = sequence.model(course.seed)
    lesson = Lesson(sequence, arm)
    optimizers: list[Optimizer] = []
    losses: list[list[float]] = []
    scores: list[list[float]] = []
    start = time.process_time()
    for task in range(course.tasks):
        if course.reset or not optimizers:
            groups = deep_optim.param_groups(model, weight_decay=0.0, memory=sequence.memory)
            for optimizer in optimizers:
                if hasattr(optimizer, "inputs"):  # whose hooks would stay
                    optimizer.inputs.remove()
            optimizers = arm.build(groups, course.lr)
            attach(optimizers, model, groups)
        for batch in sequence.batches(course.seed, task, course.steps_per_task):
            if not math.isfinite(train_step(lesson, model, optimizers, batch)):
                return {"diverged": True, "loss": None, "stopped": task}
        model.eval()
        for optimizer in optimizers:
            set_mode(optimizer, "eval")
        found = [sequence.evaluate(model, each) for each in range(course.tasks)]
        losses.append([each["loss"] for each in found])
        scores.append([each["score"] for each in found])
        if not all(map(math.isfinite, losses[-1])):
            return {"diverged": True, "loss": None, "stopped": task}
        lesson.learnt(model, course.seed)
    final = sum(losses[-1]) / course.tasks
    seconds = time.process_time() - start
    return {"diverged": False, "loss": final, "losses": losses, "scores": scores, "cpu_seconds": seconds}
