"""Update frequencies against loops written by hand, and in the places where a chunk could be lost or counted twice."""

import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from deep_optim import DMGD, Momentum, MultiFrequency, param_groups
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
from test_contract_loading import through_a_file

LR = 2.0**-6
Make = Callable[[Any], Optimizer]

INNER: dict[str, Make] = {
    "AdamW": lambda params: AdamW(params, lr=LR),
    "SGD": lambda params: SGD(params, lr=LR, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Momentum": lambda params: Momentum(params, lr=LR),
    "DMGD": lambda params: DMGD(params, lr=LR, hidden_dim=4),
}
if hasattr(torch.optim, "Muon"):  # for matrices alone, so that it gets no others here
    INNER["Muon"] = lambda params: torch.optim.Muon(params, lr=LR)
inner = pytest.mark.parametrize("make", INNER.values(), ids=INNER)
reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])


def two_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1], "name": "fast"}, {"params": params[1:], "name": "slow"}]


def sgd(periods: Any, shapes: Any = ((2,), (2,)), **options: Any) -> tuple[MultiFrequency, list[nn.Parameter]]:
    """Return gradient descent at lr 1 from zero, whose parameters are minus the sum of what they were stepped on."""
    params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    return MultiFrequency(SGD(two_groups(params), lr=1.0), periods, **options), params


def give(param: Tensor, value: float) -> None:
    param.grad = torch.full_like(param, value)


@inner
@reduction
def test_equals_gradient_accumulation_written_by_hand(make: Make, reduction: Any) -> None:
    """Torch's own accumulation, loss after loss into p.grad, with a step of the slow part after every third."""
    params = make_params([(6, 4), (3, 5), (4, 3)], torch.float64)
    copies = copy_params(params)
    optimizer = MultiFrequency(make(two_groups(params)), [1, 3], reduction=reduction)
    fast, slow = make(copies[:1]), make(copies[1:])
    for step in range(7):
        train(optimizer, params, [step])
        fast.zero_grad()
        scale = 1 / 3 if reduction == "mean" else 1.0
        for index, copy in enumerate(copies):
            (copy * gradient(copy, step, index) * (scale if index else 1.0)).sum().backward()
        fast.step()
        if step % 3 == 2:
            slow.step()
            slow.zero_grad()
        torch.testing.assert_close(snapshot(params), snapshot(copies))  # float64: the order of sums


@inner
def test_period_one_is_the_optimizer_itself(make: Make) -> None:
    """Bit for bit, and without a buffer."""
    params = make_params([(6, 4), (3, 5)])
    plain = make(copies := copy_params(params))
    optimizer = MultiFrequency(make(params), [1])
    assert_same(train(optimizer, params, range(4)), train(plain, copies, range(4)))
    assert_same(optimizer.state_dict()["state"], plain.state_dict()["state"])
    assert optimizer.param_groups[0].keys() - plain.param_groups[0].keys() == {"period", "reduction"}


@pytest.mark.parametrize("period", [2, 3, 5])
def test_every_gradient_is_in_exactly_one_chunk(period: int) -> None:
    """Powers of two, so that the sums tell which gradients are in them: the chunks are half-open."""
    optimizer, (fast, slow) = sgd([1, period], reduction="sum")
    for step in range(1, 4 * period + 2):
        give(fast, 2.0**step)
        give(slow, 2.0**step)
        optimizer.step()
        seen = step // period * period  # all up to the last boundary, none after it
        assert -fast[0].item() == 2.0 ** (step + 1) - 2
        assert -slow[0].item() == 2.0 ** (seen + 1) - 2


def test_the_mean_is_of_the_gradients_there_were() -> None:
    """None is not zero: the mean of 3 and 5 is 4, however many steps had no gradient, at the boundary too."""
    optimizer, (fast, slow) = sgd([1, 4])
    for value in (None, 3.0, 5.0, None):
        give(fast, 1.0)
        slow.grad = None if value is None else torch.full_like(slow, value)
        optimizer.step()
        assert (slow.grad is None) == (value is None)
    assert_same(slow.detach(), torch.full_like(slow, -4.0))
    assert_same(fast.detach(), torch.full_like(fast, -4.0))


