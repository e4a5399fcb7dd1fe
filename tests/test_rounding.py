"""Weights in low precision: a small update is lost in bfloat16, and kept by the compensation."""

import pytest
import torch

from cases import Case, one_per_class
from deep_optim import Momentum
from problem import assert_same, copy_params, make_params, train

CASES = [pytest.param(case, id=case.id) for case in one_per_class() if not case.control]


def walk(case, kahan_sum, dtype=torch.bfloat16, lr=2.0**-14, steps=64, shape=(6, 4), rule="memory"):
    """Return how far a parameter of about 1 goes, in updates of a quarter of bfloat16's rounding."""
    param = torch.ones(shape, dtype=dtype, requires_grad=True)
    optimizer = case.make([{"params": [param], "rule": rule}], lr=lr, weight_decay=0.0, kahan_sum=kahan_sum)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(shape, generator=generator, dtype=torch.float64)
    for _ in range(steps):
        param.grad = direction.to(dtype)
        optimizer.step()
    state = optimizer.state[param]
    kept = state["compensation"].double() if "compensation" in state else 0.0
    return param.detach().double() - 1 + kept, optimizer


@pytest.mark.parametrize("rule, shape", [("memory", (6, 4)), ("adamw", (6, 4)), ("memory", (5,))])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keeps_a_small_update_that_rounding_loses(case, rule, shape, dtype):
    """Against the same walk in float64: rounded weights do not move at all, compensated ones as they should."""
    lr = 2.0**-14 if dtype == torch.bfloat16 else 2.0**-17
    exact, _ = walk(case, False, torch.float64, lr, rule=rule, shape=shape)
    assert exact.abs().max() > 16 * lr / 4
    lost, _ = walk(case, False, dtype, lr, rule=rule, shape=shape)
    assert (lost == 0).all()
    kept, _ = walk(case, True, dtype, lr, rule=rule, shape=shape)
    torch.testing.assert_close(kept, exact, rtol=0.05, atol=lr)  # Newton-Schulz works in bfloat16 here


def test_the_compensation_is_less_than_half_a_unit_of_the_weight():
    _, optimizer = walk(Case("momentum", Momentum), True)
    (state,) = optimizer.state.values()
    assert state["compensation"].dtype == torch.bfloat16
    assert 0 < state["compensation"].abs().max() <= torch.finfo(torch.bfloat16).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exact_weights_need_none(dtype):
    params, plain = make_params(dtype=dtype), make_params(dtype=dtype)
    optimizer = Momentum(params, kahan_sum=True)
    assert all(map(torch.equal, train(optimizer, params, range(3)), train(Momentum(plain), plain, range(3))))
    assert not any("compensation" in state for state in optimizer.state.values())


def test_is_off_by_default_and_costs_two_bytes():
    params, plain = make_params([(8, 6)], torch.bfloat16), make_params([(8, 6)], torch.bfloat16)
    compensated, rounded = Momentum(params, kahan_sum=True), Momentum(plain)
    train(compensated, params, range(1))
    train(rounded, plain, range(1))
    assert set(compensated.state[params[0]]) - set(rounded.state[plain[0]]) == {"compensation"}
    assert compensated.state[params[0]]["compensation"].element_size() == 2


def test_one_step_differs_by_rounding_alone():
    """The first step starts without compensation: the weights are those of plain rounding."""
    params, plain = make_params(dtype=torch.bfloat16), make_params(dtype=torch.bfloat16)
    after = train(Momentum(params, kahan_sum=True), params, range(1))
    assert all(map(torch.equal, after, train(Momentum(plain), plain, range(1))))


@pytest.mark.parametrize("case", CASES)
def test_a_run_continues_from_a_checkpoint_bit_for_bit(case):
    params = make_params(dtype=torch.bfloat16)
    optimizer = case.make(params, kahan_sum=True)
    train(optimizer, params, range(3))
    copies = copy_params(params)
    resumed = case.make(copies, kahan_sum=True)
    resumed.load_state_dict(optimizer.state_dict())
    assert_same(train(resumed, copies, range(3, 7)), train(optimizer, params, range(3, 7)))
    assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"])


def test_a_checkpoint_without_compensation_starts_it_at_zero():
    """Saved in float32, where there is none, and continued in bfloat16."""
    params = make_params()
    saved = Momentum(params, kahan_sum=True)
    train(saved, params, range(2))
    low = [param.detach().bfloat16().requires_grad_() for param in params]
    resumed = Momentum(low, kahan_sum=True)
    resumed.load_state_dict(saved.state_dict())
    for param in low:
        compensation = resumed.state[param]["compensation"]
        assert compensation.dtype == torch.bfloat16 and (compensation == 0).all()
    train(resumed, low, range(2, 4))
    assert any((resumed.state[param]["compensation"] != 0).any() for param in low)


def test_is_traced_like_the_rest():
    """torch.compile of the step moves weights and compensation as eager does, to a rounding."""
    params = make_params([(6, 4), (5,)], torch.bfloat16)
    copies = copy_params(params)
    train(Momentum(params, kahan_sum=True), params, range(3))
    optimizer = Momentum(copies, kahan_sum=True)
    optimizer.step = torch.compile(optimizer.step)
    train(optimizer, copies, range(3))
    torch.testing.assert_close(copies, params, rtol=0.01, atol=0.0)
