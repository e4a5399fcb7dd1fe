"""DMGD given gradients that are not finite: refused, skipped or ignored, and never half a step."""

import math
from functools import partial

import pytest
import torch

import deep_optim
from problem import make_params, set_grads, snapshot

DMGD = partial(deep_optim.DMGD, hidden_dim=16)  # by default there are none


def test_refuses_what_is_not_finite_in_any_group_and_names_all_of_it():
    """A vector under AdamW counts too, and so does a parameter that has no state yet."""
    params, optimizer, _ = self_made(nonfinite="raise")
    for index in (0, 2):
        params[index].grad.view(-1)[0] = math.nan
    with pytest.raises(RuntimeError, match=r"not finite, .*: \(6, 4\), \(7,\); nothing"):
        optimizer.step()
    fresh = DMGD(params := make_params())
    set_grads(params, 0)
    params[-1].grad.view(-1)[0] = math.inf
    with pytest.raises(RuntimeError, match="not finite"):
        fresh.step()
    assert not fresh.state


def test_a_skipped_parameter_trains_on_as_if_the_step_had_not_been():
    """Even if it was the first: its counters have not moved either."""
    for output in ("adam", "newton_schulz"):
        params, copies = make_params(), make_params()
        skipping, plain = (DMGD(each, nonfinite="skip", output=output) for each in (params, copies))
        set_grads(params, 0)
        for param in params:
            param.grad.view(-1)[-1] = math.nan
        skipping.step()
        for step in range(1, 3):
            for each, optimizer in ((params, skipping), (copies, plain)):
                set_grads(each, step)
                optimizer.step()
        assert all(map(torch.equal, params, copies))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 2, 4], ids=["first", "a vector", "last"])
def test_raises_at_a_gradient_that_is_not_finite_before_anything_moves(bad, position):
    params, optimizer, before = self_made(nonfinite="raise")
    params[position].grad.view(-1)[-1] = bad
    with pytest.raises(RuntimeError, match=r"not finite.*nonfinite='skip'"):
        optimizer.step()
    for param, (value, state) in zip(params, before, strict=True):
        assert torch.equal(param, value)
        assert all(torch.equal(optimizer.state[param][name], state[name]) for name in state)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_skips_only_the_parameter_whose_gradient_is_not_finite(bad):
    params, optimizer, before = self_made(nonfinite="skip")
    params[1].grad.view(-1)[0] = bad
    optimizer.step()
    for index, (param, (value, state)) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(param, value) == (index == 1)
        if index == 1:
            assert all(torch.equal(optimizer.state[param][name], state[name]) for name in state)


def test_nobody_looks_where_nonfinite_is_ignored(monkeypatch):
    """Nothing is asked of the device, and the NaN shows: the user said so."""
    monkeypatch.setattr("deep_optim.optimizers.dmgd._not_finite", None)  # cannot be called
    params, optimizer, _ = self_made(nonfinite="ignore")
    set_grads(params, step=3)
    params[0].grad[0, 0] = float("nan")
    optimizer.step()
    assert params[0].isnan().any() and all(param.isfinite().all() for param in params[1:])


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_gradient_whose_norm_alone_overflows_is_not_refused(nonfinite):
    params, optimizer, before = self_made(nonfinite=nonfinite)
    for param in params:
        param.grad = torch.full_like(param, 1e30)
    optimizer.step()
    assert all(not torch.equal(param, value) for param, (value, _) in zip(params, before, strict=True))
    assert all(param.isfinite().all() for param in params)


def self_made(**options):
    params = make_params()
    optimizer = DMGD([{"params": params[:3]}, {"params": params[3:]}], **options)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    set_grads(params, 2)
    state = [{name: value.clone() for name, value in optimizer.state[param].items()} for param in params]
    return params, optimizer, list(zip(snapshot(params), state, strict=True))


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_gradient_too_large_to_be_summed_is_refused(nonfinite):
    """Finite entries of 1e37, whose norm is beyond float32: the memory would be infinite."""
    params, optimizer, before = self_made(nonfinite=nonfinite)
    params[0].grad = torch.full_like(params[0], 1e37)
    if nonfinite == "raise":
        with pytest.raises(RuntimeError, match="too large to be summed"):
            optimizer.step()
    else:
        optimizer.step()
    value, state = before[0]
    assert torch.equal(params[0], value)
    assert all(torch.equal(optimizer.state[params[0]][name], state[name]) for name in state)


def test_skipping_is_decided_anew_at_every_compiled_step():
    """What was not finite while the step was traced is stepped once it is."""
    params = make_params([(4, 3), (3, 5)])
    optimizer = DMGD(params, nonfinite="skip")
    set_grads(params, 0)
    optimizer.step()
    step = torch.compile(optimizer.step, backend="eager")
    params[0].grad[0, 0] = math.nan
    twin = params[0].detach().clone()
    with torch.no_grad():
        step()
        params[0].copy_(twin)  # inside a graph the NaN shows
    for value in optimizer.state[params[0]].values():
        value.nan_to_num_()
    set_grads(params, 1)
    step()
    assert not torch.equal(params[0], twin)
