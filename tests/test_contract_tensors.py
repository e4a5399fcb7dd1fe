"""Which tensors every optimizer takes: any rank, any size, any layout, any real dtype; the others it refuses whole."""

import pytest
import torch
from torch.nn import Parameter

from cases import Case, every
from problem import SHAPES, assert_same, copy_params, gradient, make_params, set_grads, snapshot, train

SINGLE = {
    "0-d": (),
    "one element": (1,),
    "vector": (7,),
    "empty vector": (0,),
    "empty rows": (0, 3),
    "empty columns": (3, 0),
    "1x1": (1, 1),
    "one row": (1, 6),
    "one column": (6, 1),
    "3-d": (2, 3, 4),
    "4-d": (3, 2, 2, 3),
    "5-d": (2, 1, 2, 3, 2),
}


@every()
@pytest.mark.parametrize("shape", SINGLE.values(), ids=SINGLE)
def test_every_shape_trains(case: Case, shape: tuple[int, ...]) -> None:
    """Finite, moved, and of the shape, strides and dtype it had."""
    params = [make_params([shape], dtype)[0] for dtype in (torch.float32, torch.bfloat16)]
    before = snapshot(params)
    train(case.make(params, lr=0.25), params, range(3))  # large enough for bfloat16 to see
    for param, old in zip(params, before, strict=True):
        assert (param.shape, param.stride(), param.dtype) == (old.shape, old.stride(), old.dtype)
        assert param.isfinite().all()
        assert param.numel() == 0 or not torch.equal(param.detach(), old)


@every()
def test_a_parameter_moves_as_it_would_alone(case: Case) -> None:
    """Neighbours of its own shape change nothing, in whatever order they come."""
    params = make_params([(4, 3)] * 3 + [(5,)] * 2 + [(2, 2, 3)] * 2, torch.float64)
    copies, reverse = copy_params(params), copy_params(params)
    together = train(case.make(params), params, range(3))
    alone = train([case.make([copy]) for copy in copies], copies, range(3))
    torch.testing.assert_close(together, alone)  # float64: a batched product may sum in another order
    torch.testing.assert_close(train(case.make(reverse[::-1]), reverse, range(3)), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every()
def test_parameters_that_overlap_move_one_after_another(case: Case, dtype: torch.dtype) -> None:
    """Views of one buffer: not all at once, where the later would undo what the earlier did to what they share."""
    if case.control or case.group.get("rule") == "adamw":
        pytest.skip("torch's own descend all at once, and its kernels race")
    ours, theirs = (torch.linspace(-1, 1, 40).to(dtype) for _ in range(2))
    views = lambda buffer: [Parameter(buffer[start : start + 24].view(6, 4)) for start in (0, 8, 16)]  # noqa: E731
    together, alone = views(ours), views(theirs)
    optimizer, *others = (case.make(params, lr=0.25, weight_decay=0.5) for params in (together, *([p] for p in alone)))
    for step in range(2):
        for params in (together, alone):
            for index, param in enumerate(params):
                param.grad = gradient(param, step, index)
        for each in (optimizer, *others):
            each.step()
    torch.testing.assert_close(ours, theirs)


@every()
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-10, 1e10, 1e18], ids=str)
def test_extreme_gradients_stay_finite(case: Case, scale: float) -> None:
    """Nothing divides zero by zero, or overflows while the squares of the gradient do not (float32: up to 1e19)."""
    params = make_params()
    optimizer = case.make(params)
    for step in range(3):
        for index, param in enumerate(params):
            param.grad = (gradient(param, step, index).double() * scale).float()
        optimizer.step()
    assert all(param.isfinite().all() for param in params)
    assert not any(value.isnan().any() for state in optimizer.state.values() for value in state.values())


@every()
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded grad", "channels_last", "mixed"])
def test_memory_layout_does_not_change_the_result(case: Case, layout: str) -> None:
    """Strides are kept, and a non-contiguous parameter or gradient means what its contiguous copy means."""
    shape = (4, 3, 2, 2) if layout == "channels_last" else (6, 4)
    (plain,) = make_params([shape], torch.float64)
    odd = plain.detach().clone()
    if layout == "transposed" or layout == "mixed":
        odd = odd.mT.contiguous().mT
    elif layout == "strided":
        odd = torch.stack((odd, odd), -1)[..., 0]
    elif layout == "channels_last":
        odd = odd.contiguous(memory_format=torch.channels_last)
    odd.requires_grad_()
    strides = odd.stride()
    optimizers = [case.make([plain]), case.make([odd])]
    for step in range(3):
        grad = gradient(plain, step, 0)
        if layout == "expanded grad":
            grad = grad[:1].expand_as(plain)
        plain.grad = grad.contiguous()
        odd.grad = grad if layout in ("mixed", "expanded grad") else torch.empty_like(odd.detach()).copy_(grad)
        for optimizer in optimizers:
            optimizer.step()
    assert odd.stride() == strides
    torch.testing.assert_close(odd, plain)  # float64: another layout may sum in another order


@every()
def test_one_group_may_mix_dtypes(case: Case) -> None:
    """Every parameter moves as it would alone."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32)
    params = [make_params([shape], dtype)[0] for shape, dtype in zip(SHAPES, dtypes, strict=True)]
    copies = copy_params(params)
    alone = [case.make([copy]) for copy in copies]
    assert_same(train(case.make(params), params, range(3)), train(alone, copies, range(3)))


@every(beyond_torch="trains complex parameters")
def test_complex_parameters_are_refused_by_name(case: Case) -> None:
    """Refused, rather than trained on the real part; nothing is touched."""
    params = make_params()
    params.append(torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)))
    before = snapshot(params)
    with pytest.raises(RuntimeError, match=f"{case.cls.__name__} does not support complex parameters"):
        train(case.make(params), params, [0])
    assert_same(snapshot(params), before)


@every()
def test_sparse_gradients_are_refused_by_name(case: Case) -> None:
    """The error says what does not fit."""
    params = make_params()
    set_grads(params, 0)
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match=f"{case.cls.__name__.removesuffix('W')} does not support sparse gradients"):
        case.make(params).step()


@every(beyond_torch="has moved the groups before the sparse one, and has created its state")
def test_a_refused_gradient_touches_nothing(case: Case) -> None:
    """Whoever catches the error has the model and the state it had, even if the last group was at fault."""
    params = make_params()
    optimizer = case.make([{"params": [params[0], *params[2:]]}, {"params": params[1:2]}])
    set_grads(params, 0)
    params[1].grad = params[1].grad.to_sparse()
    before = snapshot(params)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same(snapshot(params), before)
    assert not any(optimizer.state.get(param) for param in params)
