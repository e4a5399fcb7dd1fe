"""The table of docs/checkpoints.md is what the classes keep."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deep_optim
from deep_optim import list_optimizers

PAGE = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text(encoding="utf-8")
S, M, N, H = 2, 6, 4, 5
SHAPES = {
    "p": (S * M, N),
    "[]": (),
    "[s, m, m]": (S, M, M),
    "[s, m, 1]": (S, M, 1),
    "[s, m, h]": (S, M, H),
    "[s, h, n]": (S, H, N),
}


def table() -> list[tuple[str, str, dict[str, tuple[int, ...]]]]:
    """Return every row that names a class: the class, its options and the shapes of its state."""
    rows = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] in list_optimizers():
            state = re.findall(r"`([\w.]+)` (p|\[[^]]*\])", cells[2])
            shapes = {name: SHAPES[shape] for name, shape in state}
            if cells[2].startswith("the same with"):
                shapes |= rows[-1][2]
            rows.append((cells[0], cells[1].strip("`"), shapes))
    return rows


def kept(cls: Any, dtype: torch.dtype, group: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    """Return the state of one parameter after a step."""
    param = nn.Parameter(torch.ones(S * M, N, dtype=dtype))
    optimizer = cls([{"params": [param], "split": S, **group}], **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer.state[param]


@pytest.mark.parametrize("name, options, shapes", table())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_row_is_what_the_class_keeps(
    name: str, options: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    state = kept(getattr(deep_optim, name), dtype, {}, **eval(f"dict({options})"))
    assert {key: tuple(value.shape) for key, value in state.items()} == shapes
    assert all(
        value.dtype == (torch.float32 if key == "step" else torch.promote_types(dtype, torch.float32))
        for key, value in state.items()
    )


def test_every_class_has_a_row() -> None:
    assert {name for name, _, _ in table()} == set(list_optimizers())


@pytest.mark.parametrize("name", list_optimizers())
def test_what_is_said_of_any(name: str) -> None:
    """AdamW's state for what is AdamW's, and the rounding kept where it is asked for."""
    options = {"missing": "gradient"} if name in ("DGD", "InputDeltaMomentum") else {}
    cls = getattr(deep_optim, name)
    state = kept(cls, torch.bfloat16, {"rule": "adamw"}, kahan_sum=True, **options)
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "step": (),
        "exp_avg": (S * M, N),
        "exp_avg_sq": (S * M, N),
        "compensation": (S * M, N),
    }
    assert state["compensation"].dtype == torch.bfloat16
