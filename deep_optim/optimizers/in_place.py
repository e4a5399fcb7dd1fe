"""Steps by kernels that write memories and weights where they lie, of what nothing is stacked or taken apart.

A class says that it has them, and for which options (`writes_in_place`); whether the tensors of a stack are such that
kernels can go by their addresses is asked once in a step, here, and not again by what then runs.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from deep_optim.ops.addresses import addressable
from deep_optim.ops.descend import descend_triton

_EQUATION = ("features", "update", "read", "output", "pull")  # what kernels do at once


class InPlaceMixin:
    """What a `MemoryOptimizer` with kernels defines: `in_place`, `writes_in_place` and `write_in_place`."""

    in_place: ClassVar[tuple[str, ...]] = ()  # names of state that `write_in_place` writes
    read_only: ClassVar[tuple[str, ...]]  # this and the next are a `MemoryOptimizer`'s
    direction: Callable[..., Tensor]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class with an equation of its own does not inherit the kernels of another's."""
        super().__init_subclass__(**kwargs)
        for method, parts in (("writes_in_place", _EQUATION), ("step_in_place", (*_EQUATION, "write_in_place"))):
            owner = next(each for each in cls.__mro__ if method in vars(each))  # whose kernels they are
            if any(getattr(cls, part, None) is not getattr(owner, part, None) for part in parts):
                setattr(cls, method, getattr(InPlaceMixin, method))

    def writes_in_place(self, group: dict[str, Any]) -> bool:
        """Return whether `write_in_place` has what these options ask for; it hands `pull` and output maps nothing."""
        return False

    def write_in_place(self, grads: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> Tensor:
        """Do what `features` and `update` do without stacks, by kernels, and return the direction [B, m, n].

        The memories are written by then: should the output map fail, for want of memory say, the step is not to be made
        again.
        """
        raise NotImplementedError

    def addressable(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]
    ) -> bool:
        """Return whether kernels write the memories of a stack in place and, if any are given, `params`."""
        if not self.writes_in_place(group):
            return False
        written = [state[name] for name in self.in_place for state in states if state[name].numel()]
        read = [state[name] for name in self.read_only for state in states if name in state]
        return addressable([*params, *written], [*grads, *read], group.get("backend", "auto"))

    def step_in_place(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]
    ) -> None:
        """Step a stack of parameters that is `addressable`."""
        read = self.write_in_place(grads, states, group)
        direction = self.direction(group, params, params, grads, states, read)
        descend_triton(params, direction.contiguous(), lr=group["lr"], weight_decay=group["weight_decay"])
