"""What a CUDA graph asks of an optimizer: a step that waits for nothing, in the same memory every time.

What can be seen without a GPU is tested without one: a step on the meta device, whose tensors have no values, can ask
none of them anything.
"""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from cases import CASES, LR, Case, every
from problem import SHAPES, copy_params, gradient, make_params, set_grads

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

# MultiFrequency decides on the host which groups are due, and refuses a graph.
CAPTURABLE = [case for case in CASES if case.group.get("period", 1) == 1]
capturable = pytest.mark.parametrize("case", CAPTURABLE, ids=lambda case: case.id)

# torch's AdamW refuses the meta device, so that what it steps is left out.
ON_META = [case for case in CAPTURABLE if not case.control and case.group.get("rule") != "adamw"]


def has_memory(shape: tuple[int, ...], case: Case) -> bool:
    return len(shape) > 1 or case.kwargs.get("output") == "identity"


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the optimizers believe that a graph is recording: only then may one leave its questions out."""
    for module in ("base", "dmgd"):
        monkeypatch.setattr(f"deep_optim.optimizers.{module}.capturing", lambda param: True)


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("case", ON_META, ids=lambda case: case.id)
def test_a_step_asks_the_device_nothing(case: Case) -> None:
    """From the first step on, on which state is made, and with a rate that only the device knows."""
    params = [Parameter(torch.empty(shape, device="meta")) for shape in SHAPES if has_memory(shape, case)]
    optimizer = case.make(params, capturable=True)
    for group in optimizer.param_groups:
        group["lr"] = torch.empty((), device="meta")
    for _ in range(3):
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
    for param in params:
        assert {name: tensor.device.type for name, tensor in optimizer.state[param].items()} == dict.fromkeys(
            optimizer.state[param], "meta"
        )


@every()
def test_what_is_written_stays_where_it_is_and_says_so(case: Case) -> None:
    """A graph writes to the addresses it has seen; autograd refuses a backward pass through what has changed."""
    optimizer, params = case.mid_training()
    tensors = {(i, name): t for i, param in enumerate(params) for name, t in optimizer.state[param].items()}
    tensors |= {(i, "param"): param for i, param in enumerate(params)}
    before = {key: (tensor.data_ptr(), tensor._version, tensor.detach().clone()) for key, tensor in tensors.items()}
    set_grads(params, step=3)
    optimizer.step()
    for (i, name), tensor in tensors.items():
        address, version, value = before[i, name]
        assert (params[i] if name == "param" else optimizer.state[params[i]][name]) is tensor
        assert tensor.data_ptr() == address
        assert torch.equal(tensor, value) or tensor._version > version, (i, name)


class Training:
    """An optimizer on the GPU with gradients that stay where they are, and a copy of it that no graph has seen."""

    def __init__(self, case: Case, lr: float | Tensor) -> None:
        self.params = [Parameter(param.detach().cuda()) for param in make_params(SHAPES)]
        self.copies = copy_params(self.params)
        for param in (*self.params, *self.copies):
            param.grad = torch.zeros_like(param)
        rates = [lr.clone() if isinstance(lr, Tensor) else lr for _ in range(2)]
        self.optimizer, self.eager = (
            case.make(params, capturable=True, lr=rate)
            for params, rate in zip((self.params, self.copies), rates, strict=True)
        )

    def set_grads(self, params: Iterable[Tensor], step: int) -> None:
        for index, param in enumerate(params):
            assert param.grad is not None
            param.grad.copy_(gradient(param, step, index))

    def step(self, steps: Iterable[int]) -> None:
        """Step both."""
        for step in steps:
            for params, optimizer in ((self.params, self.optimizer), (self.copies, self.eager)):
                self.set_grads(params, step)
                optimizer.step()

    def capture(self) -> torch.cuda.CUDAGraph:
        """Warm up on a stream of its own, as torch's documentation asks, and record one step, which does not run."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(range(3))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.optimizer.step()
        return graph

    def assert_alike(self) -> None:
        for param, copy in zip(self.params, self.copies, strict=True):
            torch.testing.assert_close(param, copy)
            for name, tensor in self.optimizer.state[param].items():
                torch.testing.assert_close(tensor, self.eager.state[copy][name], msg=name)


@needs_cuda
@pytest.mark.usefixtures("recording")
@capturable
def test_a_step_on_the_gpu_waits_for_nothing(case: Case) -> None:
    training = Training(case, torch.tensor(LR, device="cuda"))
    training.step(range(2))
    try:
        torch.cuda.set_sync_debug_mode("error")
        training.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@capturable
def test_a_replayed_step_equals_an_eager_one(case: Case) -> None:
    training = Training(case, LR)
    graph = training.capture()
    for step in range(3, 8):
        training.set_grads(training.params, step)
        graph.replay()
        training.set_grads(training.copies, step)
        training.eager.step()
        training.assert_alike()


@needs_cuda
@capturable
def test_a_rate_on_the_device_takes_effect_between_replays(case: Case) -> None:
    training = Training(case, torch.tensor(LR, device="cuda"))
    graph = training.capture()
    for step, lr in ((3, LR), (4, LR / 4), (5, 0.0), (6, 2 * LR)):
        before = [param.detach().clone() for param in training.params]
        for optimizer in (training.optimizer, training.eager):
            for group in optimizer.param_groups:
                group["lr"].fill_(lr)
        training.set_grads(training.params, step)
        graph.replay()
        training.set_grads(training.copies, step)
        training.eager.step()
        training.assert_alike()
        assert all(map(torch.equal, training.params, before)) == (lr == 0)


@needs_cuda
@every("class")
def test_an_optimizer_not_made_for_it_refuses_to_be_captured(case: Case) -> None:
    params = [Parameter(param.detach().cuda()) for param in make_params(SHAPES)]
    optimizer = case.make(params)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"capturable|CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
