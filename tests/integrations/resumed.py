"""What the integration tests share: two tiny models, their data, and what a resumed run is compared by."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

NAMES = ("Momentum", "DMGD", "M3", "DGD")  # one of each kind of state: plain, hidden weights, chunks, captured inputs
OPTIONS: dict[str, dict[str, Any]] = {"M3": {"chunk_size": 2, "alpha_warmup": 1}, "DMGD": {"hidden_dim": 4}}
WORDS, CLASSES = 32, 5


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=16, **sizes))


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=CLASSES, **sizes))


def sentences(number: int = 24) -> list[dict[str, Tensor]]:
    words = torch.randint(WORDS, (number, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in words]


def images(number: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(number, 3, 8, 8, generator=generator)
    return [{"pixel_values": image, "labels": torch.tensor(index % CLASSES)} for index, image in enumerate(pixels)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_resumed(resumed: dict[str, Tensor], uninterrupted: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """Bit for bit the same run, and one that went somewhere."""
    torch.testing.assert_close(resumed, uninterrupted, rtol=0, atol=0)
    assert all(not torch.equal(resumed[name], start[name]) for name in start if start[name].ndim > 1)
