"""Hugging Face's Trainer on a tiny Llama: resumed in the middle, the run is the uninterrupted one."""

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from deep_optim.integrations.transformers import for_trainer
from resumed import NAMES, OPTIONS, assert_resumed, llama, sentences, weights


def make_trainer(folder: Path, name: str, **arguments: Any) -> Trainer:
    arguments = {"max_steps": 6, "lr_scheduler_type": "cosine", "warmup_steps": 2, **arguments}
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        learning_rate=1e-2,
        weight_decay=0.1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        save_steps=3,
        disable_tqdm=True,
        report_to="none",
        **arguments,
    )
    chosen = for_trainer(name, args, **OPTIONS.get(name, {}))
    return Trainer(llama(), args, train_dataset=sentences(), optimizer_cls_and_kwargs=chosen)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_resumes_in_mid_run(tmp_path: Path, name: str, bf16: bool) -> None:
    """With accumulation, clipping and a schedule."""
    trainer = make_trainer(tmp_path, name, bf16=bf16)
    start = weights(trainer.model)
    trainer.train()
    resumed = make_trainer(tmp_path / "resumed", name, bf16=bf16)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_resumed(weights(resumed.model), weights(trainer.model), start)


def test_the_factory_routes_by_module(tmp_path: Path) -> None:
    """Embedding and head are AdamW's, which Trainer's own groups could not tell; args decide rate and decay."""
    optimizer = make_trainer(tmp_path, "Momentum").create_optimizer()
    rules = {name: g["rule"] for g in optimizer.param_groups for name in g["param_names"]}
    assert rules["model.embed_tokens.weight"] == rules["lm_head.weight"] == "adamw"
    assert rules["model.layers.0.self_attn.q_proj.weight"] == rules["model.layers.1.mlp.down_proj.weight"] == "memory"
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}
