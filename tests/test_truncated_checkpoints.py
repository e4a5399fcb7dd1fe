"""A checkpoint whose file was cut is refused in words, before the optimizer sees any of it."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from deep_optim import M3
from problem import assert_same, make_model, model_loss


def trained() -> tuple[nn.Module, Any]:
    model = make_model()
    optimizer = M3(model.parameters(), chunk_size=2)
    fit(model, optimizer, range(3))
    return model, optimizer


def fit(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model_loss(model, step).backward()
        optimizer.step()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_torch_load_refuses_a_file_that_was_cut(tmp_path: Path, share: float) -> None:
    _, optimizer = trained()
    before, file = deepcopy(optimizer.state_dict()), tmp_path / "optimizer.pt"
    torch.save(before, file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises((RuntimeError, OSError)):  # torch has several words for it
        optimizer.load_state_dict(torch.load(file))
    assert_same(optimizer.state_dict()["state"], before["state"])


@pytest.mark.parametrize("cut", ["metadata", "data"])
def test_a_distributed_checkpoint_that_was_cut_is_refused(tmp_path: Path, cut: str) -> None:
    """At once without metadata. In data that was cut it shows late, and the tensors given are lost: here copies."""
    model, optimizer = trained()
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=str(tmp_path))
    fit(model, optimizer, range(3, 6))
    before = deepcopy(optimizer.state_dict())
    if cut == "metadata":
        (tmp_path / ".metadata").unlink()
        target = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    else:
        (file,) = tmp_path.glob("*.distcp")
        file.write_bytes(file.read_bytes()[:-100])
        target = deepcopy({"optimizer": get_optimizer_state_dict(model, optimizer)})
    with pytest.raises(CheckpointException, match=r"metadata is None|corrupted"):
        dcp.load(target, checkpoint_id=str(tmp_path))
    assert_same(optimizer.state_dict()["state"], before["state"])
