"""A step hands the device its work and does not wait for it: seen on the meta device, which stands for a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cases import CASES, Case
from deep_optim import DMGD, M3, DeltaMomentum, Momentum
from deep_optim.ops.delta_momentum import delta_momentum_reference
from deep_optim.ops.descend import descend
from deep_optim.ops.mixed_descent import mixed_descent, mixed_squares
from deep_optim.ops.momentum import momentum_reference
from problem import SHAPES

# torch's AdamW refuses the meta device, so that what it steps is left out.
ON_META = [case for case in CASES if not case.control and case.group.get("rule") != "adamw"]


class HostWaits(TorchDispatchMode):
    """Within it, `found` lists what the host waits for: copies that block, between it and the device, and answers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip((argument.name for argument in func._schema.arguments), args)) | (kwargs or {})  # noqa: B905
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].is_meta:
            self.found.append(name)
        out = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((given, out)) if isinstance(leaf, Tensor)}
        if name in ("_to_copy", "copy_", "_foreach_copy_") and len(devices) > 1 and not given.get("non_blocking"):
            self.found.append(name)
        return out


def waits(case: Case, steps: int = 4) -> list[str]:
    """Return what the host waits for in steps after the first, which makes state: of stacks of one and of three."""
    shapes = [shape for shape in SHAPES if len(shape) > 1 or case.kwargs.get("output") == "identity"]
    params = [Parameter(torch.empty(shape, device="meta")) for shape in (*shapes, *shapes[:1] * 2)]
    optimizer = case.make(params, **({"nonfinite": "ignore"} if case.cls is DMGD else {}))  # which alone asks
    found: list[str] = []
    for step in range(steps):
        for param in params:
            param.grad = torch.empty_like(param)
        with HostWaits() as mode:
            optimizer.step()
        found += mode.found if step else []
    return found


@pytest.fixture(autouse=True)
def addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor on the meta device has one, which looks as if all shared theirs."""
    monkeypatch.setattr("deep_optim.optimizers.stacks._overlapping", lambda params: False)


@pytest.mark.parametrize("case", ON_META, ids=lambda case: case.id)
def test_the_host_waits_for_nothing(case: Case) -> None:
    assert waits(case) == []


@pytest.mark.parametrize(
    "cls, options",
    [(Momentum, {}), (DeltaMomentum, {}), (DeltaMomentum, {"output": "identity"}), (DMGD, {}), (M3, {"chunk_size": 2})],
    ids=str,
)
def test_nor_around_kernels(cls: type, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In whose place their references are called."""
    taken = []

    def by(name: str, reference: Any) -> None:
        call = lambda *args, **kwargs: (taken.append(name), reference(*args, **kwargs))[1]  # noqa: E731
        monkeypatch.setattr(f"deep_optim.optimizers.{name}", call)

    by("in_place.addressable", lambda *_: True)
    by("in_place.descend_triton", descend)
    by("momentum.momentum_triton", momentum_reference)
    by("delta_momentum.delta_momentum_triton", delta_momentum_reference)
    by("m3.mixed_squares_triton", mixed_squares)
    by("m3.mixed_descent_triton", mixed_descent)
    assert waits(Case("", cls, options)) == []
    assert any(name.endswith("_triton") for name in taken)


def test_what_waits_is_found() -> None:
    number, device = torch.zeros(3), torch.zeros(3, device="meta")
    with HostWaits() as mode:
        number.to("meta", non_blocking=True)
        device.copy_(number, non_blocking=True)
        number.to(torch.float64)
        number[0].item()
    assert mode.found == []
    with mode:
        number.to("meta")
        device.copy_(number)
        torch._foreach_copy_([device], [number])
        with pytest.raises(RuntimeError, match="meta"):
            device[0].item()
    assert mode.found == ["_to_copy", "copy_", "_foreach_copy_", "_local_scalar_dense"]