@pytest.mark.parametrize("learnt", [0, 2])
def test_a_chunk_without_gradients_is_no_step(learnt: int) -> None:
    """No decay, no state, no move, before the first gradient or after some; and the next chunk begins on time."""
    params = make_params([(3,), (4,)])
    optimizer = MultiFrequency(AdamW(two_groups(params), lr=LR, weight_decay=0.5), [1, 2])
    train(optimizer, params, range(learnt))
    before, state = snapshot(params), deepcopy(optimizer.state_dict()["state"].get(1))
    for step in range(2):
        set_grads(params, step)
        params[1].grad = None
        optimizer.step()
    assert_same(params[1].detach(), before[1])
    assert_same(optimizer.state_dict()["state"].get(1), state)
    assert optimizer.param_groups[1]["chunk_step"] == 0
    train(optimizer, params, range(2))
    assert optimizer.state[params[1]]["step"] == 1 + learnt // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_gradients_of_low_precision_are_not_lost(dtype: torch.dtype) -> None:
    """2048 + 1 is 2048 in either; the chunk keeps the ones, and is rounded once: 2048 + 16 ones, an 8th of it."""
    param = nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer = MultiFrequency(SGD([param], lr=1.0), [17], reduction="sum")
    for value in (2048.0, *[1.0] * 16):
        give(param, value)
        optimizer.step()
    assert_same(-param.detach(), torch.full((3,), 2064.0, dtype=dtype))
    assert optimizer.state[param]["chunk_sum"].dtype == torch.float32


@pytest.mark.parametrize("make", [lr_scheduler.LambdaLR, lr_scheduler.OneCycleLR], ids=["LambdaLR", "OneCycleLR"])
def test_schedulers_write_where_the_wrapped_optimizer_reads(make: Any) -> None:
    """They count steps of this optimizer, also those in which nothing is due, and cycle the momentum."""
    params = make_params([(3,), (4,)], torch.float64)
    wrapped = SGD(two_groups(params), lr=LR, momentum=0.9)
    optimizer = MultiFrequency(wrapped, [2, 3])
    copies = copy_params(params)
    parts = [SGD([copy], lr=LR, momentum=0.9) for copy in copies]
    args: dict[str, Any] = {"lr_lambda": lambda step: 0.8**step} if make is lr_scheduler.LambdaLR else {}
    args = args or {"max_lr": 1.0, "total_steps": 9}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns when it sees no step
        schedule = make(optimizer, **args)
        rates = set()
        sums = [torch.zeros_like(copy) for copy in copies]
        for step in range(6):
            rates.add((wrapped.param_groups[1]["lr"], wrapped.param_groups[1]["momentum"]))
            train(optimizer, params, [step])
            for index, (part, copy, total, period) in enumerate(zip(parts, copies, sums, (2, 3), strict=True)):
                total += gradient(copy, step, index) / period
                if (step + 1) % period == 0:
                    part.param_groups[0].update({k: wrapped.param_groups[index][k] for k in ("lr", "momentum")})
                    copy.grad = total.clone()
                    part.step()
                    total.zero_()
            schedule.step()
    torch.testing.assert_close(snapshot(params), snapshot(copies))  # float64: the order of sums
    assert len(rates) == 6


