"""What a layer's weight is multiplied with: the rows of a linear layer's input, the patches of a convolution's.

    rows [G, N, n]      N vectors of the n features that each row of the weight [m, n] meets, for G groups of rows

A sample of them, each at length 1, is all that `capture_inputs` keeps.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TOO_SHORT = 1e-12  # a row below this length counts for less, down to nothing
_GOLDEN = 2654435769  # 2³² / φ: no other number's multiples fill [0, 1) as evenly


def unit_rows(layer: Any, x: Tensor, places: Tensor) -> Tensor:  # -> [G, N, n], at least float32
    """Return the rows at `places` of the layer's input `x`, each of length 1.

    Zero stays zero, and so becomes whatever holds a NaN or an infinity or is longer than a square can tell.
    """
    rows = _rows(layer, x, places).to(torch.promote_types(x.dtype, torch.float32))  # our own: written in place
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows.div_(length.clamp_(min=_TOO_SHORT)).nan_to_num_(nan=0.0)


def number_of_rows(layer: Any, x: Tensor) -> int:
    """Return how many rows the layer's input `x` has."""
    if isinstance(layer, nn.Linear):
        return math.prod(x.shape[:-1])
    spatial, padding = len(layer.kernel_size), layer._reversed_padding_repeated_twice  # of the last dimension first
    rows = math.prod(x.shape[: -spatial - 1])
    for d in range(spatial):  # as `_patches` has them, without the copy that padding is
        end = 2 * (spatial - d)
        overhang = sum(padding[end - 2 : end]) - layer.dilation[d] * (layer.kernel_size[d] - 1) - 1
        rows *= (x.shape[d - spatial] + overhang) // layer.stride[d] + 1
    return rows


def usual_sample(layer: Any) -> int:
    """Return by default of how many rows one is taken: 8, times the places of a convolution's kernel.

    A kernel of 9 places sees each number of the input 9 times, and its Gram would cost 9 times as much beside the layer
    as that of a linear one.
    """
    return 8 * math.prod(getattr(layer, "kernel_size", ()))


def spread_places(rows: int, every: int, device: torch.device) -> Tensor:
    """Return one index in each run of `every`, at another place in each, so that no position is preferred."""
    run = torch.arange(-(-rows // every), device=device)
    place = (run * _GOLDEN % 2**32) * every >> 32  # every · frac(run / φ)
    return (run * every + place).clamp(max=rows - 1)


def reading(layer: Any) -> tuple[Any, ...] | None:
    """Return what, beside the input itself, decides a layer's rows; equal for layers that read alike."""
    if isinstance(layer, nn.Linear):
        return None
    padding = tuple(layer._reversed_padding_repeated_twice), layer.padding_mode
    return layer.kernel_size, layer.stride, layer.dilation, layer.groups, *padding


def _rows(layer: Any, x: Tensor, places: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).index_select(0, places)[None]
    patches = _patches(layer, x)
    leading = patches.shape[: len(layer.kernel_size) + 1]
    chosen = patches[torch.unravel_index(places, leading)]  # [N, C, *kernel]
    return chosen.reshape(len(places), layer.groups, math.prod(layer.weight.shape[1:])).transpose(0, 1)


def _patches(conv: Any, x: Tensor) -> Tensor:  # -> [B, *O, C, *kernel]
    """Return every patch that the kernel is laid over, without a copy of any."""
    spatial = len(conv.kernel_size)
    x = x if x.ndim > spatial + 1 else x[None]  # [B, C, *S]
    if any(conv._reversed_padding_repeated_twice):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, step, gap) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=2):
        x = x.unfold(dim, (size - 1) * gap + 1, step)[..., ::gap]
    return x.movedim(1, spatial + 1)
