"""The one table of optimizers and of their search spaces, baselines first.

Every optimizer gets the same number of trials: four learning rates, a factor 2 apart, times three values of one more
hyper-parameter, or one where runs are dear (`SECOND_FROM`). Matrix optimizers (`muon` and ours) share the rest:
`deep_optim.param_groups` decides which parameters are hidden matrices, and embeddings, head, norms and biases get AdamW
at the task's fixed `aux_lr`. Every learning rate, the fixed one too, follows the same relative schedule; only
schedule-free AdamW brings its own. Weight decay is the task's, the same for all but SGD, which has none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import deep_optim

from . import m3_variants, variants
from .tasks import Task

VARIANTS = variants.VARIANTS | m3_variants.VARIANTS
AUX_BETAS = (0.9, 0.99)
LR_STEPS = (1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Setting:
    """One point of a search space; `second` is the value of the entry's second hyper-parameter."""

    lr: float
    second: float


@dataclass(frozen=True)
class Entry:
    """How one optimizer is built and searched.

    Args:
        title: its name in tables and plots.
        build: from the model's parameter groups, a `Setting`, the task's `aux_lr` and the warm-up to torch optimizers.
        lowest_lr: the smallest of the four learning rates, by task.
        second: name of the second hyper-parameter.
        seconds: its three values.
        scheduled: False where the optimizer replaces the learning-rate schedule by its own.
        package: what must be installed beyond torch.
        inputs: True where the optimizer looks at the layers' inputs.
    """

    title: str
    build: Callable[[list[dict[str, Any]], Setting, float, int], list[Optimizer]]
    lowest_lr: Mapping[str, float]
    second: str
    seconds: tuple[float, float, float]
    scheduled: bool = True
    package: str | None = None
    inputs: bool = False

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return self.package is None or find_spec(self.package) is not None

    def lrs(self, task: str) -> list[float]:
        """The learning rates searched on `task`."""
        return [self.lowest_lr[task] * factor for factor in LR_STEPS]

    def trials(self, task: str) -> list[Setting]:
        """Every point of the search space on `task`."""
        return [Setting(lr, second) for lr in self.lrs(task) for second in self.seconds]


def _adamw(groups: list[dict[str, Any]], at: Setting, aux_lr: float, warmup: int) -> list[Optimizer]:
    return [torch.optim.AdamW(_plain(groups), lr=at.lr, betas=(0.9, at.second), fused=True)]


def _sgd(groups: list[dict[str, Any]], at: Setting, aux_lr: float, warmup: int) -> list[Optimizer]:
    # SGD's decay is a gradient: scaled by rates a hundred times AdamW's it would be another regularisation.
    undecayed = [group | {"weight_decay": 0.0} for group in _plain(groups)]
    return [torch.optim.SGD(undecayed, lr=at.lr, momentum=at.second, nesterov=True, fused=True)]


def _muon(groups: list[dict[str, Any]], at: Setting, aux_lr: float, warmup: int) -> list[Optimizer]:
    hidden = _plain([group for group in groups if group["rule"] == "memory"])
    rest = _plain([group for group in groups if group["rule"] == "adamw"])
    muon = torch.optim.Muon(hidden, lr=at.lr, momentum=at.second, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=aux_lr, betas=AUX_BETAS, fused=True)] if rest else [muon]


def _schedule_free_adamw(groups: list[dict[str, Any]], at: Setting, aux_lr: float, warmup: int) -> list[Optimizer]:
    from schedulefree import AdamWScheduleFree

    return [AdamWScheduleFree(_plain(groups), lr=at.lr, betas=(at.second, 0.99), warmup_steps=warmup, foreach=False)]


def _soap(groups: list[dict[str, Any]], at: Setting, aux_lr: float, warmup: int) -> list[Optimizer]:
    from pytorch_optimizer import SOAP

    return [SOAP(_plain(groups), lr=at.lr, betas=(0.95, at.second), precondition_frequency=10)]


