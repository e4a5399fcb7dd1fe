"""A rank that is killed in the middle of a step: the run goes on from the last checkpoint."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from parallel_runs import Model, everything, fit, fit_here, make, sharded_model
from ranks import on_ranks

pytestmark = pytest.mark.xdist_group("ranks")

NAME, STEPS = "M3", 6


def train(folder: str, killed_at: int | None) -> dict[str, Any]:
    """Train sharded with a checkpoint every two steps, from the last one there is; one rank may die inside a step."""
    model = sharded_model()
    optimizer = make(NAME, model)
    done = sorted(int(path.parent.name) for path in Path(folder).glob("*/.metadata"))  # which is written last
    first = done[-1] if done else 0
    if first:
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state}
        dcp.load(saved, checkpoint_id=str(Path(folder, str(first))))
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    for step in range(first, STEPS):
        if step == killed_at and dist.get_rank() == 1:
            optimizer.direction = lambda *_: os._exit(9)  # its matrices have been gathered, none is scattered
        fit_here(model, optimizer, range(step, step + 1))
        if step % 2:
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(Path(folder, str(step + 1))))
    return {**everything(model, optimizer), "first": first}


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exit codes \[1, 9\], 0 stuck"):  # the other rank hears of it and stops
        on_ranks(2, train, str(tmp_path), 3)
    resumed = on_ranks(2, train, str(tmp_path), None)[0]
    assert resumed.pop("first") == 2
    model = Model()
    optimizer = make(NAME, model)
    fit(model, optimizer, range(STEPS))
    torch.testing.assert_close(resumed, everything(model, optimizer), rtol=1e-4, atol=1e-4)