def test_a_step_that_a_loss_scaler_skips_is_no_part_of_a_chunk() -> None:
    """The run with an overflow in mid-chunk is the run without that step."""
    params = make_params([(3,), (4,)])
    plain = MultiFrequency(AdamW(two_groups(copies := copy_params(params)), lr=LR, fused=True), [1, 3])
    optimizer = MultiFrequency(AdamW(two_groups(params), lr=LR, fused=True), [1, 3])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(8):
        optimizer.zero_grad()
        loss = sum((param * gradient(param, step, index)).sum() for index, param in enumerate(params))
        scaler.scale(loss * (torch.inf if step in (1, 4) else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step not in (1, 4):
            train(plain, copies, [step])
        assert_same(snapshot(params), snapshot(copies))


def test_the_closure_is_called_once_in_every_step() -> None:
    """With grad, whatever is due; its gradients are those that count, and its loss is returned."""
    for periods in ([1, 1], [2, 3]):
        params = make_params([(3,), (4,)])
        plain = MultiFrequency(AdamW(two_groups(copies := copy_params(params)), lr=LR), periods)
        optimizer = MultiFrequency(AdamW(two_groups(params), lr=LR), periods)
        calls = []

        def closure(params: list[nn.Parameter] = params, calls: list[bool] = calls) -> Tensor:
            set_grads(params, len(calls))
            calls.append(torch.is_grad_enabled())
            return torch.tensor(float(len(calls)))

        with torch.no_grad():
            assert [optimizer.step(closure).item() for _ in range(4)] == [1.0, 2.0, 3.0, 4.0]
        assert calls == [True] * 4
        assert_same(snapshot(params), train(plain, copies, range(4)))


@inner
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumes_bit_for_bit_in_mid_chunk(make: Make, dtype: torch.dtype) -> None:
    """Saved at every position of the chunk, through a file."""
    for saved in range(1, 8):
        params = make_params([(6, 4), (3, 5), (4, 3)], dtype)
        optimizer = MultiFrequency(make(two_groups(params)), [1, 3])
        train(optimizer, params, range(saved))
        resumed = MultiFrequency(make(two_groups(copies := copy_params(params))), [1, 3])
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"])
        more = range(saved, saved + 4)
        assert_same(train(resumed, copies, more), train(optimizer, params, more))


def test_loading_copies_the_chunk() -> None:
    """A later step must not write into a checkpoint that is held in memory."""
    optimizer, params = sgd([1, 3])
    train(optimizer, params, [0])
    saved = optimizer.state_dict()
    kept = deepcopy(saved["state"])
    resumed, copies = sgd([1, 3])
    resumed.load_state_dict(saved)
    train(resumed, copies, [1])
    assert_same(saved["state"], kept)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_resumes_from_a_distributed_checkpoint_in_mid_chunk(flat: bool) -> None:
    """Saved by name, into an optimizer whose state torch first makes by an empty step, which is no part of a chunk."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def build(model: nn.Module) -> MultiFrequency:
        params = list(model.parameters())
        return MultiFrequency(Momentum([{"params": params[:2]}, {"params": params[2:]}], lr=LR), [1, 4])

    def fit(model: nn.Module, optimizer: MultiFrequency, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model_loss(model, step).backward()
            optimizer.step()

    model = make_model()
    optimizer = build(model)
    fit(model, optimizer, range(6))
    optimizer.zero_grad()
    saved = deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed = build(other := deepcopy(model))
    set_optimizer_state_dict(other, resumed, saved, options=options)
    fit(model, optimizer, range(6, 13))
    fit(other, resumed, range(6, 13))
    assert_same(snapshot(other.parameters()), snapshot(model.parameters()))


def spoiled(name: str, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint that is not this optimizer's."""
    state_dict = deepcopy(state_dict)
    if name == "plain":
        for group in state_dict["param_groups"]:
            del group["period"]
    elif name == "period":
        state_dict["param_groups"][1]["period"] = 4
    elif name == "no chunk":
        del state_dict["state"][1]["chunk_count"]
    elif name == "shape":
        state_dict["state"][1]["chunk_sum"] = torch.zeros(9)
    elif name == "inner":  # which Momentum refuses
        state_dict["state"][1]["exp_avg"] = state_dict["state"][1].pop("memory")
    return state_dict


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "plain",
            "period None in group 1, not 3; a checkpoint made without MultiFrequency is loaded into the optimizer",
        ),
        ("period", "period 4 in group 1, not 3"),
        ("no chunk", r"no chunk of gradients for a parameter of size \(3, 5\)"),
        ("shape", r"chunk_sum of size \(9,\) for a parameter of size \(3, 5\)"),
        ("inner", "has no memory"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_whole(name: str, words: str) -> None:
    """In words, and with nothing half loaded."""
    params = make_params([(6, 4), (3, 5)])
    optimizer = MultiFrequency(Momentum(two_groups(params), lr=LR), [1, 3])
    train(optimizer, params, range(5))
    other = MultiFrequency(Momentum(two_groups(copies := make_params([(6, 4), (3, 5)], seed=1)), lr=LR / 2), [1, 3])
    train(other, copies, range(4))
    before = deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(spoiled(name, optimizer.state_dict()))
    assert_same(other.state_dict()["state"], before["state"])
    assert other.state_dict()["param_groups"] == before["param_groups"]


def test_a_plain_checkpoint_goes_into_the_optimizer_before_it_is_wrapped() -> None:
    """As the refusal says; where nothing is slow, there is nothing to refuse."""
    plain = AdamW(two_groups(params := make_params([(3,), (4,)])), lr=LR)
    train(plain, params, range(3))
    inside = AdamW(two_groups(copies := copy_params(params)), lr=1.0)
    inside.load_state_dict(deepcopy(plain.state_dict()))
    train(MultiFrequency(inside, [1, 2]), copies, range(2))
    assert inside.state[copies[1]]["step"] == 4
    fast = MultiFrequency(AdamW(two_groups(copies := copy_params(params)), lr=1.0))
    fast.load_state_dict(deepcopy(plain.state_dict()))
    assert_same(train(fast, copies, range(3, 5)), train(plain, params, range(3, 5)))


@pytest.mark.parametrize("way", [deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_a_copy_carries_the_chunk_under_way(way: Any) -> None:
    """And shares nothing with the optimizer it was copied from."""
    params = make_params([(3,), (4,)])
    optimizer = MultiFrequency(AdamW(two_groups(params), lr=LR), [1, 3], reduction="sum")
    train(optimizer, params, range(4))
    copy, copies = way((optimizer, params))
    assert copy.reduction == "sum" and copy.param_groups[1]["params"][0] is copies[1]
    after = train(copy, copies, range(4, 8))
    assert_same(train(optimizer, params, range(4, 8)), after)


def test_maximize_is_the_wrapped_optimizers() -> None:
    """The mean is handed over as it is."""
    params = [nn.Parameter(torch.zeros(2))]
    optimizer = MultiFrequency(SGD(params, lr=1.0, maximize=True), [2])
    for value in (1.0, 3.0):
        give(params[0], value)
        optimizer.step()
    assert_same(params[0].detach(), torch.full((2,), 2.0))


def test_a_late_group_begins_its_chunk_when_it_is_added() -> None:
    """In the wrapped optimizer too; with the reduction of the constructor, and period 1 unless it says otherwise."""
    optimizer, params = sgd([1, 3], reduction="sum")
    train(optimizer, params, [0])
    late, later = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    optimizer.add_param_group({"params": [late], "period": 2})
    optimizer.add_param_group({"params": [later]})
    assert optimizer.param_groups is optimizer.optimizer.param_groups and len(optimizer.param_groups) == 4
    moved = []
    for value in (1.0, 2.0, 4.0):
        for param in (*params, late, later):
            give(param, value)
        optimizer.step()
        moved.append((-late[0].item(), -later[0].item()))
    assert moved == [(0.0, 1.0), (3.0, 3.0), (3.0, 7.0)]


@pytest.mark.parametrize("bad", [0, -1, 1.0, 2.5, float("nan"), True, "3", None, torch.tensor(2)], ids=repr)
def test_what_is_no_period_is_refused_before_anything_is_written(bad: Any) -> None:
    """In the constructor's list and dict, in a group, in a late group, and in a group that was changed."""
    params = make_params([(3,), (4,)])
    for periods, key in (([1, bad], 1), ({"slow": bad}, 1), (None, bad)):
        wrapped = SGD(two_groups(params), lr=LR)
        if periods is None:
            wrapped.param_groups[1]["period"] = key
        before = [set(group) for group in wrapped.param_groups]
        with pytest.raises(ValueError, match=r"Invalid period value"):
            MultiFrequency(wrapped, periods)
        assert [set(group) for group in wrapped.param_groups] == before
    optimizer = MultiFrequency(SGD(params[:1], lr=LR))
    with pytest.raises(ValueError, match=r"Invalid period value"):
        optimizer.add_param_group({"params": params[1:], "period": bad})
    assert len(optimizer.param_groups) == 1
    if bad not in (1.0, True):  # which Python takes for 1
        optimizer.param_groups[0]["period"] = bad
        with pytest.raises(ValueError, match=r"Invalid period value"):
            train(optimizer, params, [0])


@pytest.mark.parametrize(
    ("periods", "words"),
    [
        ([2], "1 periods for 2 parameter groups"),
        ([1, 2, 3], "3 periods for 2 parameter groups"),
        ({"slow": 2, "medium": 4}, "no parameter group has the name 'medium'"),
        (4, "Invalid periods: 4"),
        ("12", "Invalid periods: '12'"),
    ],
    ids=str,
)
def test_periods_must_match_the_groups(periods: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sgd(periods)


def test_periods_may_be_named_or_live_in_the_groups() -> None:
    """A name may stand for several groups; what is not named keeps what it has."""
    params = make_params([(1,), (2,), (3,), (4,)])
    groups = [{"params": [param], "name": name} for param, name in zip(params, "abac", strict=True)]
    groups[1]["period"] = 5
    assert [g["period"] for g in MultiFrequency(SGD(groups, lr=LR), {"a": 2}).param_groups] == [2, 5, 2, 1]


@pytest.mark.parametrize(
    ("wrapped", "error", "words"),
    [
        (lambda p: p, TypeError, "wraps a torch optimizer without periods, got list"),
        (lambda p: MultiFrequency(SGD(p, lr=LR)), TypeError, "without periods, got MultiFrequency"),
        (lambda p: torch.optim.LBFGS(p), ValueError, "LBFGS calls its closure itself"),
        (lambda p: AdamW([{"params": p, "period": 2}], differentiable=True), RuntimeError, "differentiable"),
    ],
    ids=["list", "nested", "LBFGS", "differentiable"],
)
def test_what_cannot_be_wrapped_is_refused_in_words(wrapped: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MultiFrequency(wrapped(make_params([(3,)])))


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid reduction: 'max'"):
        sgd([1, 2], reduction="max")
    with pytest.raises(ValueError, match="Invalid reduction: 'max'"):
        sgd([1, 2])[0].add_param_group({"params": make_params([(3,)]), "reduction": "max"})


def test_the_reduction_may_differ_between_groups() -> None:
    """It is a key of groups like any other."""
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "reduction": "sum"}]
    optimizer = MultiFrequency(SGD(groups, lr=1.0), [2, 2])
    for value in (1.0, 3.0):
        for param in params:
            give(param, value)
        optimizer.step()
    assert [-param[0].item() for param in params] == [2.0, 4.0]


def test_a_group_that_came_in_past_it_is_refused_at_the_next_step() -> None:
    """And so are the periods that are lost when a checkpoint is loaded into the wrapped optimizer alone."""
    optimizer, params = sgd([1, 2])
    plain = SGD(two_groups(copy_params(params)), lr=1.0).state_dict()
    optimizer.optimizer.add_param_group({"params": make_params([(3,)])})
    for _ in range(2):
        with pytest.raises(ValueError, match="a parameter group has no period"):
            train(optimizer, params, [0])
        optimizer, params = sgd([1, 2])
        optimizer.optimizer.load_state_dict(plain)


def test_a_rate_of_zero_is_no_reason_to_step() -> None:
    """Only the empty step that makes state is no part of a chunk: no gradient, no rate, and no state before it."""
    optimizer, (fast, slow) = sgd([1, 3], reduction="sum")
    for step, (lr, value) in enumerate(((0.0, 1.0), (0.0, 0.0), (1.0, 4.0))):  # a warm-up from nothing
        for group in optimizer.param_groups:
            group["lr"] = lr
        give(fast, value)
        give(slow, value)
        optimizer.step()
        assert optimizer.param_groups[1]["chunk_step"] == (step + 1) % 3
    assert_same([fast.detach(), slow.detach()], [torch.full_like(fast, -4.0), torch.full_like(slow, -5.0)])


def test_gradients_that_carry_a_graph_leave_it_behind() -> None:
    """As after backward(create_graph=True): a chunk would hold on to every graph in it."""
    optimizer, (fast, slow) = sgd([1, 3])
    for _ in range(4):
        for param in (fast, slow):
            param.grad = (param.square() + 1.0) * 1.0
            assert param.grad.requires_grad
        optimizer.step()
        assert not optimizer.state[slow]["chunk_sum"].requires_grad
    assert slow.is_leaf and optimizer.state[slow]["chunk_count"] == 1


def test_saving_leaves_no_hook_behind() -> None:
    """A hook that is put first after a save still has its say in the next."""
    optimizer, _ = sgd([1, 3])
    optimizer.state_dict()
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "epoch": 4}, prepend=True)
    assert optimizer.state_dict()["epoch"] == 4


def test_a_load_hook_may_write_into_the_dict_it_is_given() -> None:
    """It is a shallow copy, as with any torch optimizer."""
    optimizer, params = sgd([1, 3])
    train(optimizer, params, [0])
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda o, given: given.update(state={}))
    optimizer.load_state_dict(saved)
    assert saved["state"] and not optimizer.state


def test_hooks_of_both_run_around_saving_and_loading() -> None:
    """Those of this optimizer see all of it; those of the wrapped one see what it sees without chunks."""
    optimizer, params = sgd([1, 3])
    train(optimizer, params, [0])
    calls: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(("pre", o)))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "outer": "inner" in saved})
    optimizer.optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "inner": True})
    saved = optimizer.state_dict()
    assert calls == [("pre", optimizer)] and saved["outer"] is True
    assert saved["state"][1]["chunk_count"] == 1

    resumed, copies = sgd([1, 3])
    resumed.register_load_state_dict_pre_hook(lambda o, given: {**given, "state": {1: halved(given["state"][1])}})
    resumed.optimizer.register_load_state_dict_pre_hook(lambda o, given: calls.append(given["state"]))
    resumed.register_load_state_dict_post_hook(lambda o: calls.append(o.state[copies[1]]["chunk_sum"].clone()))
    resumed.load_state_dict(saved)
    assert calls[1] == {}
    assert_same(calls[2], params[1].grad / 2)
    assert_same(optimizer.state[params[1]]["chunk_sum"], params[1].grad)  # the dict given stays whole