def _ademamix(groups: list[dict[str, Any]], at: Setting, aux_lr: float, warmup: int) -> list[Optimizer]:
    from pytorch_optimizer import AdEMAMix

    return [AdEMAMix(_plain(groups), lr=at.lr, betas=(0.9, 0.95, at.second), weight_decouple=True)]


def _ours(
    groups: list[dict[str, Any]], at: Setting, aux_lr: float, warmup: int, *, name: str, **options: Any
) -> list[Optimizer]:
    return [getattr(deep_optim, name)(_with_aux(groups, aux_lr), lr=at.lr, momentum=at.second, fused=True, **options)]


def _variant(groups: list[dict[str, Any]], at: Setting, aux_lr: float, warmup: int, *, name: str) -> list[Optimizer]:
    cls, options = VARIANTS[name]
    return [cls(_with_aux(groups, aux_lr), **{"lr": at.lr, "momentum": at.second, "fused": True} | options)]


def _with_aux(groups: list[dict[str, Any]], aux_lr: float) -> list[dict[str, Any]]:
    aux = dict(lr=aux_lr, adamw_betas=AUX_BETAS)
    return [group | aux if group["rule"] == "adamw" else dict(group) for group in groups]


def _plain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with the two keys that every optimizer understands."""
    return [
        {"params": [param for _, param in group["params"]], "weight_decay": group["weight_decay"]} for group in groups
    ]


_ADAPTIVE = {
    "text": 1.5e-3, "vision-vit": 2e-3, "vision-resnet": 4e-3, "regression": 0.32, "gpt": 2.5e-4, "mlp": 5e-4,
}  # fmt: skip
_MATRIX = {"text": 3e-3, "vision-vit": 4e-3, "vision-resnet": 8e-3, "regression": 8e-2, "gpt": 5e-3, "mlp": 1e-3}
_GRADIENT = {"text": 5e-2, "vision-vit": 4e-2, "vision-resnet": 8e-2, "regression": 8.0, "gpt": 5e-2, "mlp": 2e-2}

OPTIMIZERS = {
    "adamw": Entry("AdamW", _adamw, _ADAPTIVE, "beta2", (0.9, 0.95, 0.99)),
    "sgd": Entry("SGD (Nesterov)", _sgd, _GRADIENT, "momentum", (0.8, 0.9, 0.95)),
    "muon": Entry("Muon (torch)", _muon, _MATRIX, "momentum", (0.7, 0.8, 0.9)),
    "schedule_free_adamw": Entry(
        "Schedule-free AdamW", _schedule_free_adamw, _ADAPTIVE, "beta1", (0.8, 0.9, 0.95),
        scheduled=False, package="schedulefree",
    ),
    "soap": Entry("SOAP", _soap, _ADAPTIVE, "beta2", (0.9, 0.95, 0.99), package="pytorch_optimizer"),
    "ademamix": Entry("AdEMAMix", _ademamix, _ADAPTIVE, "beta3", (0.99, 0.999, 0.9999), package="pytorch_optimizer"),
    "momentum": Entry(
        "Momentum (ours)", partial(_ours, name="Momentum"), _MATRIX, "momentum", (0.7, 0.8, 0.9)
    ),
    "normuon": Entry(
        "NorMuon's rows, by M3 (ours)", partial(_ours, name="M3", alpha=0.0, second_moment="row"),
        _MATRIX, "momentum", (0.7, 0.8, 0.9),
    ),
    "preconditioned_momentum": Entry(
        "PreconditionedMomentum (ours)", partial(_ours, name="PreconditionedMomentum"),
        _MATRIX | {"regression": 0.32}, "momentum", (0.7, 0.8, 0.9),
    ),
    "delta_momentum": Entry(
        "DeltaMomentum (ours)", partial(_ours, name="DeltaMomentum"), _MATRIX, "momentum", (0.8, 0.9, 0.95)
    ),
    "delta_identity": Entry(
        "DeltaMomentum, identity output (ours)",
        partial(_ours, name="DeltaMomentum", output="identity", side="right"),
        _GRADIENT, "momentum", (0.8, 0.9, 0.95),
    ),
    "dmgd": Entry(
        "DMGD, 16 hidden (ours)", partial(_ours, name="DMGD", hidden_dim=16), _MATRIX, "momentum", (0.9, 0.95, 0.98)
    ),
    "dmgd_linear": Entry(
        "DMGD, its defaults (ours)", partial(_ours, name="DMGD"), _MATRIX, "momentum", (0.9, 0.95, 0.98)
    ),
    # With chunks that are short beside these runs: one of the default size would be a sixth of a run.
    "m3": Entry("M3 (ours)", partial(_ours, name="M3", **m3_variants.SHORT), _MATRIX, "momentum", (0.7, 0.8, 0.9)),
    "input_delta": Entry(
        "InputDeltaMomentum (ours)", partial(_ours, name="InputDeltaMomentum", missing="gradient"),
        _MATRIX, "momentum", (0.8, 0.9, 0.95),
        inputs=True,
    ),
    "dgd": Entry(
        "DGD (ours)", partial(_ours, name="DGD", missing="gradient"), _MATRIX, "momentum", (0.7, 0.8, 0.9), inputs=True
    ),
}  # fmt: skip

# The best points by task, for runs that do not search; docs/benchmarks.md has the searches.
TUNED = {
    "text": {
        "adamw": Setting(lr=3e-3, second=0.9),
        "muon": Setting(lr=1.2e-2, second=0.8),
        "momentum": Setting(lr=1.2e-2, second=0.7),
        "preconditioned_momentum": Setting(lr=1.2e-2, second=0.7),
        "delta_momentum": Setting(lr=1.2e-2, second=0.9),
        "dmgd": Setting(lr=1.2e-2, second=0.95),
        "dmgd_linear": Setting(lr=1.2e-2, second=0.95),
        "m3": Setting(lr=1.2e-2, second=0.8),
        "input_delta": Setting(lr=1.2e-2, second=0.8),
        "dgd": Setting(lr=1.2e-2, second=0.8),
    },
}

# Where twelve trials are too dear: four learning rates, at the second value that was best on another task.
SECOND_FROM = {"gpt": "text"}


def search_space(name: str, task: str) -> list[Setting]:
    """The points that are tried on `task`: the same number for every optimizer."""
    entry = OPTIMIZERS[name]
    if task not in SECOND_FROM:
        return entry.trials(task)
    best = TUNED[SECOND_FROM[task]].get(name)
    return [Setting(lr, best.second if best else entry.seconds[1]) for lr in entry.lrs(task)]


def find(name: str) -> Entry:
    """The entry of an optimizer, or of a variant for an ablation, which takes its setting from who asks."""
    if name in VARIANTS:
        return Entry(name.partition(":")[2], partial(_variant, name=name), {}, "momentum", (0.9, 0.95, 0.98))
    return OPTIMIZERS[name]


def available() -> list[str]:
    """The optimizers whose package is installed."""
    return [name for name, entry in OPTIMIZERS.items() if entry.installed]


def build(name: str, task: Task, model: nn.Module, setting: Setting, *, warmup: int) -> list[Optimizer]:
    """The torch optimizers that together train `model` as the table's entry `name` says."""
    # Fused projections stay whole: torch.optim.Muon cannot split them, so ours do not either.
    groups = deep_optim.param_groups(model, weight_decay=task.weight_decay, memory=task.memory)
    optimizers = find(name).build(groups, setting, task.aux_lr, warmup)
    attach(optimizers, model, groups)
    return optimizers


def attach(optimizers: list[Optimizer], model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Let those that need more than gradients see the model's layers."""
    for optimizer in optimizers:
        if hasattr(optimizer, "inputs"):
            optimizer.inputs = deep_optim.capture_inputs(model, groups)
        elif hasattr(optimizer, "watch"):  # a variant that looks in its own way
            optimizer.watch(model)
