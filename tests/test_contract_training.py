"""What every optimizer owes the loops it is put into: schedulers, loss scaling, hooks, averaging, sharding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from cases import LR, Case, every
from problem import (
    assert_same,
    copy_params,
    gradient,
    make_model,
    make_params,
    model_loss,
    set_grads,
    snapshot,
    train,
)

Scheduler = Callable[[Any], Any]

SCHEDULERS: dict[str, Scheduler] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.25, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 3)], [2]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, LR / 4, LR, step_size_up=2, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, LR, total_steps=8, cycle_momentum=True),
    "SWALR": lambda o: swa_utils.SWALR(o, LR / 4, anneal_epochs=3),
}


def test_the_table_of_schedulers_is_complete() -> None:
    """A scheduler that torch adds must be added here."""
    public = {lr_scheduler.__dict__[name] for name in lr_scheduler.__all__}
    assert {each.__name__ for each in public} - {"LRScheduler"} == set(SCHEDULERS) - {"SWALR"}


def advance(scheduler: Any) -> None:
    """Step a scheduler; a plateau is told that nothing improves."""
    scheduler.step(1.0) if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else scheduler.step()


@every()
def test_follows_a_scheduler_of_rate_and_momentum(case: Case) -> None:
    assert_follows(case, SCHEDULERS["OneCycleLR"])


@every("class")
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_follows_every_scheduler(case: Case, make: Scheduler) -> None:
    assert_follows(case, make)


def assert_follows(case: Case, make: Scheduler) -> None:
    """What the scheduler writes into the group is what the next step uses, momentum included."""
    params = make_params()
    optimizer = case.make(params)
    scheduler = make(optimizer)
    by_hand = case.make(copies := copy_params(params))
    rates = set()
    for step in range(6):
        rates.add(optimizer.param_groups[0]["lr"])
        for name in ("lr", "momentum", "betas"):
            if name in by_hand.param_groups[0]:
                by_hand.param_groups[0][name] = optimizer.param_groups[0][name]
        assert_same(train(optimizer, params, [step]), train(by_hand, copies, [step]))
        advance(scheduler)
    assert len(rates) > 1, "the scheduler changed nothing"


@every("class")
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_follows_a_scheduler_that_fills_a_tensor_lr(case: Case, make: Scheduler) -> None:
    """A rate held in a float64 tensor gives the very steps that a float gives."""
    params = make_params(dtype=torch.float64)
    optimizer, plain = (
        case.make(params, lr=torch.tensor(LR, dtype=torch.float64)),
        case.make(copies := copy_params(params)),
    )
    schedulers = [make(optimizer), make(plain)]
    for step in range(6):
        train(optimizer, params, [step])
        train(plain, copies, [step])
        for scheduler in schedulers:
            advance(scheduler)
    torch.testing.assert_close(snapshot(params), snapshot(copies))  # float64: tensors and floats may round apart


@every()
def test_momentum_can_be_cycled(case: Case) -> None:
    """CyclicLR and OneCycleLR refuse an optimizer without "momentum" or "betas" and rewrite the one they find."""
    optimizer = case.make(make_params())
    group = optimizer.param_groups[0]
    name = "betas" if "betas" in group else "momentum"
    before = group[name]
    lr_scheduler.OneCycleLR(optimizer, LR, total_steps=8, base_momentum=0.5, max_momentum=0.75)
    assert group[name] != before and len(group.get("betas", (0, 0))) == 2


@every()
@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
def test_grad_scaler_unscales_and_skips_overflows(case: Case, fused: bool | None) -> None:
    """Scaling by a power of two is exact, so the scaled run is the plain run without its overflowing step."""
    params = make_params()
    plain = case.make(copies := copy_params(params), fused=fused)
    optimizer = case.make(params, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(5):
        optimizer.zero_grad()
        loss = sum((param * gradient(param, step, index)).sum() for index, param in enumerate(params))
        scaler.scale(loss * (torch.inf if step == 2 else 1.0)).backward()
        before = snapshot(params)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert_same(snapshot(params), before)
        else:
            train(plain, copies, [step])
            assert_same(snapshot(params), snapshot(copies))
    assert scaler.get_scale() == 2.0**9


@every()
def test_optimizer_in_backward_equals_the_plain_loop(case: Case) -> None:
    """One instance per parameter, stepped as soon as its gradient is complete, to save gradient memory."""
    model, plain = make_model(), make_model()
    optimizer = case.make(plain.parameters())
    owners = {param: case.make([param]) for param in model.parameters()}

    def step(param: torch.Tensor) -> None:
        owners[param].step()
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    for batch in range(3):
        model_loss(model, batch).backward()
        optimizer.zero_grad()
        model_loss(plain, batch).backward()
        optimizer.step()
    assert_same(snapshot(model.parameters()), snapshot(plain.parameters()))


@every()
def test_step_hooks_run_around_the_step(case: Case) -> None:
    """A pre-hook may still change the gradient; a post-hook sees the new weights."""
    params = make_params()
    optimizer, halved = case.make(params), case.make(copies := copy_params(params))
    before, seen = snapshot(params), []

    def halve(*_: Any) -> None:
        assert_same(snapshot(params), before)
        for param in params:
            param.grad = param.grad / 2

    optimizer.register_step_pre_hook(halve)
    optimizer.register_step_post_hook(lambda *_: seen.extend(snapshot(params)))
    train(optimizer, params, [0])
    set_grads(copies, 0)
    for copy in copies:
        copy.grad.div_(2)
    halved.step()
    assert_same(seen, snapshot(copies))


@every("class")
def test_the_profiler_names_the_step(case: Case) -> None:
    """Traces are read by this name."""
    params = make_params()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(case.make(params), params, [0])
    names = [event.key for event in profile.key_averages()]
    assert names.count(f"Optimizer.step#{case.cls.__name__}.step") == 1


@every()
def test_an_averaged_model_averages(case: Case) -> None:
    """SWA beside the optimizer: the mean of the weights it visited."""
    model = make_model()
    optimizer, averaged = case.make(model.parameters()), swa_utils.AveragedModel(model)
    visited = []
    for step in range(3):
        model_loss(model, step).backward()
        optimizer.step()
        averaged.update_parameters(model)
        visited.append(snapshot(model.parameters()))
    means = [torch.stack(each).mean(0) for each in zip(*visited, strict=True)]
    torch.testing.assert_close(snapshot(averaged.module.parameters()), means)  # float32: three additions
