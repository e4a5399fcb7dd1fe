"""Models to route the parameters of, and what `param_groups` made of them."""

from typing import Any

import torch
from torch import nn

from deep_optim.routing import param_groups

D = 8


class Block(nn.Module):
    def __init__(self, fused: int = 3) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(D, fused * D, bias=False), "proj": nn.Linear(D, D)})
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))


class GPT(nn.Module):
    """Its head is registered first, so that it is not found by its position."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.lm_head = nn.Linear(D, 20, bias=False)
        self.wte = nn.Embedding(20, D)
        self.wpe = nn.Parameter(torch.zeros(1, 5, D))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(D)
        if tied:
            self.lm_head.weight = self.wte.weight


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.patches = nn.Conv2d(3, D, 4, 4)
        layer = nn.TransformerEncoderLayer(D, 2, 2 * D, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.heads = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 10))


class ResBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(D, D, 3, bias=False), nn.BatchNorm2d(D)
        self.downsample = nn.Sequential(nn.Conv2d(D, D, 1, bias=False), nn.BatchNorm2d(D))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, D, 3, bias=False)
        self.layer1 = nn.Sequential(ResBlock(), ResBlock())
        self.fc = nn.Linear(D, 10)


def named(groups: list[dict[str, Any]], **values: Any) -> set[str]:
    """Return the names in the groups that have these values."""
    chosen = [group for group in groups if all(group[key] == value for key, value in values.items())]
    return {name for group in chosen for name, _ in group["params"]}


def memory(model: nn.Module, **kwargs: Any) -> set[str]:
    """Return the names of the parameters that have a memory."""
    return named(param_groups(model, **kwargs), rule="memory")


def matrices(model: nn.Module) -> set[str]:
    return {name for name, param in model.named_parameters() if param.ndim > 1}


def assert_covers_once(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Every trainable parameter is in one group, under the name that the model gives it; no group is empty."""
    listed = [item for group in groups for item in group["params"]]
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert len(listed) == len(trainable)
    assert all(trainable[name] is param for name, param in listed)
    assert all(group["params"] for group in groups)
