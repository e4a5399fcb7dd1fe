"""What every optimizer owes torch.compile: the same steps, and no new compilation for each of them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cases import LR, Case, every
from problem import copy_params, make_params, set_grads, snapshot, train


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Compile nothing on account of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(optimizer: Any, backend: str) -> tuple[Callable[[], None], CompileCounterWithBackend]:
    """Return a compiled step, and what counts the graphs made for it."""
    counter = CompileCounterWithBackend(backend)

    @torch.compile(backend=counter)
    def step() -> None:
        optimizer.step()

    return step, counter


def assert_close_to_eager(params: list[torch.Tensor], eager: list[torch.Tensor]) -> None:
    """Under torch.compile the step counter, and so the bias correction, is computed in float32."""
    torch.testing.assert_close(snapshot(params), snapshot(eager), rtol=1.3e-6, atol=1e-5)


@every("path")
def test_compiled_to_one_graph_that_equals_eager(case: Case) -> None:
    """A new rate in the same tensor is data, not code: nothing is split, nothing is compiled again."""
    params = make_params([(6, 4), (7,), (), (4, 3, 2, 2)], torch.float64)  # tall, a vector, a scalar, wide
    copies = copy_params(params)
    optimizer, eager = (case.make(each, lr=torch.tensor(LR)) for each in (params, copies))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in (optimizer, eager)]
    step, counter = compiled(optimizer, "eager")
    graphs = []
    for index in range(3):
        set_grads(params, index)
        step()
        train(eager, copies, [index])
        assert_close_to_eager(params, copies)
        graphs.append(counter.frame_count)
        for schedule in schedules:
            schedule.step()
    assert graphs == [1] * 3, f"graphs made after each step: {graphs}"


@every("class")
def test_compiled_follows_gradients_that_come_and_go(case: Case) -> None:
    """No gradient, or nothing but zeros, is a fact about one step, not about the graph made at it."""
    params = make_params(dtype=torch.float64)
    optimizer, eager = case.make(params), case.make(copies := copy_params(params))
    step, _ = compiled(optimizer, "eager")
    for index in range(5):
        for tensors in (params, copies):
            set_grads(tensors, index)
            if index == 0:
                tensors[0].grad = tensors[2].grad = None
                tensors[1].grad.zero_()
            if index == 3:
                tensors[4].grad = None
        step()
        eager.step()
        assert_close_to_eager(params, copies)


@every("class")
def test_compiled_by_aot_autograd(case: Case) -> None:
    """The graph also passes the functionalisation that Inductor builds on.

    Without a 0-d parameter, whose AdamW state torch 2.13 loses under this backend.
    """
    params = make_params([(4, 3, 2, 2), (7,)], torch.float64)
    optimizer, eager = case.make(params), case.make(copies := copy_params(params))
    step, _ = compiled(optimizer, "aot_eager")
    for index in range(2):
        set_grads(params, index)
        step()
    train(eager, copies, range(2))
    assert_close_to_eager(params, copies)
