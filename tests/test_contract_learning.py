"""What every optimizer is for: the loss falls, every time in the same way, and no two optimizers disturb each other."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CASES, LR, Case, every
from problem import assert_same, copy_params, make_model, make_params, model_loss, set_grads, snapshot, train

STEPS, DISTANCE = 60, 0.0625


@every()
@pytest.mark.parametrize("curvature", [2.0, 8.0])
def test_minimises_a_quadratic(case: Case, curvature: float) -> None:
    """Every kind of parameter arrives: less than a quarter of the way is left.

    The slowest step here is Newton-Schulz's, 0.2 lr per entry. Under a rate that falls linearly from 1/64 it can
    travel 0.2 / 64 * 60 / 2 = 0.094, which is half as far again as the way of 0.0625.
    """
    signs = torch.Generator().manual_seed(0)
    params = make_params()
    ways = [DISTANCE * (2 * torch.randint(2, param.shape, generator=signs) - 1) for param in params]
    goals = [param.detach() + way for param, way in zip(params, ways, strict=True)]
    optimizer = case.make(params, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        for param, goal in zip(params, goals, strict=True):
            param.grad = curvature * (param.detach() - goal)
        optimizer.step()
        schedule.step()
    for param, goal in zip(params, goals, strict=True):
        left = (param.detach() - goal).square().mean().sqrt() / DISTANCE
        assert left < 0.25, f"{tuple(param.shape)}: {left:.2f} of the way is left"


@every()
def test_trains_a_model_the_same_way_twice(case: Case) -> None:
    """Drop-in: model.parameters() and nothing else. The loss falls, and a second run repeats the first bit for bit."""

    def run(steps: int) -> list[float]:
        model = make_model()
        optimizer = case.make(model.parameters())
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model_loss(model, 0)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    losses = run(30)
    assert run(10) == losses[:10]
    assert losses[-1] < losses[0] / 2


@every()
def test_instances_share_nothing(case: Case) -> None:
    """Two optimizers stepped in turn do what each does alone."""
    first, second = make_params(seed=1), make_params(seed=2)
    pair = [case.make(first), case.make(second, lr=0.5)]
    alone, copies = case.make(copies := copy_params(first)), copies
    for step in range(3):
        set_grads(first, step)
        set_grads(second, 100 + step)
        for optimizer in pair:
            optimizer.step()
    assert_same(snapshot(first), train(alone, copies, range(3)))
    assert set(pair[0].state) == set(first) and set(pair[1].state) == set(second)


@every()
def test_follows_parameters_that_are_replaced(case: Case) -> None:
    """Sharding wrappers put other tensors into `param_groups` before the first step."""
    params = make_params()
    optimizer = case.make(params)
    plain = case.make(copies := copy_params(params))
    replaced = copy_params(params)
    optimizer.param_groups[0]["params"] = list(replaced)
    assert_same(train(optimizer, replaced, range(3)), train(plain, copies, range(3)))
    assert set(optimizer.state) == set(replaced)


@every()
def test_zero_grad_frees_or_zeroes(case: Case) -> None:
    """Inherited, and not to be broken by state."""
    params = make_params()
    optimizer = case.make(params)
    train(optimizer, params, [0])
    optimizer.zero_grad(set_to_none=False)
    assert not any(param.grad.any() for param in params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)


# these choose how a step is made, not what it does
HOW = {"foreach", "fused", "capturable", "differentiable", "nonfinite", "backend", "kahan_sum", "missing"}


def other_values(name: str, value: Any) -> set[Any]:
    """Return values that differ from this one; words are taken from the table."""
    if isinstance(value, str):
        return {case.kwargs[name] for case in CASES if name in case.kwargs} - {value}
    if isinstance(value, tuple):
        return {tuple(0.9 * each for each in value)}
    return {not value} if isinstance(value, bool) else {value + 1} if isinstance(value, int) else {0.9 * value}


@every("class")
def test_no_knob_is_dead(case: Case) -> None:
    """Every keyword changes what is learnt, under some option of the class."""

    def learnt(each: Case, **kwargs: Any) -> list[Tensor]:
        params = make_params(dtype=torch.float64)
        optimizer = each.make(params, **kwargs)
        train(optimizer, params, range(3))
        for param in params:
            param.grad.zero_()  # for what remembers the largest gradient
        optimizer.step()
        return snapshot(params)

    family = [(each, {"lr": LR, **each.defaults(), **each.kwargs}) for each in CASES if each.cls is case.cls]
    usual = [learnt(each) for each, _ in family]
    for name in set(case.defaults()) - HOW:
        assert any(
            not all(map(torch.equal, learnt(each, **{name: other}), was))
            for (each, values), was in zip(family, usual, strict=True)
            for other in other_values(name, values[name])
        ), name
