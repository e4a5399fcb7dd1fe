"""A training run as a function of the optimizer's rates and of its memory's initial weights, differentiable in both.

`torch.optim` steps in place, so the loop is written again here on stacks of runs (tasks/stacked.py). The memory's step,
its keys and the output map are the package's own functions, in float64; a test holds that three steps of this loop
leave the weights where `deep_optim.DMGD` and `deep_optim.Momentum` leave them. Hidden matrices have a memory, the rest
is stepped by AdamW; both follow the schedule of the other benchmarks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from deep_optim.ops.deep_momentum import deep_momentum
from deep_optim.ops.feature_map import feature_map
from deep_optim.ops.mlp_memory import MLPMemory
from deep_optim.ops.newton_schulz import newton_schulz

from .tasks.stacked import StackedTask, Weights
from .training import relative_rate

AUX_LR, AUX_BETAS, AUX_EPS = 1e-2, (0.9, 0.99), 1e-8
INNER_STEPS = 3
DMGD_NS_STEPS, MUON_NS_STEPS = 4, 5
UPDATE_RMS = 0.2  # of every update in units of lr, as in the package's output map


class Rates(NamedTuple):
    """Hyper-parameters of a rule, as numbers or as scalars to differentiate; Muon has the first two."""

    lr: float | Tensor
    momentum: float | Tensor
    inner_lr: float | Tensor = 0.0
    lookahead: float | Tensor = 1.0
    hidden_lr: float | Tensor = 0.0


class Muon:
    """`Momentum(output="newton_schulz")` on a stack of tall matrices."""

    ns_steps = MUON_NS_STEPS

    def __init__(self, rates: Rates) -> None:
        self.rates = rates

    def start(self, matrices: Tensor) -> Tensor:
        return torch.zeros_like(matrices)

    def step(self, memory: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the memory after one gradient, and what is read from it."""
        memory = self.rates.momentum * memory + grad
        return memory, grad + self.rates.momentum * memory


class DMGD:
    """`DMGD` on a stack of tall matrices [S, r, p].

    All memories have the same initial W₂ [h, p]; or, given [k, h, p], each of a network's k matrices its own.
    """

    ns_steps = DMGD_NS_STEPS

    def __init__(self, rates: Rates, w2: Tensor) -> None:
        self.rates, self.w2 = rates, w2

    def start(self, matrices: Tensor) -> MLPMemory:
        stack, r, _ = matrices.shape
        w2 = self.w2 if self.w2.ndim == 3 else self.w2[None]
        w2 = w2.repeat_interleave(stack // len(w2), dim=0)  # the stack has all runs of a matrix side by side
        return MLPMemory(torch.zeros_like(matrices), matrices.new_zeros(stack, r, w2.shape[1]), w2)

    def step(self, memory: MLPMemory, grad: Tensor) -> tuple[MLPMemory, Tensor]:
        """Return the memory after one gradient, and what is read from it."""
        rates, written = self.rates, feature_map(grad, "soft_rows")
        memory, linear = deep_momentum(
            memory,
            written,
            decay=rates.momentum,  # type: ignore[arg-type]  # the op computes with scalars as with numbers
            inner_lr=rates.inner_lr,  # type: ignore[arg-type]
            inner_steps=INNER_STEPS,
            hidden_lr=rates.hidden_lr,  # type: ignore[arg-type]
            lookahead=None,  # read below: `add_` takes no scalar that needs a gradient
            backend="reference",
        )
        return memory, rates.lookahead * written + rates.momentum * linear


def unroll(
    task: StackedTask, rule: Muon | DMGD, seeds: list[int], steps: int, *, graph: bool
) -> Iterator[tuple[Tensor, Weights]]:
    """Train; yield after every step the loss [B] on the batch it took, before the step, and the weights after it.

    With `graph` all of it can be differentiated; without, nothing.
    """
    weights = task.weights(seeds)
    stacks = _by_shape(weights, task.hidden)
    memories = [rule.start(_tall(weights, names)) for names in stacks]
    rest = [name for name in weights if name not in task.hidden]
    averages = {name: (torch.zeros_like(weights[name]),) * 2 for name in rest}
    warmup = max(1, steps // 10)
    for step, batch in enumerate(task.batches(seeds, steps), start=1):
        factor = relative_rate(step, steps, warmup)
        weights = {name: w if w.requires_grad else w.requires_grad_() for name, w in weights.items()}
        losses = task.loss(weights, batch)
        grads = torch.autograd.grad(losses.sum(), list(weights.values()), create_graph=graph)
        by_name = dict(zip(weights, grads, strict=True))
        with torch.set_grad_enabled(graph):
            moved = {}
            for i, names in enumerate(stacks):
                memories[i], read = rule.step(memories[i], _tall(by_name, names))
                scale = UPDATE_RMS * read.shape[-2] ** 0.5
                update = newton_schulz(read, steps=rule.ns_steps, scale=scale)
                for name, block in zip(names, update.chunk(len(names)), strict=True):
                    wide = weights[name].shape[-2] < weights[name].shape[-1]
                    moved[name] = weights[name] - rule.rates.lr * factor * (block.mT if wide else block)
            for name in rest:
                averages[name], direction = _adam(averages[name], by_name[name], step)
                moved[name] = weights[name] - AUX_LR * factor * direction
        weights = {name: moved[name] for name in weights}
        yield losses, weights


def _by_shape(weights: Weights, hidden: tuple[str, ...]) -> list[list[str]]:
    """The hidden matrices that are stepped together: those of one shape, up to a transposition."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in hidden:
        groups.setdefault(tuple(sorted(weights[name].shape[-2:])), []).append(name)
    return list(groups.values())


def _tall(tensors: Weights, names: list[str]) -> Tensor:
    """One stack of tall matrices: a wide one is its transpose, to a memory as to Newton-Schulz."""
    return torch.cat([w.mT if w.shape[-2] < w.shape[-1] else w for w in (tensors[name] for name in names)])


def _adam(averages: tuple[Tensor, Tensor], grad: Tensor, step: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    (first, second), (beta1, beta2) = averages, AUX_BETAS
    first = beta1 * first + (1 - beta1) * grad
    second = beta2 * second + (1 - beta2) * grad * grad
    root = (second / (1 - beta2**step)).sqrt()
    return (first, second), first / (1 - beta1**step) / (root + AUX_EPS)