def halved(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "chunk_sum": state["chunk_sum"] / 2}


def test_sparse_gradients_belong_to_groups_of_period_one() -> None:
    """A slow group refuses them before anything is written; a fast one leaves them to the wrapped optimizer."""
    params = make_params([(4, 3), (4, 3)])
    optimizer = MultiFrequency(SGD(two_groups(params), lr=LR), [1, 2])
    before = snapshot(params)
    set_grads(params, 0)
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients in a group with period=2"):
        optimizer.step()
    assert_same(snapshot(params), before)
    assert not optimizer.state and optimizer.param_groups[1]["chunk_step"] == 0
    set_grads(params, 0)
    params[0].grad = params[0].grad.to_sparse()
    optimizer.step()
    assert not torch.equal(params[0].detach(), before[0])


class Moody(Optimizer):
    """Descends, unless told to fail; counts its steps in the groups, as many optimizers outside torch do."""

    fails = ""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self.fails == "before":
            raise RuntimeError("moody")
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                assert "chunk_sum" not in self.state[param]
                param -= param.grad
                param.grad.zero_()  # neither is its own to write or to free
                param.grad = None
        if self.fails == "after":
            raise RuntimeError("moody")


@pytest.mark.parametrize("missing", [False, True], ids=["all gradients", "one missing"])
@pytest.mark.parametrize("when", ["before", "after"])
@reduction
def test_an_error_inside_loses_nothing(when: str, missing: bool, reduction: Any) -> None:
    """The chunk is as it was, so that the same step can be taken again; gradients and groups are in their places."""
    params = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(3)]
    groups = [{"params": [param], "period": period} for param, period in zip(params, (2, 3, 4), strict=True)]
    optimizer = MultiFrequency(Moody(groups), reduction=reduction)
    for step in range(3):
        for param in params:
            give(param, 2.0**step)
        if missing and step == 2:
            params[1].grad = None
        if step == 2:  # the second group is due
            before = deepcopy(optimizer.state_dict())
            grads = [param.grad for param in params]
            optimizer.optimizer.fails = when
            with pytest.raises(RuntimeError, match="moody"):
                optimizer.step()
            assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
            after = optimizer.state_dict()
            for group in (*before["param_groups"], *after["param_groups"]):
                group.pop("step", None)
            assert_same(after["state"], before["state"])
            assert after["param_groups"] == before["param_groups"]
            optimizer.optimizer.fails = ""
        if step < 2 or when == "before":
            optimizer.step()
    total = 3.0 if missing else 7.0
    count = 1 if reduction == "sum" else 2 if missing else 3
    assert [-param[0].item() for param in params] == [3.0 if reduction == "sum" else 1.5, total / count, 0.0]


