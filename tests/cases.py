"""The one table of optimizers: every promise in test_contract_*.py is kept by every line of it.

A new optimizer, or a new option of an old one, is one more line. AdamW stands in the table as a control: a promise
that it keeps is fair to ask, and a promise that it breaks (`beyond_torch`) is an expected failure that must stay one.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from deep_optim import (
    DGD,
    DMGD,
    M3,
    DeltaMomentum,
    InputDeltaMomentum,
    Momentum,
    MultiFrequency,
    PreconditionedMomentum,
)
from problem import make_params, train

WIRES = ("params", "inputs")  # arguments that are no hyper-parameters: no group has them, no checkpoint keeps them
LR = 2.0**-6  # exact in every dtype, so that a tensor can hold what a float holds


@dataclass(frozen=True)
class Case:
    """An optimizer class, and the options of the constructor and of its groups that a test builds it with."""

    id: str
    cls: type[Optimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)
    group: dict[str, Any] = field(default_factory=dict)
    control: bool = False

    def make(self, params: ParamsT, **kwargs: Any) -> Any:
        """Build the optimizer; `kwargs` win over the case's own."""
        return self.cls(self.groups(params), **{"lr": LR, **self.kwargs, **kwargs})

    def mid_training(self, dtype: torch.dtype = torch.float32, steps: int = 3) -> tuple[Any, list[torch.Tensor]]:
        """Return an optimizer after a few steps, and its parameters."""
        params = make_params(dtype=dtype)
        optimizer = self.make(params)
        train(optimizer, params, range(steps))
        return optimizer, params

    def groups(self, params: Any) -> Any:
        """Return `params` with the options that are keys of a group and no arguments of the constructor."""
        if not self.group or params is None or isinstance(params, torch.Tensor) or not (params := list(params)):
            return params
        groups = params if isinstance(params[0], dict) else [{"params": params}]
        return [{**self.group, **each} for each in groups]

    def defaults(self) -> dict[str, Any]:
        """Return what the constructor assumes for every hyper-parameter: all but what is optimized, and its inputs."""
        signature = inspect.signature(self.cls).parameters.values()
        return {parameter.name: parameter.default for parameter in signature if parameter.name not in WIRES}


class MomentumInChunks(MultiFrequency):
    """Momentum under MultiFrequency, built like Momentum, and given every gradient as often as its period says.

    The mean of two equal numbers is that number, so that it owes, bit for bit, whatever Momentum owes.
    """

    @functools.wraps(Momentum.__init__)
    def __init__(self, params: ParamsT, **kwargs: Any) -> None:
        super().__init__(Momentum(params, **kwargs))

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Step until the chunk is full. The step of the base class without its hooks, which are this step's."""
        step = inspect.unwrap(MultiFrequency.step)
        loss = step(self, closure)
        while any(group["chunk_step"] for group in self.param_groups):
            step(self)
        return loss


MomentumInChunks.__name__ = "Momentum"  # in whose name it refuses what Momentum refuses

