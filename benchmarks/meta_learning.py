"""Meta-training of DMGD's rates and of its memory's initial W₂: the slow level under which `unroll` is the fast one.

The meta-loss is the mean logarithm of the loss on fresh batches over the second half of a run, averaged over runs and
tasks; its gradient goes through every step of the runs, and Adam descends it.
"""

import json
import math
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import deep_optim
from deep_optim.ops.two_sided_delta import most_erased

from .tasks.stacked import WIDTH, Bytes, Images, StackedTask, Teacher
from .training import relative_rate
from .unroll import DMGD, INNER_STEPS, Muon, Rates, unroll

HIDDEN_DIM = 16
NETWORK = 7  # the seed of the network that "one network" is about
TRAINING_SEEDS = 1_000_000  # and above; tests use seeds below
RATE_STEP, W2_STEP = 0.2, 0.03  # Adam's: of the rates' logarithms, and of W₂'s entries, which start at 0.18 RMS
HAND_SET = Rates(lr=0.12, momentum=0.95, inner_lr=0.5, lookahead=2.0)  # the package's, but for lr, which has none

TRAINED = {"teacher tanh": (Teacher, "tanh"), "digits": (Images, "digits"), "stdlib": (Bytes, "stdlib")}


@dataclass(frozen=True)
class Arm:
    """One meta-training: which numbers it learns, and the arm whose rates it starts from.

    Args:
        learns: fields of `Rates`, and "w2" for the hidden weights; without it there are none.
        start: the arm, of the same meta-seed, whose rates are given; None: the hand-set ones.
        given: hand-set rates that are others in this arm.
        one_network: every run starts from one network, and each of its matrices has a W₂ of its own.
        muon: the rule is Muon's.
    """

    learns: tuple[str, ...]
    start: str | None = None
    given: tuple[tuple[str, float], ...] = ()
    one_network: bool = False
    muon: bool = False


@dataclass(frozen=True)
class Budget:
    """Iterations of Adam, each over `stack` runs of every task, `steps` long."""

    steps: int
    iterations: int
    stack: int


ARMS = {
    "muon": Arm(("lr", "momentum"), given=(("momentum", 0.8),), muon=True),
    "hand": Arm(("lr",)),
    "rates": Arm(("lr", "momentum", "inner_lr", "lookahead")),
    "no inner step": Arm(("lr", "momentum", "lookahead"), given=(("inner_lr", 0.0),)),
    "w2": Arm(("w2",), start="hand"),
    "w2 and rates": Arm(("lr", "momentum", "inner_lr", "lookahead", "w2")),
    "moving w2": Arm(("w2", "hidden_lr"), start="hand", given=(("hidden_lr", 0.01),)),
    "one network": Arm(("w2",), start="hand", one_network=True),
}


def drawn_w2() -> Tensor:  # [h, p]
    """W₂ as the package draws it, for every parameter alike."""
    param = torch.nn.Parameter(torch.empty(2 * WIDTH, WIDTH, dtype=torch.float64))
    optimizer = deep_optim.DMGD([param], hidden_dim=HIDDEN_DIM)
    return optimizer.new_state(param, optimizer.param_groups[0])["memory.w2"][0]


@cache
def make(kind: type, source: str, blocks: int | None = None, *, one_network: bool = False) -> StackedTask:
    options = {"network": NETWORK if one_network else None} | ({"blocks": blocks} if blocks else {})
    return kind(source, **options)


def highest_inner_lr(momentum: Any) -> Any:
    """What `deep_optim.DMGD` takes for stable on two sides, less a little."""
    return 0.95 * (1 + momentum) / most_erased(INNER_STEPS) / 2


def to_free(rates: Rates) -> dict[str, Tensor]:
    """The numbers that Adam moves, each free to take any value."""
    share = rates.inner_lr / highest_inner_lr(rates.momentum)
    free = {
        "lr": math.log(rates.lr),
        "momentum": math.log(rates.momentum / (1 - rates.momentum)),
        "inner_lr": math.log(share / (1 - share)) if share else -math.inf,
        "lookahead": math.log(rates.lookahead),
        "hidden_lr": math.log(rates.hidden_lr) if rates.hidden_lr else -math.inf,
    }
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in free.items()}


def from_free(free: dict[str, Tensor]) -> Rates:
    """The rates again; the memory is stable under all of them."""
    momentum = free["momentum"].sigmoid()
    inner_lr = highest_inner_lr(momentum) * free["inner_lr"].sigmoid()
    return Rates(free["lr"].exp(), momentum, inner_lr, free["lookahead"].exp(), free["hidden_lr"].exp())


def learn(arm: Arm, given: Rates, meta_seed: int, budget: Budget) -> dict[str, Any]:
    """Meta-train one arm; return its rates, its W₂ by family of networks, and the meta-loss of every iteration."""
    tasks = [make(*which, one_network=arm.one_network) for which in TRAINED.values()]
    free = to_free(given._replace(**dict(arm.given)))
    w2 = initial_w2(arm, tasks)
    groups = [
        {"params": [free[name].requires_grad_() for name in arm.learns if name != "w2"], "lr": RATE_STEP},
        {"params": [weights.requires_grad_() for weights in w2.values()], "lr": W2_STEP},
    ]
    adam = torch.optim.Adam([group for group in groups if group["params"]])
    history = []
    iterations = range(1, budget.iterations + 1)
    for iteration in track(iterations, f"meta-seed {meta_seed}", disable=not sys.stdout.isatty()):
        for group in adam.param_groups:
            base = group.setdefault("initial_lr", group["lr"])
            group["lr"] = base * relative_rate(iteration, budget.iterations, 1)
        adam.zero_grad()
        history.append(0.0)
        for t in tasks:
            first = TRAINING_SEEDS * meta_seed + budget.stack * iteration
            rule = make_rule(arm, from_free(free), w2.get(t.family if arm.one_network else "any"))
            runs = unroll(t, rule, list(range(first, first + budget.stack)), budget.steps, graph=True)
            losses = torch.stack([loss for loss, _ in runs])  # [steps, stack]
            meta_loss = losses[budget.steps // 2 :].log().mean() / len(tasks)
            meta_loss.backward()
            history[-1] += meta_loss.item()
        if not math.isfinite(history[-1]):
            raise RuntimeError(f"the meta-loss is not finite at iteration {iteration}; lower the step sizes")
        adam.step()
    rates = Rates(*[rate.item() for rate in from_free(free)][: 2 if arm.muon else None])
    kept = {family: _rounded(weights) for family, weights in w2.items()}
    return {"rates": rates._asdict(), "w2": kept, "meta_losses": history}


def initial_w2(arm: Arm, tasks: list[StackedTask]) -> dict[str, Tensor]:
    """What W₂ is learned from, by family of networks: as it is drawn. Nothing for an arm without hidden features."""
    if "w2" not in arm.learns:
        return {}
    if arm.one_network:
        return {task.family: drawn_w2().repeat(len(task.hidden), 1, 1) for task in tasks}
    return {"any": drawn_w2()}


def make_rule(arm: Arm, rates: Rates, w2: Tensor | None) -> Muon | DMGD:
    """Muon, or DMGD with these hidden weights; None for no hidden layer."""
    return Muon(rates) if arm.muon else DMGD(rates, drawn_w2()[:0] if w2 is None else w2)


def _rounded(w2: Tensor) -> Any:
    """To three digits: a file of numbers that can be read."""
    return json.loads(json.dumps(w2.tolist()), parse_float=lambda digits: float(f"{float(digits):.3g}"))