def test_the_wrapped_optimizer_sees_what_is_due_and_nothing_else() -> None:
    """Its groups, the mean in p.grad, no chunk in its state; and it is left alone when nothing is due."""
    params = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)]
    groups = [{"params": [param], "period": period} for param, period in zip(params, (2, 3), strict=True)]
    optimizer = MultiFrequency(Moody(groups))
    seen: list[list[tuple[int, float]]] = []
    optimizer.optimizer.register_step_pre_hook(
        lambda wrapped, *_: seen.append([(g["period"], g["params"][0].grad[0].item()) for g in wrapped.param_groups])
    )
    for step in range(1, 7):
        for param in params:
            give(param, step)
        optimizer.step()
        assert all(param.grad[0] == step for param in params)
    assert seen == [[(2, 1.5)], [(3, 2.0)], [(2, 3.5)], [(2, 5.5), (3, 5.0)]]
    assert [group["step"] for group in optimizer.param_groups] == [3, 2]


def test_a_period_may_change_during_training() -> None:
    """A chunk ends once it is long enough; at period 1 nothing of it is left behind, and a new one may begin."""
    optimizer, (fast, slow) = sgd([1, 4], reduction="sum")
    moved = []
    for step, period in enumerate((4, 4, 3, 3, 1, 1, 2, 2)):
        optimizer.param_groups[1]["period"] = period
        give(fast, 1.0)
        give(slow, 2.0**step)
        optimizer.step()
        moved.append(-slow[0].item())
        assert (slow in optimizer.state) == ("chunk_step" in optimizer.param_groups[1]) == (period != 1)
    assert moved == [0, 0, 7, 7, 31, 63, 63, 255]


