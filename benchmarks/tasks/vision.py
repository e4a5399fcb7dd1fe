"""Small images: scikit-learn's digits, which come with it, or Fashion-MNIST; a small ViT or a small ResNet."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import Batch
from .corpus import read_fashion
from .text import Block

BATCH = 64
VALIDATION_IMAGES = 1000


class ViT(nn.Module):
    """Sixteen patches, three blocks, mean of the tokens."""

    def __init__(self, side: int, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patch = side // 4
        self.patches = nn.Linear(self.patch**2, width)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, heads, causal=False) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)
        nn.init.zeros_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:  # [B, S, S] -> [B, 10]
        patches = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch).flatten(3).flatten(1, 2)
        tokens = self.blocks(self.patches(patches) + self.position)  # [B, T, D]
        return self.head(self.norm(tokens).mean(1))


class FlatConv(nn.Conv2d):
    """A 3x3 convolution whose weight is the matrix [out, 9 in]: torch.optim.Muon takes no other shape."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride, padding=1, bias=False, device="meta")
        self.weight = nn.Parameter(torch.randn(outputs, 9 * inputs) * (2 / (9 * inputs)) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return self._conv_forward(x, self.weight.view(-1, self.in_channels, 3, 3), None)


class Residual(nn.Module):
    """Two convolutions around a shortcut; group norm, because averaged weights would need new batch statistics."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = FlatConv(inputs, outputs, stride), nn.GroupNorm(8, outputs)
        self.conv2, self.norm2 = FlatConv(outputs, outputs), nn.GroupNorm(8, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else FlatConv(inputs, outputs, stride)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + inner)


class ResNet(nn.Module):
    """A stem and three residual blocks of 16, 32 and 64 channels."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.stem, self.norm = FlatConv(1, 16, stride=side // 8), nn.GroupNorm(8, 16)
        self.blocks = nn.Sequential(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2))
        self.head = nn.Linear(64, 10)
        nn.init.zeros_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:  # [B, S, S] -> [B, 10]
        return self.head(self.blocks(F.relu(self.norm(self.stem(images[:, None])))).mean((2, 3)))


class Vision:
    """Classify 64 images a step; the loss is the cross-entropy, beside it the accuracy.

    Args:
        model: "vit" or "resnet".
        images: "digits" (8x8, 1,797 of them) or "fashion" (28x28, 70,000; downloaded, see corpus.py).
    """

    metric = "validation loss (nats per image)"
    steps = 300
    aux_lr = 2e-3
    weight_decay = 1e-2
    memory = ()

    def __init__(self, model: str = "vit", images: str = "digits") -> None:
        self.name, self.kind, self.images = f"vision-{model}", model, images
        if images == "fashion":
            train, labels, held_out, held_out_labels = read_fashion()
            held_out, held_out_labels = held_out[:VALIDATION_IMAGES], held_out_labels[:VALIDATION_IMAGES]
        else:
            train, labels, held_out, held_out_labels = read_digits()
        mean, deviation = train.float().mean(), train.float().std()
        self.train = (train, labels.long())
        self.normalize = lambda pixels: (pixels.float() - mean) / deviation
        self.validation = (self.normalize(held_out), held_out_labels.long())

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return (ViT if self.kind == "vit" else ResNet)(side=self.train[0].shape[-1])

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        rng = torch.Generator().manual_seed(seed)
        images, labels = self.train
        for _ in range(steps):
            drawn = torch.randint(len(labels), (BATCH,), generator=rng)
            yield self.normalize(images[drawn]), labels[drawn]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        images, labels = self.validation
        logits = torch.cat([model(chunk) for chunk in images.split(BATCH)])
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": accuracy}

    def describe(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "train_images": len(self.train[1]),
            "validation_images": len(self.validation[1]),
            "batch": BATCH,
        }


def read_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A fifth is held out, drawn once."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images).byte(), torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, train = order[: len(order) // 5], order[len(order) // 5 :]
    return images[train], labels[train], images[held_out], labels[held_out]
