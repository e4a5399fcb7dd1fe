"""The weights whose steps are timed: those of models, without the models' forward passes."""

from collections.abc import Callable

from torch import nn

from .tasks.text import ByteGPT


class Layers(nn.Module):
    """Linear layers of the given [outputs, inputs], each with a bias."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(inputs, outputs) for outputs, inputs in shapes])


class ResNet50(nn.Module):
    """The weights of a ResNet-50: 53 convolutions, the scales and shifts after them, and the classifier."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False)]
        inputs = 64
        for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
            for block in range(blocks):
                layers += [
                    nn.Conv2d(inputs, width, 1, bias=False),
                    nn.Conv2d(width, width, 3, bias=False),
                    nn.Conv2d(width, 4 * width, 1, bias=False),
                ]
                if block == 0:
                    layers.append(nn.Conv2d(inputs, 4 * width, 1, bias=False))
                inputs = 4 * width
        self.hidden = nn.ModuleList([*layers, *[nn.BatchNorm2d(len(layer.weight)) for layer in layers]])  # type: ignore[arg-type]
        self.head = nn.Linear(inputs, 1000)


def gpt2_block(width: int) -> list[tuple[int, int]]:
    """The matrices of one block: attention in and out, MLP up and down."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "text": (ByteGPT, ()),
    "small": (lambda: Layers([(64, 64)] * 48), ("hidden",)),
    "gpt2-quarter": (lambda: Layers(gpt2_block(192) * 12), ("hidden",)),  # 12 layers, a quarter of the width
    "gpt2-block": (lambda: Layers(gpt2_block(768)), ("hidden",)),  # one layer of the 124M model
    "gpt2": (lambda: Layers(gpt2_block(768) * 12), ("hidden",)),
    "gpt3-xl": (lambda: Layers(gpt2_block(2048) * 24), ("hidden",)),  # the 1.3B model: 20 GB for each optimizer
    "resnet50": (ResNet50, ("hidden",)),
    "tensors": (lambda: Layers([(16, 16)] * 150), ("hidden",)),  # 300 small ones, half of them vectors
}
