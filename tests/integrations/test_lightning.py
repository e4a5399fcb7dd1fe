"""Lightning on a small ViT: resumed in the middle, the run is the uninterrupted one."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from deep_optim import create_optimizer
from resumed import NAMES, OPTIONS, assert_resumed, images, vit, weights


class Classifier(lightning.LightningModule):
    """A ViT and an optimizer by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.vit, self.name = vit(), name

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.vit(**batch).loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = create_optimizer(self.name, self, lr=1e-2, **OPTIONS.get(self.name, {}))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(name: str, precision: Any, folder: Path, checkpoint: str | None = None) -> dict[str, Tensor]:
    model = Classifier(name)
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")],
    )
    trainer.fit(model, DataLoader(images(12), batch_size=2), ckpt_path=checkpoint)
    assert trainer.global_step == 6
    return weights(model.vit)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resumes_in_mid_run(tmp_path: Path, name: str, precision: str) -> None:
    uninterrupted = train(name, precision, tmp_path)
    resumed = train(name, precision, tmp_path / "resumed", str(tmp_path / "step=3.ckpt"))
    assert_resumed(resumed, uninterrupted, weights(vit()))
