"""Feature maps φ: what a memory is written with in place of the raw gradient.

    identity    φ(G) = G
    soft_rows   φ(G) ∝ g_i / (‖g_i‖ + 0.3 · RMS of the ‖g_i‖)     per row i (column, if the matrix is wide)
    tanh        φ(G) = s · tanh(G / s),   s = RMS of G's entries
    sign        φ(G) = s · sign(G)

Nested Learning, arXiv:2512.24695, Eq. 51, which leaves φ open. Each map here is scale-free, φ(c G) = c φ(G) for
c > 0, so that the loss scale does not matter; "soft_rows" also keeps the Frobenius norm. It treats the gradient's
longer side as tokens and brings them to nearly equal length, while rows that are almost zero stay small: a hard
normalisation would blow their noise up.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from .frobenius import frobenius_norm

FeatureMap = Literal["identity", "soft_rows", "tanh", "sign"]

_SOFTNESS = 0.3  # not tuned; better than 0, the hard normalisation, on a byte-level language model


def feature_map(gradient: Tensor, name: FeatureMap) -> Tensor:
    """Return φ(`gradient`), of the same shape `[..., m, n]`; zero stays zero. Four passes at most.

    Args:
        gradient: any stack of matrices.
        name: "identity", "soft_rows", "tanh" or "sign".

    Raises:
        ValueError: for an unknown name.
    """
    if name == "identity":
        return gradient
    if name == "soft_rows":
        return _soft_rows(gradient)
    if name not in get_args(FeatureMap):
        raise ValueError(f"Invalid feature_map: {name!r}, expected one of {get_args(FeatureMap)}")
    rms = frobenius_norm(gradient) / (gradient.shape[-2] * gradient.shape[-1]) ** 0.5  # [..., 1, 1]
    if name == "tanh":
        return rms * torch.tanh(gradient / rms.clamp(min=torch.finfo(rms.dtype).tiny))
    return rms * gradient.sign()


def _soft_rows(gradient: Tensor) -> Tensor:
    token = -1 if gradient.shape[-2] >= gradient.shape[-1] else -2  # the dimension a token's entries lie along
    norm = frobenius_norm(gradient)  # [..., 1, 1]
    unit = gradient / norm
    length = unit.square().sum(token, keepdim=True).sqrt()  # [..., m, 1] or [..., 1, n]
    weight = 1 / (length + _SOFTNESS / max(gradient.shape[-2:]) ** 0.5)  # 1 / √tokens is the RMS of the lengths
    return unit * (weight * (norm / frobenius_norm(weight * length)))
