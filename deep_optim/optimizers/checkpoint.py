"""Checkpoints that come back as they were saved.

`torch.optim.Optimizer.load_state_dict` casts every state tensor to its parameter's dtype, which destroys the float32
memory of a bfloat16 parameter, and hands out the given tensors themselves, so that two optimizers loaded from one
dict share their state. Here state keeps its dtype, is copied, and is checked before anything is replaced. Where the
parameters have names on both sides, these decide whose state is whose, and not the order.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from .rounding import COMPENSATION


class ExactStateMixin(Optimizer):
    """Loads state bit for bit, or raises ValueError and leaves the optimizer as it was."""

    group_defaults: ClassVar[dict[str, Any]] = {}  # keys of groups that are no arguments of the constructor

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter that has seen no gradient."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # from before an option existed
            for name, default in {**self.group_defaults, **self.defaults}.items():
                group.setdefault(name, default)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict()` returned. Hooks see what they would see with any torch optimizer.

        Names decide if both sides have them and they are not all different, as a wrapper's prefix makes them.

        Raises:
            ValueError: if the groups do not match, if some names are the same and others are not, or if a state does
                not fit its parameter and this algorithm.
        """
        loaded: StateDict = {}

        def check(optimizer: Optimizer, state_dict: StateDict) -> StateDict:  # after the user's hooks
            loaded.update(self.by_name(state_dict))
            for param, group, saved in self._pairs(loaded):
                self._check_state(param, group, saved)
            return loaded

        def restore(optimizer: Optimizer) -> None:  # before the user's hooks
            for param, group, saved in self._pairs(loaded):
                for name, fresh in self.new_state(param.to("meta"), group).items():
                    self.state[param][name] = (
                        _restored(saved[name], fresh, param.device) if name in saved else torch.zeros_like(param)
                    )

        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def by_name(self, state_dict: StateDict) -> StateDict:
        """Return a state dict with its parameters in the order of this optimizer's, or raise ValueError."""
        saved = {
            name: index
            for group in state_dict["param_groups"]
            for name, index in zip(group.get("param_names", ()), group["params"], strict=False)
        }
        own = [name for group in self.param_groups for name in group.get("param_names", ())]
        if len(state_dict["param_groups"]) != len(self.param_groups) or not saved.keys() & set(own):
            return state_dict
        if saved.keys() != set(own):
            missing, extra = sorted(set(own) - saved.keys()), sorted(saved.keys() - set(own))
            raise ValueError(
                f"loaded state dict is of other parameters: missing are {', '.join(missing) or 'none'}; "
                f"not among this optimizer's are {', '.join(extra) or 'none'}"
            )
        groups = []
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            names = group["param_names"]
            ordered = all(isinstance(index, str) for index in saved_group["params"])  # by torch.distributed.checkpoint
            params = saved_group["params"] if ordered else [saved[name] for name in names]
            groups.append({**saved_group, "params": params, "param_names": list(names)})
        return {**state_dict, "param_groups": groups}

    def _pairs(self, state_dict: StateDict) -> Iterator[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
        """Each parameter with its saved group, completed by defaults, and its saved state, where there is one."""
        defaults = {**self.group_defaults, **self.defaults}
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for param, index in zip(group["params"], saved_group["params"], strict=False):
                if state_dict["state"].get(index):
                    yield param, {**defaults, **saved_group}, state_dict["state"][index]

    def _check_state(self, param: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> None:
        expected = self.new_state(param.to("meta"), group)
        if missing := expected.keys() - saved.keys() - {COMPENSATION}:  # which may start at any time
            raise ValueError(
                f"loaded state dict has no {', '.join(sorted(missing))} for a parameter of size {tuple(param.size())}; "
                f"it holds {', '.join(sorted(saved))} and may be another optimizer's than {type(self).__name__}'s"
            )
        for name, fresh in expected.items():
            value = saved.get(name)
            if isinstance(value, Tensor) and value.shape != fresh.shape:
                raise ValueError(
                    f"loaded state dict has {name} of size {tuple(value.size())} for a parameter of size "
                    f"{tuple(param.size())}, expected {tuple(fresh.size())}"
                )


def _restored(value: Any, expected: Tensor, device: torch.device) -> Tensor:
    """A copy of `value` where and in the dtype in which this algorithm would keep it."""
    device = torch.device("cpu") if expected.is_cpu else device
    if not isinstance(value, Tensor):  # `step` was a number before torch 1.12
        return torch.tensor(float(value), dtype=expected.dtype, device=device)
    return value.to(device, expected.dtype, copy=True)