CASES = (
    Case("adamw", torch.optim.AdamW, control=True),
    Case("momentum", Momentum),
    Case("momentum-plain", Momentum, {"nesterov": False, "ns_coefficients": "polar_express", "ns_steps": 8}),
    Case("momentum-identity", Momentum, {"output": "identity"}),
    Case("momentum-adam", Momentum, {"output": "adam"}),
    Case("momentum-adamw-rule", Momentum, group={"rule": "adamw"}),
    Case("momentum-soft-rows", Momentum, {"feature_map": "soft_rows"}),
    Case("momentum-tanh", Momentum, {"feature_map": "tanh", "output": "identity"}),
    Case("momentum-sign", Momentum, {"feature_map": "sign", "output": "adam"}),
    Case("preconditioned", PreconditionedMomentum),
    Case("preconditioned-identity", PreconditionedMomentum, {"preconditioner": "identity"}),
    Case("preconditioned-diagonal-identity", PreconditionedMomentum, {"output": "identity"}),
    Case("preconditioned-diagonal-adam", PreconditionedMomentum, {"output": "adam"}),
    Case("preconditioned-shampoo", PreconditionedMomentum, {"preconditioner": "shampoo", "precondition_interval": 2}),
    Case(
        "preconditioned-shampoo-identity", PreconditionedMomentum, {"preconditioner": "shampoo", "output": "identity"}
    ),
    Case("preconditioned-newton-schulz", PreconditionedMomentum, {"preconditioner": "newton_schulz"}),
    Case(
        "preconditioned-newton-schulz-adam",
        PreconditionedMomentum,
        {"preconditioner": "newton_schulz", "output": "adam"},
    ),
    Case("delta", DeltaMomentum),
    Case("delta-right", DeltaMomentum, {"side": "right", "inner_lr": 1.0}),
    Case("delta-left", DeltaMomentum, {"side": "left", "nesterov": False}),
    Case("delta-trace", DeltaMomentum, {"gram_norm": "trace"}),
    Case("delta-identity", DeltaMomentum, {"output": "identity", "feature_map": "identity"}),
    Case("delta-adam", DeltaMomentum, {"output": "adam", "feature_map": "tanh"}),
    Case("delta-inner-steps", DeltaMomentum, {"inner_steps": 4, "lookahead": 2.0, "output": "adam"}),
    Case("delta-no-inner-lr", DeltaMomentum, {"inner_lr": 0.0, "feature_map": "sign"}),
    Case("dmgd", DMGD, {"hidden_dim": 16}),
    Case("dmgd-identity", DMGD, {"hidden_dim": 4, "output": "identity", "inner_steps": 1, "inner_lr": 0.1}),
    Case("dmgd-adam", DMGD, {"output": "adam", "hidden_dim": 3, "hidden_lr": 0.1}),
    Case("dmgd-skip", DMGD, {"hidden_dim": 4, "nonfinite": "skip", "nesterov": False, "inner_steps": 4}),
    Case("dmgd-no-hidden", DMGD, {"hidden_dim": 0}),
    # Short chunks, or no test would see one end.
    Case("m3", M3, {"chunk_size": 2, "alpha_warmup": 2}),
    Case("m3-pre", M3, {"chunk_size": 2, "alpha_warmup": 2, "mix": "pre", "alpha": 1.0, "nesterov": False}),
    Case("m3-elementwise", M3, {"chunk_size": 2, "alpha_warmup": 0, "second_moment": "elementwise"}),
    Case("m3-gradient", M3, {"chunk_size": 3, "alpha_warmup": 0, "second_moment": "gradient", "mix": "pre"}),
    Case("m3-none", M3, {"chunk_size": 1, "alpha_warmup": 0, "second_moment": "none", "alpha": 0.5}),
    Case("m3-no-slow-memory", M3, {"chunk_size": 2, "alpha_warmup": 2, "alpha": 0.0}),
    # without a model there are no layer inputs: test_input_delta_momentum.py and test_dgd.py have the models
    Case("input-delta", InputDeltaMomentum, {"missing": "gradient"}),
    Case("input-delta-identity", InputDeltaMomentum, {"missing": "gradient", "output": "identity", "inner_lr": 1.0}),
    Case("input-delta-adam", InputDeltaMomentum, {"missing": "gradient", "output": "adam", "nesterov": False}),
    Case("dgd", DGD, {"missing": "gradient"}),
    Case("dgd-identity", DGD, {"missing": "gradient", "output": "identity", "nesterov": False}),
    Case("dgd-adam", DGD, {"missing": "gradient", "output": "adam", "rho": 0.01}),
    Case("multi-frequency", MomentumInChunks, group={"period": 2}),
    Case("multi-frequency-adam", MomentumInChunks, {"output": "adam"}, group={"period": 2}),
)


# Every option of theirs is in another line, too, or is a number: no path of the code is theirs alone.
NO_PATH_OF_THEIR_OWN = (
    "momentum-plain",
    "preconditioned-diagonal-identity",
    "preconditioned-shampoo-identity",
    "preconditioned-newton-schulz-adam",
    "delta-no-inner-lr",
    "dmgd-adam",
    "input-delta-identity",
    "input-delta-adam",
    "dgd-adam",
)


def one_per_class() -> Iterator[Case]:
    """Yield the first case of every class, for tests too slow for the whole table."""
    seen: set[type[Optimizer]] = set()
    for case in CASES:
        if case.cls not in seen:
            seen.add(case.cls)
            yield case


def every(
    kind: str = "case", *, beyond_torch: str | None = None, raises: type[Exception] | None = None
) -> pytest.MarkDecorator:
    """Parametrize a test over the table, "case" by case, or if it is slow by "path" of the code or by "class".

    `beyond_torch` names why torch's own AdamW breaks the promise: there the test must fail, or the claim is stale. It
    must fail by an assertion or by `raises`; any other error is a fault of the test.
    """
    failures = (AssertionError, pytest.fail.Exception, *([raises] if raises else []))
    reason = f"torch's AdamW {beyond_torch}"
    marks = pytest.mark.xfail(strict=True, raises=failures, reason=reason) if beyond_torch else ()
    chosen: dict[str, Iterable[Case]] = {
        "case": CASES,
        "path": (case for case in CASES if case.id not in NO_PATH_OF_THEIR_OWN),
        "class": one_per_class(),
    }
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=case.id, marks=marks if case.control else ()) for case in chosen[kind]]
    )