def test_resetting_the_state_reaches_the_wrapped_optimizer() -> None:
    """Between tasks, users write `optimizer.state = defaultdict(dict)`."""
    params = make_params([(3,), (4,)])
    optimizer = MultiFrequency(AdamW(two_groups(params), lr=LR), [1, 2])
    train(optimizer, params, range(4))
    optimizer.state = defaultdict(dict)
    fresh = MultiFrequency(AdamW(two_groups(copies := copy_params(params)), lr=LR), [1, 2])
    assert_same(train(optimizer, params, range(3)), train(fresh, copies, range(3)))


def test_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would replay one answer to which groups are due; groups of period 1 are the wrapped optimizer's affair."""
    monkeypatch.setattr("deep_optim.optimizers.multi_frequency.capturing", lambda param: True)
    train(*sgd([1, 1]), steps=[0])
    with pytest.raises(RuntimeError, match="which a CUDA graph cannot hold"):
        train(*sgd([1, 2]), steps=[0])


@pytest.mark.parametrize("make", [INNER["AdamW"], INNER["Momentum"]], ids=["AdamW", "Momentum"])
def test_compiled_with_one_graph_for_each_set_of_groups_that_are_due(make: Make) -> None:
    """The first step of a group makes its state; nothing is compiled again once every set has been seen."""
    torch._dynamo.reset()
    params = make_params([(6, 4), (3, 5), (4, 3)], torch.float64)
    copies = copy_params(params)
    optimizer, eager = (MultiFrequency(make(two_groups(each)), [1, 3]) for each in (params, copies))
    for each in (optimizer, eager):
        for group in each.param_groups:
            group["lr"] = torch.tensor(LR)
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(lambda: optimizer.step(), backend=counter)
    graphs, frames = [], []
    for index in range(10):
        set_grads(params, index)
        step()
        train(eager, copies, [index])
        graphs.append(counter.frame_count)
        frames.append(torch._dynamo.utils.counters["frames"]["total"])  # compiled or tried
        # under torch.compile bias corrections are computed in float32
        torch.testing.assert_close(snapshot(params), snapshot(copies), rtol=1.3e-6, atol=1e-5)
    assert graphs[0] == 1 and graphs[-1] == graphs[4] <= 3
    assert frames[-1] == frames[4]
    torch._dynamo.reset()


def test_trains_the_groups_of_a_model() -> None:
    """With this package's optimizers and groups: matrices slow, everything else fast."""
    model = make_model()
    groups = param_groups(model)
    groups[0]["period"] = 4
    optimizer = MultiFrequency(Momentum(groups, lr=0.05))
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = model_loss(model, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(isinstance(each, Optimizer) for each in (optimizer, optimizer.optimizer))
    assert "MultiFrequency(Momentum (" in repr(optimizer) and "period: 4" in repr(optimizer)
