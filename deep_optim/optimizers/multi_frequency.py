"""Update frequencies: each group of parameters steps at its own period, on the gradients of a whole chunk.

    A ← A + ∇L(W)                                 every step
    W ← step of the optimizer on A / n, A ← 0     every C-th step; n: the gradients in A

A continuum memory system is a chain of blocks that learn at different frequencies. To an optimizer it is groups of
parameters with different periods C: within a chunk a slow group stands still, all its gradients are taken where it
stands, and they are answered together. For one group this is gradient accumulation, during which the other groups go
on stepping. That is what sets it apart from a slow momentum, which changes what is stepped along and not how often.
Nested Learning, arXiv:2512.24695, Eq. 71. Printed, its sum runs from i − C to i and has the gradient between two chunks
in both; here chunks are half-open. The paper steps along the sum; the mean divides by n, so that `lr` means the same at
every period: for gradient descent a step of the sum is one of the mean at n times the rate.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from .base import capturing
from .checkpoint import ExactStateMixin
from .gradient_chunk import (
    Reduction,
    add_gradients,
    empty_chunks,
    having_chunks,
    make_chunks,
    reduced,
    restored,
    taken_out,
    without_chunks,
)
from .sharding import whole
from .validation import check_choice, check_count

Group = dict[str, Any]
Lent = list[tuple[Tensor, Tensor | None, dict[str, Tensor]]]  # a parameter, the user's gradient, its chunk

# Which groups are due is Python's affair, which no graph should hold. torch.compile leaves the steps of chunks as they
# are and compiles what they call, the wrapped optimizer's step. These are torch's own names for torch.compiler.disable,
# which would import the compiler together with the package.
_runs_as_written: Callable[[Any], Any] = torch._disable_dynamo
_only_itself_as_written: Callable[[Any], Any] = torch._disable_dynamo(recursive=False)


def _shared(name: str) -> Any:
    """Return an attribute that is the wrapped optimizer's, also after it has been replaced there."""
    return property(lambda self: getattr(self.optimizer, name), lambda self, new: setattr(self.optimizer, name, new))


