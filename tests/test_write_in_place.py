"""Optimizers by kernels that go by addresses, against the same optimizers in plain torch, on stacks."""

import pytest
import torch
from torch.nn import Parameter

from cases import CASES, Case
from deep_optim import DMGD, M3, DeltaMomentum, Momentum
from deep_optim.ops import addresses, delta_momentum, descend, mixed_descent, momentum
from deep_optim.ops.backend import HAS_TRITON
from deep_optim.optimizers import in_place
from problem import copy_params, gradient, make_params

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

ASKING = (delta_momentum, descend, mixed_descent, momentum, in_place)  # modules that ask `addressable`
OURS = [case for case in CASES if not case.control and case.group.get("rule") != "adamw"]


def by_kernels(monkeypatch, wanted):
    """Have "auto" take the kernels wherever they can run, in the interpreter too, or nowhere; count what was taken."""
    taken = []

    def addressable(written, read, backend):
        if not wanted:
            return False
        try:
            fits = addresses.addressable(written, read, "triton")
        except RuntimeError:
            fits = False
        taken.append(fits)
        return fits

    for module in ASKING:
        monkeypatch.setattr(module, "addressable", addressable)
    return taken


def train(case, params, steps=4):
    optimizer = case.make(params)
    for step in range(steps):
        for index, param in enumerate(params):
            param.grad = gradient(param, step, index).to(param.device)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.id)
