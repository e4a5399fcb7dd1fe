"""Checks of hyper-parameters, in torch.optim's words. Each is written so that NaN fails it."""

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from torch import Tensor


def check_lr(group: Mapping[str, Any]) -> None:
    """Refuse a learning rate that is negative, NaN or not a single number."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if group["foreach"] and not group["capturable"]:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")


def check_at_least(group: Mapping[str, Any], minimum: float, *names: str) -> None:
    """Refuse values below `minimum`, and infinity."""
    for name in names:
        if not minimum <= group[name] < math.inf:
            raise ValueError(f"Invalid {name} value: {group[name]}")


def check_range(group: Mapping[str, Any], name: str, minimum: float, maximum: float) -> None:
    """Refuse a value outside [`minimum`, `maximum`]."""
    if not minimum <= group[name] <= maximum:
        raise ValueError(f"Invalid {name} value: {group[name]}, expected {minimum} to {maximum}")


def check_count(group: Mapping[str, Any], *names: str, minimum: int = 1) -> None:
    """Refuse what is no whole number of at least `minimum`."""
    for name in names:
        if not isinstance(group[name], Integral) or isinstance(group[name], bool) or group[name] < minimum:
            raise ValueError(f"Invalid {name} value: {group[name]}")


def check_betas(group: Mapping[str, Any], name: str) -> None:
    """Refuse anything but two decay rates in [0, 1)."""
    if len(group[name]) != 2:
        raise ValueError(f"Invalid {name}: {group[name]}, expected two")
    for index, beta in enumerate(group[name]):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")


def check_choice(group: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not among `choices`."""
    if group[name] not in choices:
        raise ValueError(f"Invalid {name}: {group[name]!r}, expected one of {choices}")