class MultiFrequency(Optimizer):
    """Any optimizer, with an update period for each of its groups.

    It is an optimizer itself: build schedulers on it, and hand it to trainers, loss scalers and checkpoints in place of
    the one it wraps. `param_groups`, `state` and `defaults` are the wrapped optimizer's own. A step without a gradient
    counts as a step of the chunk but not in the mean; a parameter without any gradient in a chunk is not stepped.

    Groups of period 1 are stepped as ever. A parameter of a slow group keeps 4 bytes per entry (8 in float64) for the
    chunk, and as many while it is stepped, and costs one addition per entry and step; in exchange its optimizer runs in
    one step out of C. An error inside the wrapped optimizer leaves every chunk as it was before the step.

    Args:
        optimizer: any torch optimizer that needs no closure. What splits an optimizer up (a sharding wrapper, an
            optimizer per parameter) goes around this one, not inside it.
        periods: steps from one update to the next, at least 1: a number per group, or a dict from a group's "name" to
            its number, where groups that are not named keep theirs. By default each group's "period", or 1. The group's
            may be changed during training: a chunk ends as soon as it is that long.
        reduction: "mean" hands the optimizer the mean of the chunk's gradients, "sum" their sum, as in the paper, whose
            steps are C times as long for an optimizer that follows the gradient's scale. Also a key of groups.

    Raises:
        TypeError: if `optimizer` is none, or has periods already.
        ValueError: for a period that is no whole number of at least 1, for as many numbers as there are not groups, for
            a name that no group has, for an optimizer that must call its closure itself (LBFGS), and in
            `load_state_dict` for a checkpoint with other periods.
        RuntimeError: for sparse gradients, `differentiable`, or a CUDA graph, in slow groups alone.

    Example:
        >>> optimizer = torch.optim.AdamW([{"params": fast}, {"params": slow}], lr=1e-3)  # doctest: +SKIP
        >>> optimizer = MultiFrequency(optimizer, periods=[1, 16])  # doctest: +SKIP
    """

    optimizer: Optimizer
    reduction: Reduction
    defaults: dict[str, Any] = _shared("defaults")
    state: Any = _shared("state")
    param_groups: list[Group] = _shared("param_groups")

    def __init__(
        self,
        optimizer: Optimizer,
        periods: Sequence[int] | Mapping[str, int] | None = None,
        *,
        reduction: Reduction = "mean",
    ) -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, MultiFrequency):
            raise TypeError(f"MultiFrequency wraps a torch optimizer without periods, got {type(optimizer).__name__}")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(f"{type(optimizer).__name__} calls its closure itself and takes no mean of gradients")
        check_choice({"reduction": reduction}, "reduction", get_args(Reduction))
        options = [
            {"period": period, "reduction": group.get("reduction", reduction)}
            for group, period in zip(optimizer.param_groups, _periods(optimizer.param_groups, periods), strict=True)
        ]
        for group, option in zip(optimizer.param_groups, options, strict=True):
            _check_group({**group, **option})
        self.__setstate__({"optimizer": optimizer, "reduction": reduction})  # makes the hooks, as after unpickling
        for group, option in zip(optimizer.param_groups, options, strict=True):
            group.update(option)
            _begin(group)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "reduction": self.reduction}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"

    def add_param_group(self, param_group: Group) -> None:
        """Add a group to the wrapped optimizer, with period 1 unless it has a "period". Its first chunk begins now."""
        if isinstance(param_group, dict):  # else the wrapped optimizer refuses it
            param_group.setdefault("period", 1)
            param_group.setdefault("reduction", self.reduction)
            _check_group(param_group)
            _begin(param_group)
        self.optimizer.add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take this step's gradients into the chunks, step the groups whose chunk is full, and return the loss."""
        slow = []
        for group in self.param_groups:
            if group.get("period") != 1 or "chunk_step" in group:
                slow.append(group)
        if slow:
            return self._step_in_chunks(slow, closure)
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    @_only_itself_as_written
    @torch.no_grad()
    def _step_in_chunks(self, slow: list[Group], closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due, waiting = self._sort(slow)
        groups, everything = self.param_groups, list(self.param_groups)
        lent: Lent = []
        try:
            self._lend(lent, groups, due, waiting)
            if groups:
                self.optimizer.step()
        finally:
            groups[:] = everything
            for param, grad, chunk in lent:
                param.grad = grad
                self.state[param].update(chunk)
        self._write(due, waiting)
        return loss

    @_runs_as_written
    def _sort(self, slow: list[Group]) -> tuple[list[Group], list[Group]]:
        """Return the groups that step now and those that wait, once everything that can be refused has been."""
        for group in slow:
            _check_group(group)
            _begin(group)
            self._check_gradients(group)
        due = [g for g in slow if g["chunk_step"] + 1 >= g["period"] or self._only_makes_state(g)]
        for group in slow:
            make_chunks(group["params"], self.state)
        return due, [group for group in slow if not any(group is each for each in due)]

    def _check_gradients(self, group: Group) -> None:
        name = type(self).__name__
        for param in group["params"]:
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(f"{name} does not support sparse gradients in a group with period={group['period']}")
        if any(map(capturing, group["params"])):
            raise RuntimeError(f"{name} decides on the host which groups to step, which a CUDA graph cannot hold")

    def _only_makes_state(self, group: Group) -> bool:
        """Whether this step is how checkpoint libraries make an optimizer create its state, and no part of a chunk."""
        if any(param in self.state for param in group["params"]) or group.get("lr") != 0:  # a rate may be on the device
            return False
        return not any(param.grad is not None and whole(param.grad).any() for param in group["params"])

    @_runs_as_written
    def _lend(self, lent: Lent, groups: list[Group], due: list[Group], waiting: list[Group]) -> None:
        """Make it look as if there were no other groups than those that are due, and no other gradients than theirs.

        Groups that wait leave the list, where hiding their gradients would not do: some optimizers count steps in the
        group, or decay what has no gradient. Chunks leave the state, since an optimizer may take any entry for its own.
        """
        groups[:] = [group for group in groups if not any(group is each for each in waiting)]
        for group in due:
            for param, grad in reduced(group["params"], self.state, group["reduction"]):
                lent.append((param, param.grad, taken_out(param, self.state)))
                param.grad = grad

    @_runs_as_written
    def _write(self, due: list[Group], waiting: list[Group]) -> None:
        """Empty the chunks that were stepped on, and add the gradients at hand to the others."""
        for group in due:
            empty_chunks(group["params"], self.state)
            group["chunk_step"] = 0
            if group["period"] == 1:  # from now on
                for param in having_chunks(group["params"], self.state):
                    taken_out(param, self.state)
                del group["chunk_step"]
        for group in waiting:
            add_gradients(group["params"], self.state)
            group["chunk_step"] += 1

    def state_dict(self) -> StateDict:
        """Return the wrapped optimizer's state dict, with the chunks under way. Hooks of both run."""
        handle = self.register_state_dict_post_hook(lambda *_: self.optimizer.state_dict(), prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict()` returned, chunks included, bit for bit. Hooks of both run.

        Raises:
            ValueError: if a group has another period, a chunk does not fit, or the wrapped optimizer refuses the rest;
                nothing is loaded then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            if (returned := pre_hook(self, state_dict)) is not None:
                state_dict = returned
        if isinstance(self.optimizer, ExactStateMixin):
            state_dict = self.optimizer.by_name(state_dict)
        chunks = self._loaded_chunks(state_dict)
        self.optimizer.load_state_dict({**state_dict, "state": without_chunks(state_dict["state"])})
        for param, chunk in chunks:
            self.state[param].update(chunk)
        for group in self.param_groups:
            group.setdefault("period", 1)
            group.setdefault("reduction", self.reduction)
            _begin(group)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _loaded_chunks(self, state_dict: StateDict) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Return copies of the chunks in a state dict, which is refused if its periods are others."""
        chunks = []
        for index, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            if saved.get("period", 1) != group.get("period", 1):
                raise ValueError(
                    f"loaded state dict has period {saved.get('period')} in group {index}, not {group.get('period')}; "
                    "a checkpoint made without MultiFrequency is loaded into the optimizer before it is wrapped"
                )
            for param, key in zip(group["params"], saved["params"], strict=False):
                if "chunk_step" in saved and state_dict["state"].get(key):
                    chunks.append((param, restored(param, state_dict["state"][key])))
        return chunks


def _periods(groups: Iterable[Group], periods: Any) -> list[Any]:
    """Return the period of every group, unchecked."""
    given = [group.get("period", 1) for group in groups]
    if periods is None:
        return given
    if isinstance(periods, Mapping):
        names = [group.get("name") for group in groups]
        if unknown := periods.keys() - set(names):
            raise ValueError(f"periods: no parameter group has the name {', '.join(map(repr, unknown))}")
        return [periods.get(name, period) for name, period in zip(names, given, strict=True)]
    if not isinstance(periods, Sequence) or isinstance(periods, str):
        raise ValueError(f"Invalid periods: {periods!r}, expected a number for each parameter group")
    if len(periods) != len(given):
        raise ValueError(f"{len(periods)} periods for {len(given)} parameter groups")
    return list(periods)


def _check_group(group: Group) -> None:
    """Refuse what is no period, and what only a detour around this class can explain."""
    if "period" not in group or "reduction" not in group:
        raise ValueError("a parameter group has no period; add groups to MultiFrequency, not to what it wraps")
    check_count(group, "period")
    check_choice(group, "reduction", get_args(Reduction))
    if group["period"] > 1 and group.get("differentiable"):
        raise RuntimeError("MultiFrequency does not support `differentiable`: sums of gradients are written in place")


def _begin(group: Group) -> None:
    """Mark a slow group as one with chunks: `chunk_step` counts the steps of the one under way."""
    if group["period"] > 1:
        group.setdefault("chunk_step", 0)
