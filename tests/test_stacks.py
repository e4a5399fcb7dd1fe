"""Which parameters are stepped together: those of one shape, unless they may share memory."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from deep_optim import DMGD, M3, Momentum
from deep_optim.ops.addresses import apart
from deep_optim.optimizers.stacks import stacks
from problem import gradient, make_params, set_grads, train

BUFFER = torch.zeros(200)


def every_fifth(start: int, buffer: Tensor = BUFFER) -> Tensor:
    """4 × 5 entries of the buffer: 96 from the first to the last."""
    return buffer.as_strided((4, 5), (25, 5), start)


SHARING = {
    "twice the same": (every_fifth(0), every_fifth(0)),
    "strided, in half": (every_fifth(0), every_fifth(50)),
    "strided, by one entry": (every_fifth(0), every_fifth(95)),
    "contiguous and strided": (BUFFER[:20].view(4, 5), every_fifth(19)),
    "the third with the first": (every_fifth(0), BUFFER[120:140].view(4, 5), every_fifth(60)),
    "transposed": (BUFFER[:20].view(5, 4).mT, BUFFER[19:39].view(4, 5)),
}
APART = {
    "contiguous neighbours": (BUFFER[20:40].view(4, 5), BUFFER[:20].view(4, 5)),
    "strided neighbours": (every_fifth(0), every_fifth(96)),
    "transposed neighbours": (BUFFER[:20].view(5, 4).mT, BUFFER[20:40].view(4, 5)),
    "storages of their own": (torch.zeros(4, 5), torch.zeros(4, 5)),
}


def test_what_these_views_share_is_what_the_test_says() -> None:
    """By the place of every entry."""
    for pairs, shared in ((SHARING, True), (APART, False)):
        for name, views in pairs.items():
            storages = {view.untyped_storage().data_ptr() for view in views}
            reached = [_entries(view) for view in views] if len(storages) == 1 else [set()]
            assert (len(set.union(*reached)) < sum(map(len, reached))) == shared, name


def _entries(view: Tensor) -> set[int]:
    (m, n), (row, col) = view.shape, view.stride()
    return {view.storage_offset() + i * row + j * col for i in range(m) for j in range(n)}


@pytest.mark.parametrize("name", SHARING)
def test_tensors_that_share_memory_are_stepped_one_by_one(name: str) -> None:
    views = list(SHARING[name])
    assert not apart(views)
    assert [len(stacked) for stacked in stacks(views)] == [1] * len(views)


def test_strided_views_between_one_another_are_taken_to_share_memory() -> None:
    """They do not; nothing but time is lost."""
    assert not apart([every_fifth(0), every_fifth(1)])


def test_strided_views_that_share_memory_move_as_each_would_alone() -> None:
    ours, theirs = (torch.linspace(-1, 1, 200) for _ in range(2))
    together, alone = ([Parameter(every_fifth(start, buffer)) for start in (0, 50)] for buffer in (ours, theirs))
    for params in (together, alone):
        for index, param in enumerate(params):
            param.grad = gradient(param, 0, index)
    for optimizer in (Momentum(together, lr=0.1), *(Momentum([param], lr=0.1) for param in alone)):
        optimizer.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", APART)
def test_tensors_that_share_none_are_stepped_together(name: str) -> None:
    views = list(APART[name])
    assert apart(views)
    with_others = [*views, *(torch.zeros(4, 5) for _ in range(2))]
    assert [len(stacked) for stacked in stacks(with_others)] == [4]


class Copies(TorchDispatchMode):
    """The operations that copy, of one tensor or of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += [name for name in ("copy_", "_foreach_copy_") if func.overloadpacket.__name__ == name]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "cls, options, names",
    [
        (Momentum, {"output": "adam"}, ["memory", "exp_avg_sq"]),
        (DMGD, {"hidden_lr": 0.1, "hidden_dim": 2}, ["memory.linear", "memory.w1", "memory.w2"]),
        (M3, {"chunk_size": 2}, ["slow.answer", "memory", "exp_avg_sq"]),
    ],
)
def test_a_stack_is_taken_apart_by_one_operation_for_each_name(
    cls: type[Optimizer], options: dict[str, Any], names: list[str]
) -> None:
    """And M3's chunks begin so; an operation for each of 48 matrices would be most of a step that a GPU waits for."""
    params = make_params([(6, 4)] * 8)
    optimizer = cls(params, **options)
    train(optimizer, params, range(2))
    set_grads(params, 2)  # the first of a chunk
    with Copies() as copies:
        optimizer.step()
    assert copies.seen == ["_foreach_copy_"] * len(names)
