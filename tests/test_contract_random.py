"""What every optimizer owes to inputs that nobody thought of: drawn at random, and repeatable."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import Case, every
from problem import assert_same, copy_params, gradient, snapshot

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@dataclass(frozen=True)
class Draw:
    """One parameter and what happens to it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool
    scale: float


DRAWS = st.builds(
    Draw,
    shape=SHAPES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    transposed=st.booleans(),
    scale=st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 10.0]),
)
VALUES = st.fixed_dictionaries(
    {"lr": st.floats(0, 0.1), "weight_decay": st.floats(0, 1), "maximize": st.booleans()},
    optional={"foreach": st.booleans()},
)


def make(draw: Draw, index: int) -> torch.nn.Parameter:
    """Return the drawn parameter."""
    value = gradient(torch.empty(draw.shape, dtype=draw.dtype), 99, index)
    if draw.transposed and value.ndim > 1:
        value = value.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.nn.Parameter(value)


@every()
@settings(max_examples=12)
@given(draws=st.lists(DRAWS, min_size=1, max_size=4), values=VALUES, saved=st.integers(0, 3))
def test_any_parameters_with_any_values(case: Case, draws: list[Draw], values: dict[str, Any], saved: int) -> None:
    """Finite; shapes, strides and gradients untouched; and saving at any step changes nothing."""
    params = [make(draw, index) for index, draw in enumerate(draws)]
    copies = copy_params(params)
    strides = [(param.shape, param.stride(), param.dtype) for param in params]
    optimizer, resumed = case.make(params, **values), case.make(copies, **values)
    for step in range(4):
        for index, (param, copy, draw) in enumerate(zip(params, copies, draws, strict=True)):
            param.grad, copy.grad = (draw.scale * gradient(param, step, index) for _ in range(2))
        before = snapshot([param.grad for param in params])
        if step == saved:
            state_dict, resumed = resumed.state_dict(), case.make(copies)
            resumed.load_state_dict(state_dict)
        optimizer.step()
        resumed.step()
        assert_same([param.grad for param in params], before)
        assert [(param.shape, param.stride(), param.dtype) for param in params] == strides
        assert all(param.isfinite().all() for param in params)
        assert_same(snapshot(params), snapshot(copies))
