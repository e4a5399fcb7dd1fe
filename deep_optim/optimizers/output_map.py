"""Output maps σ: what becomes of a memory's answer before it moves the weights.

    identity         σ(D) = D                                             SGD's scale of lr
    adam             σ(D) = (1 − β) / (1 − β^t) · D / (√v̂ + ε)            AdamW's scale; v̂ of what was written
    newton_schulz    σ(D) = 0.2 √max(m, n) · NS(D)                        AdamW's scale (an update of RMS 0.2)

Nested Learning, arXiv:2512.24695, Eq. 52, where Newton-Schulz over a linear memory is Muon. The factor of "adam"
turns the memory's plain sum into the bias-corrected average that Adam divides, so that a plain momentum with this
map is AdamW. The factor of "newton_schulz" is Moonlight's (arXiv:2502.16982): AdamW's lr and weight decay carry over.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from deep_optim.ops.newton_schulz import newton_schulz

from .counters import beside, weight_seen

OutputMap = Literal["identity", "adam", "newton_schulz"]

_ADAMW_RMS = 0.2  # of an AdamW update, in units of lr; Moonlight, arXiv:2502.16982, section 2.2


def init_output_state(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what the map keeps per parameter: nothing, or Adam's second moment."""
    if group["output"] != "adam":
        return {}
    return {"exp_avg_sq": torch.zeros_like(param), "step": torch.zeros((), dtype=torch.float32)}


def apply_output(
    direction: Tensor,  # [B, m, n]
    written: Tensor,  # [B, m, n]
    state: dict[str, Tensor],
    group: Mapping[str, Any],
) -> Tensor:  # [B, m, n]
    """Return σ(`direction`), in what it is computed in; "adam" takes `written` into its second moment first."""
    if group["output"] == "newton_schulz":
        return orthogonalise(direction, group, cast=False)  # the weights are stepped in full precision anyway
    if group["output"] == "adam":
        momentum, (_, beta2) = group["momentum"], group["adamw_betas"]
        state["exp_avg_sq"] = (beta2 * state["exp_avg_sq"]).addcmul_(written, written, value=1 - beta2)
        step = state["step"].to(direction.dtype)  # [B, 1, 1]
        extra = group.get("lookahead", 1) - 1 if group["nesterov"] else 0  # beyond the one that Nesterov adds
        seen = weight_seen(momentum, step + group["nesterov"]) + (1 - momentum) * extra
        average = beside((1 - momentum) / seen, direction) * direction
        second = state["exp_avg_sq"] / beside(weight_seen(beta2, step), direction)
        return average / (second.sqrt() + group["adamw_eps"])
    return direction


def orthogonalise(matrix: Tensor, group: Mapping[str, Any], *, cast: bool = True) -> Tensor:  # [B, m, n] -> [B, m, n]
    """Return 0.2 √max(m, n) · NS(`matrix`), in the dtype of the matrix or, without `cast`, in that of the products."""
    scale = _ADAMW_RMS * max(matrix.shape[-2:]) ** 0.5
    options = {"steps": group["ns_steps"], "coefficients": group["ns_coefficients"], "scale": scale, "cast": cast}
    return newton_schulz(matrix, **options)
