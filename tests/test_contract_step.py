"""What every optimizer owes in one call of step(): the right tensors move, by the right amount, and no others."""

from typing import Any

import pytest
import torch

from cases import CASES, LR, Case, every
from problem import assert_same, copy_params, gradient, make_params, set_grads, snapshot, train


@every()
def test_closure_runs_once_with_grad_and_its_loss_is_returned(case: Case) -> None:
    """The closure's gradients are the ones that are used."""
    params = make_params()
    plain = case.make(copies := copy_params(params))
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        set_grads(params, 0)
        return torch.tensor(2.5)

    optimizer = case.make(params)
    with torch.no_grad():
        assert optimizer.step(closure).item() == 2.5
    assert calls == [True]
    assert_same(snapshot(params), train(plain, copies, [0]))


@every()
def test_closure_may_be_none_by_keyword(case: Case) -> None:
    """torch.distributed.checkpoint calls step(closure=None)."""
    params = make_params()
    set_grads(params, 0)
    assert case.make(params).step(closure=None) is None


@every()
def test_step_builds_no_graph_and_restores_grad_mode(case: Case) -> None:
    """Parameters stay leaves, and the caller's grad mode is the caller's."""
    params = make_params()
    optimizer = case.make(params)
    train(optimizer, params, [0])
    assert torch.is_grad_enabled()
    assert all(param.is_leaf and param.requires_grad for param in params)
    assert not any(value.requires_grad for state in optimizer.state.values() for value in state.values())


@every()
def test_the_parameters_tensors_are_updated_in_place(case: Case) -> None:
    """Modules, wrappers and captured graphs hold the storage, not the name."""
    params = make_params() + make_params(dtype=torch.bfloat16)
    before = [(param.data_ptr(), param._version) for param in params]
    train(case.make(params), params, [0])
    assert [pointer for pointer, _ in before] == [param.data_ptr() for param in params]
    assert all(param._version > version for param, (_, version) in zip(params, before, strict=True))


@every()
def test_gradients_are_never_written_or_freed(case: Case) -> None:
    """`p.grad` belongs to the user: same tensor, same version, same values."""
    params = make_params()
    optimizer = case.make(params)
    for step in range(3):
        set_grads(params, step)
        before = [(param.grad, param.grad._version) for param in params]
        optimizer.step()
        for index, (param, (grad, version)) in enumerate(zip(params, before, strict=True)):
            assert param.grad is grad and grad._version == version
            assert_same(grad, gradient(param, step, index))


@every()
def test_state_never_aliases_the_gradient(case: Case) -> None:
    """Writing the next gradient into the same tensor, as DDP's buckets do, must not change the memory."""
    params = make_params()
    optimizer, twin = case.make(params), case.make(copies := copy_params(params))
    set_grads(params, 0)
    optimizer.step()
    for index, param in enumerate(params):
        param.grad.copy_(gradient(param, 1, index))
    optimizer.step()
    assert_same(snapshot(params), train(twin, copies, range(2)))


@every()
def test_without_a_gradient_nothing_happens(case: Case) -> None:
    """None is not zero: no decay, no state, no move."""
    params = make_params()
    optimizer = case.make(params, weight_decay=0.5)
    set_grads(params, 0)
    params[0].grad = params[2].grad = None
    before = snapshot(params)
    optimizer.step()
    assert_same([params[0].detach(), params[2].detach()], [before[0], before[2]])
    assert set(optimizer.state) == {params[1], params[3], params[4]}
    assert params[0].grad is None


@every()
def test_a_first_gradient_may_come_late(case: Case) -> None:
    """State begins with a parameter's own first gradient."""
    params = make_params()
    optimizer = case.make(params)
    set_grads(params, 0)
    params[0].grad = None
    optimizer.step()
    fresh = case.make(copies := copy_params(params[:1]))
    assert_same(train(optimizer, params, range(1, 4))[:1], train(fresh, copies, range(1, 4)))


@every()
def test_a_gradient_may_pause(case: Case) -> None:
    """A step without a gradient is no step: no decay of the memory either."""
    params = make_params()
    paused, steady = case.make(params), case.make(copies := copy_params(params))
    train(paused, params, range(2))
    for param in params:
        param.grad = None
    paused.step()
    assert_same(train(paused, params, range(2, 4)), train(steady, copies, range(4)))


@every()
def test_a_late_group_trains_like_a_fresh_optimizer(case: Case) -> None:
    """Unfreezing a layer: its group starts anew, the others go on."""
    params = make_params()
    optimizer = case.make(params[1:])
    train(optimizer, params, range(2))
    fresh = case.make(copies := copy_params(params[:1]))
    optimizer.add_param_group({"params": [params[0]], **case.group})
    assert optimizer.param_groups[1].keys() == optimizer.param_groups[0].keys()
    assert_same(train(optimizer, params, range(2, 4))[:1], train(fresh, copies, range(2, 4)))


@every()
def test_every_group_steps_with_its_own_values(case: Case) -> None:
    """Two groups are two optimizers."""
    values: dict[str, Any] = {"lr": 3 * LR, "weight_decay": 0.3, "maximize": True}
    if "momentum" in case.defaults():
        values["momentum"] = 0.5
    params = make_params()
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:4], **values}, {"params": params[4:], **values}])
    copies = copy_params(params)
    twins = [case.make(copies[:2]), case.make(copies[2:], **values)]
    assert_same(train(optimizer, params, range(3)), train(twins, copies, range(3)))
    assert_same(optimizer.state[params[4]], twins[1].state[copies[4]])


