"""Accelerate on a small ViT: resumed in the middle, the run is the uninterrupted one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import DataLoader

from deep_optim import create_optimizer
from resumed import NAMES, OPTIONS, assert_resumed, images, vit, weights


def train(name: str, precision: str, folder: Path, *, resume: bool) -> dict[str, Tensor]:
    """Train six steps of two micro-batches and save after three; or begin with what was saved."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = vit()
    optimizer: Any = create_optimizer(name, model, lr=1e-2, **OPTIONS.get(name, {}))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=6)
    batches = list(DataLoader(images(), batch_size=2))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    if resume:
        accelerator.load_state(str(folder))
        batches = batches[6:]
    for index, batch in enumerate(batches):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if index == 5 and not resume:
            accelerator.save_state(str(folder))
    return weights(accelerator.unwrap_model(model))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_resumes_in_mid_run(tmp_path: Path, name: str, precision: str) -> None:
    uninterrupted = train(name, precision, tmp_path, resume=False)
    assert_resumed(train(name, precision, tmp_path, resume=True), uninterrupted, weights(vit()))