def test_both_take_the_same_steps(case: Case, triton_device, monkeypatch):
    """Weights and state, after steps enough for a chunk and its warm-up."""
    start = [Parameter(param.detach().to(triton_device)) for param in make_params(((6, 4), (4, 6), (6, 4), (3, 5, 2)))]
    ours, plain = copy_params(start), copy_params(start)
    taken = by_kernels(monkeypatch, True)
    first = train(case, ours)
    assert any(taken)
    by_kernels(monkeypatch, False)
    second = train(case, plain)
    tolerance = 2e-2 if triton_device == "cuda" else 1e-4  # products in half precision, or in float32
    for our, other, begin in zip(ours, plain, start, strict=True):
        assert (our - other).norm() <= tolerance * (other - begin).norm()
        for name, value in first.state[our].items():
            torch.testing.assert_close(value, second.state[other][name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("output", ["newton_schulz", "identity"])
@pytest.mark.parametrize("cls", [Momentum, DeltaMomentum, DMGD, M3], ids=lambda cls: cls.__name__)
def test_an_equation_of_ones_own_is_not_passed_over(cls, output, triton_device, monkeypatch):
    """A subclass that overrides `update`, `features` or `output`, or inherits another, is stepped by what it says."""

    class Update:
        def update(self, written, state, group):
            seen.append("update")
            return super().update(written, state, group)

    class Own(cls):
        def update(self, written, state, group):
            seen.append("update")
            return super().update(written, state, group)

    class Features(cls):
        def features(self, grad, state, group):
            seen.append("features")
            return super().features(grad, state, group)

    class Output(cls):
        def output(self, direction, written, state, group):
            seen.append("output")
            return super().output(direction, written, state, group)

    class Mixed(Update, cls):
        pass

    by_kernels(monkeypatch, True)
    options = {} if cls is M3 else {"output": output}
    for own in (Own, Features, Output, Mixed):
        seen = []
        param = Parameter(torch.ones(6, 4, device=triton_device))
        param.grad = torch.ones_like(param)
        own([param], **options).step()
        assert seen


def test_kernels_of_ones_own_are_not_passed_over(triton_device, monkeypatch):
    """A subclass with another equation and kernels for it, of a class that takes the weights along in its own."""

    class Mine(DeltaMomentum):
        def update(self, written, state, group):
            return torch.full_like(written, -1.0)

        def writes_in_place(self, group):
            return True

        def write_in_place(self, grads, states, group):
            return torch.full((len(grads), *grads[0].shape), -1.0, device=grads[0].device)

    for wanted in (True, False):
        by_kernels(monkeypatch, wanted)
        param = Parameter(torch.ones(6, 4, device=triton_device))
        param.grad = torch.ones_like(param)
        Mine([param], lr=1.0, weight_decay=0.0, output="identity").step()
        assert torch.equal(param, torch.full_like(param, 2.0))


@torch.no_grad()
def test_weights_that_share_memory_are_not_written_in_parallel(triton_device, monkeypatch):
    """They are stepped one by one, and a stack of them is not `addressable`; neighbours in one buffer are."""
    taken = by_kernels(monkeypatch, True)
    buffer = torch.randn(48, device=triton_device)
    first, overlapping, neighbour = (Parameter(buffer[start : start + 24].view(6, 4)) for start in (0, 12, 24))
    for other, stacked in ((overlapping, [True, True]), (neighbour, [True])):
        taken.clear()
        for param in (first, other):
            param.grad = torch.ones_like(param)
        Momentum([first, other]).step()
        assert taken == stacked
        assert addresses.addressable([first, other], [], "triton") == (other is neighbour)


def test_memories_that_an_option_left_without_a_slow_one_are_stepped_apart(triton_device, monkeypatch):
    """M3 whose alpha became 0 before one parameter had its first gradient: it is another kind of memory."""
    for wanted in (True, False):
        by_kernels(monkeypatch, wanted)
        params = [Parameter(torch.ones(6, 4, device=triton_device)) for _ in range(2)]
        optimizer = M3(params, lr=0.1)
        for step in range(3):
            params[0].grad = gradient(params[0], step, 0).to(triton_device)
            if step == 2:
                optimizer.param_groups[0]["alpha"] = 0.0
                params[1].grad = gradient(params[1], step, 1).to(triton_device)
            optimizer.step()
        assert "slow.answer" in optimizer.state[params[0]] and "slow.answer" not in optimizer.state[params[1]]
        assert not torch.equal(params[1], torch.ones_like(params[1]))


@pytest.mark.parametrize(
    "cls, options",
    [
        (Momentum, {}),
        (Momentum, {"output": "identity"}),
        (DeltaMomentum, {}),
        (DeltaMomentum, {"output": "identity"}),
        (DMGD, {}),
        (M3, {}),
        (M3, {"mix": "pre"}),
        (M3, {"alpha": 0.0}),
    ],
    ids=str,
)
def test_each_stack_is_asked_about_once_in_a_step(cls, options, triton_device, monkeypatch):
    taken = by_kernels(monkeypatch, True)
    params = [Parameter(param.detach().to(triton_device)) for param in make_params(((4, 6), (6, 4), (4, 6), (6, 4)))]
    train(Case("", cls, options), params, steps=3)
    assert taken == [True] * 2 * 3


BY_NAME = [(cls, output) for cls in (DeltaMomentum, DMGD) for output in ("identity", "newton_schulz")]
MIXED = ((7,), (4, 6), (6, 4), (4, 6))


@pytest.mark.parametrize("cls, output", BY_NAME)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_asked_for_by_name_step_half_precision_too(cls, output, dtype, triton_device):
    """Its memories are in float32, and the kernels that are handed stacks see it in float32."""
    start = [param.detach().to(triton_device) for param in make_params(MIXED)]
    start[2] = start[2].to(dtype)
    ours, plain = ([Parameter(param.clone()) for param in start] for _ in range(2))
    for params, backend in ((ours, "triton"), (plain, "reference")):
        optimizer = cls(params, lr=0.1, output=output, backend=backend)
        for step in range(3):
            for index, param in enumerate(params):
                param.grad = gradient(param, step, index).to(param)
            optimizer.step()
    for our, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(our, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("cls, output", BY_NAME)
@pytest.mark.parametrize("reason", ["in_dtypes=False", "on_cuda=False", "plain=False"])
def test_what_kernels_asked_for_by_name_cannot_step_is_refused_before_anything_moves(
    cls, output, reason, triton_device, monkeypatch
):
    class Subclass(torch.Tensor):
        pass

    params = [Parameter(param.detach().to(triton_device)) for param in make_params(MIXED)]
    if reason == "in_dtypes=False":
        params[2] = Parameter(params[2].detach().double())
    elif reason == "on_cuda=False":
        params[2] = Parameter(params[2].detach().cpu())
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for index, param in enumerate(params):
        param.grad = gradient(param, 0, index).to(param.device)
    if reason == "plain=False":
        params[2].grad = params[2].grad.as_subclass(Subclass)
    before = [param.detach().clone() for param in params]
    optimizer = cls([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, output=output, backend="triton")
    with pytest.raises(RuntimeError, match=f"{reason}.*nothing has been stepped.*backend='auto'"):
        optimizer.step()
    assert all(map(torch.equal, params, before)) and not any(optimizer.state.values())
    for group in optimizer.param_groups:
        group["backend"] = "auto"
    optimizer.step()
    assert not any(map(torch.equal, params, before))