@every("class")
def test_every_option_works_per_group(case: Case) -> None:
    """One optimizer whose groups are all the cases of its class equals one optimizer per case."""
    family = [each for each in CASES if each.cls is case.cls]
    params = [make_params(seed=seed) for seed in range(len(family))]
    copies = [copy_params(each) for each in params]
    optimizer = case.make(
        [{"params": each, **one.kwargs, **one.group} for each, one in zip(params, family, strict=True)]
    )
    twins = [one.make(each) for each, one in zip(copies, family, strict=True)]
    for step in range(3):
        for each, copy in zip(params, copies, strict=True):
            set_grads(each, step)
            set_grads(copy, step)
        optimizer.step()
        for twin in twins:
            twin.step()
    for one, each, copy in zip(family, params, copies, strict=True):
        # float32 rounding: equal shapes of several cases may be computed as one stack, in another order of sums
        torch.testing.assert_close(each, copy, msg=lambda text, one=one: f"{one.id}: {text}")


@every()
def test_maximize_is_descent_on_the_negated_gradient(case: Case) -> None:
    """Negation is exact, so the two agree bit for bit; the flag is read from the group."""
    params = make_params()
    down = case.make(copies := copy_params(params))
    up = case.make(params)
    up.param_groups[0]["maximize"] = True
    for step in range(3):
        set_grads(params, step)
        set_grads(copies, step)
        for copy in copies:
            copy.grad.neg_()
        up.step()
        down.step()
    assert_same(snapshot(params), snapshot(copies))


@every()
@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False, "fused": False}, {"fused": True}], ids=str)
def test_every_implementation_steps_alike(case: Case, options: dict[str, bool]) -> None:
    """`foreach` and `fused` choose how, not what."""
    params = make_params(dtype=torch.float64)
    chosen, default = case.make(copies := copy_params(params), **options), case.make(params)
    torch.testing.assert_close(train(chosen, copies, range(3)), train(default, params, range(3)))  # float64 rounding


@every()
def test_a_zero_gradient_leaves_the_decay_alone(case: Case) -> None:
    """In closed form: W <- (1 - lr * weight_decay) W, and an all-zero gradient writes nothing into the memory."""
    params = make_params(dtype=torch.float64)
    expected = [param.detach() * (1 - LR * 0.25) ** 3 for param in params]
    optimizer = case.make(params, weight_decay=0.25)
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    torch.testing.assert_close(snapshot(params), expected)  # float64: three roundings


@every()
def test_weight_decay_is_decoupled(case: Case) -> None:
    """Decay subtracts lr * weight_decay * W and never enters the state."""
    params = make_params(dtype=torch.float64)
    start = snapshot(params)
    decayed, plain = case.make(params, weight_decay=0.25), case.make(copies := copy_params(params), weight_decay=0.0)
    train(decayed, params, [0])
    train(plain, copies, [0])
    assert_same(decayed.state_dict()["state"], plain.state_dict()["state"])
    expected = [copy - LR * 0.25 * old for copy, old in zip(snapshot(copies), start, strict=True)]
    torch.testing.assert_close(snapshot(params), expected)  # float64: two roundings


@every()
def test_the_step_is_proportional_to_lr(case: Case) -> None:
    """From one state, twice the rate goes twice as far, and zero goes nowhere."""
    start = make_params(dtype=torch.float64)
    moves = []
    for rate in (LR, 2 * LR, 0.0):
        params = copy_params(start)
        train(case.make(params, lr=rate, weight_decay=0.25), params, [0])
        moves.append([new.detach() - old.detach() for new, old in zip(params, start, strict=True)])
    torch.testing.assert_close(moves[1], [2 * move for move in moves[0]])
    assert all(move.abs().min() > 0 for move in moves[0])
    assert not any(move.any() for move in moves[2])


@every()
def test_zero_gradients_at_lr_zero_move_nothing(case: Case) -> None:
    """This is how torch.distributed.checkpoint makes an optimizer create its state."""
    params = make_params()
    before = snapshot(params)
    optimizer = case.make(params, lr=0.0, weight_decay=0.5)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step(closure=None)
    assert_same(snapshot(params), before)
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


@every(beyond_torch="counts the empty step, and its first real update is 1.34 times smaller")
def test_zero_gradients_at_lr_zero_change_no_later_step(case: Case) -> None:
    """A run that starts by loading a checkpoint's shape is the same run."""
    params = make_params()
    touched, fresh = case.make(params, lr=0.0), case.make(copies := copy_params(params))
    for param in params:
        param.grad = torch.zeros_like(param)
    touched.step(closure=None)
    touched.param_groups[0]["lr"] = LR
    assert_same(train(touched, params, range(4)), train(fresh, copies, range(4)))


@every()
def test_a_nan_in_the_gradient_is_never_hidden(case: Case) -> None:
    """A normalised update must not turn a broken loss into an innocent-looking step: it shows, or nothing moves."""
    params = make_params()
    optimizer = case.make(params)
    train(optimizer, params, [0])
    before = snapshot(params)
    set_grads(params, 1)
    for param in params:
        param.grad.view(-1)[0] = torch.nan
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "not finite" in str(error)
        assert_same(snapshot(params), before)
    for param, old in zip(params, before, strict=True):
        assert param.detach().view(-1)[0].isnan() or torch.equal(param, old)
