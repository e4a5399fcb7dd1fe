"""An optimizer by its name, for a whole model: what trainers and configuration files ask for.

    create_optimizer(name, model, **options)  =  Class(param_groups(model, ...), inputs=capture_inputs(model, ...), ...)

The options are those of the three calls on the right, read from their signatures; whatever none of them takes is
refused.
"""

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from .capture import capture_inputs
from .optimizers.base import MemoryOptimizer
from .optimizers.delta_momentum import DeltaMomentum
from .optimizers.dgd import DGD
from .optimizers.dmgd import DMGD
from .optimizers.input_delta_momentum import InputDeltaMomentum
from .optimizers.input_keyed import InputKeyedOptimizer
from .optimizers.m3 import M3
from .optimizers.momentum import Momentum
from .optimizers.preconditioned_momentum import PreconditionedMomentum
from .routing import param_groups

_CLASSES: tuple[type[MemoryOptimizer], ...] = (
    DGD,
    DMGD,
    DeltaMomentum,
    InputDeltaMomentum,
    M3,
    Momentum,
    PreconditionedMomentum,
)


def list_optimizers() -> list[str]:
    """Return the names that `create_optimizer` takes."""
    return sorted(cls.__name__ for cls in _CLASSES)


def create_optimizer(name: str, model: nn.Module, lr: float | Tensor = 1e-3, **options: Any) -> MemoryOptimizer:
    """Return the optimizer called `name` for all of the model's parameters, routed by `param_groups`.

    Optimizers that are keyed by layer inputs get `capture_inputs(model)` of the parameters that have a memory. It hangs
    on the model until `optimizer.inputs.remove()`; call that when the training is over and the model lives on.

    Args:
        name: one of `list_optimizers()`, in any case: "DMGD", "delta_momentum".
        model: the model, bare or in a wrapper that keeps the parameters' shapes (DDP, FSDP2, `torch.compile`). Wrap
            first: what sharding does to a model is done to its parameters.
        lr: step size.
        options: hyper-parameters of the class, `adamw`, `memory`, `split` and `verbose` of `param_groups`, and for
            optimizers that are keyed by inputs `every` and `process_group` of `capture_inputs`. `weight_decay` is the
            class's own, for all that `param_groups` lets decay.

    Raises:
        TypeError: for an option that none of them takes, or if `model` is no module.
        ValueError: for a name that is none, or for what the class or `param_groups` refuses.

    Example:
        >>> model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8))
        >>> optimizer = create_optimizer("dmgd", model, lr=1e-3, weight_decay=0.1)
        >>> type(optimizer).__name__, [group["rule"] for group in optimizer.param_groups]
        ('DMGD', ['memory', 'adamw', 'adamw'])
    """
    cls = _named(name)
    own, routing = _arguments(cls, "params", "inputs"), _arguments(param_groups, "model")
    capture = _arguments(capture_inputs, "model", "params") if issubclass(cls, InputKeyedOptimizer) else {}
    valid = own | routing | capture
    if unknown := sorted(options.keys() - valid.keys()):
        raise TypeError(
            f"{cls.__name__} has no option {' or '.join(map(_quoted(valid), unknown))}; valid are {', '.join(valid)}"
        )
    chosen = {"lr": lr, "weight_decay": own["weight_decay"], **options}
    groups = param_groups(model, **_of(chosen, routing))
    keywords = _of(chosen, own)
    if capture:
        keywords["inputs"] = capture_inputs(model, _memories(groups), **_of(chosen, capture))
    try:
        return cls(groups, **keywords)
    except Exception:
        if capture:
            keywords["inputs"].remove()  # no hook outlives what it was made for
        raise


def _named(name: str) -> type[MemoryOptimizer]:
    classes = {_spelled(cls.__name__): cls for cls in _CLASSES}
    if isinstance(name, str) and _spelled(name) in classes:
        return classes[_spelled(name)]
    near = [classes[each].__name__ for each in get_close_matches(_spelled(str(name)), classes)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"there is no optimizer called {name!r}; {hint}there are {', '.join(list_optimizers())}")


def _spelled(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _arguments(function: Callable[..., Any], *without: str) -> dict[str, Any]:
    """Return the arguments of a function or class and their defaults."""
    arguments = inspect.signature(function).parameters.values()
    return {argument.name: argument.default for argument in arguments if argument.name not in without}


def _of(options: dict[str, Any], arguments: Iterable[str]) -> dict[str, Any]:
    return {name: options[name] for name in arguments if name in options}


def _quoted(valid: Iterable[str]) -> Callable[[str], str]:
    """Return how to name an option that is none: with the nearest that is one."""

    def quoted(name: str) -> str:
        near = get_close_matches(name, valid, n=1)
        return f"{name!r} (did you mean {near[0]!r}?)" if near else repr(name)

    return quoted


def _memories(groups: list[dict[str, Any]]) -> list[Tensor]:
    """Return the parameters that have a memory."""
    return [param for group in groups if group["rule"] == "memory" for _, param in group["params"]]
