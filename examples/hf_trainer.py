"""Hugging Face's Trainer with an optimizer of this package: a randomly initialised Llama learns to count.

pip install "deep_optim[hf]"; python examples/hf_trainer.py
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from deep_optim.integrations.transformers import for_trainer

WORDS, LENGTH = 32, 16


def main(folder: str = "trainer", steps: str = "40") -> float:
    """Train, and return the mean loss."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
        )
    )
    rows = [(torch.arange(LENGTH) + start) % WORDS for start in range(WORDS)]
    args = TrainingArguments(
        output_dir=folder,
        max_steps=int(steps),
        learning_rate=3e-3,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        report_to="none",
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizer_cls_and_kwargs=for_trainer("DMGD", args),  # the one line: the rate and the decay are those of args
    )
    return trainer.train().training_loss


if __name__ == "__main__":
    main(*sys.argv[1:])
