"""Update frequencies against loops written by hand, and in the places where a chunk could be lost or counted twice."""

import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from deep_optim import MultiFrequency
from periods import INNER, LR, Make, give, inner, reduction, sgd, two_groups
from problem import (
    assert_same,
    copy_params,
    gradient,
    make_params,
    set_grads,
    snapshot,
    train,
)


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


def test_maximize_is_the_wrapped_optimizers() -> None:
    """The mean is handed over as it is."""
    params = [nn.Parameter(torch.zeros(2))]
    optimizer = MultiFrequency(SGD(params, lr=1.0, maximize=True), [2])
    for value in (1.0, 3.0):
        give(params[0], value)
        optimizer.step()
    assert_same(params[0].detach(), torch.full((2,), 2.0))


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
