"""AdamW for what is no matrix: torch's own, on the states of this package."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices


def init_adamw_state(param: Tensor) -> dict[str, Tensor]:
    """Return torch.optim.AdamW's state of one parameter, under its names."""
    return {
        "step": torch.zeros((), device=param.device),
        "exp_avg": torch.zeros_like(param),
        "exp_avg_sq": torch.zeros_like(param),
    }


def adamw_step(
    params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], group: Mapping[str, Any]
) -> None:
    """Step `params` in place by torch's AdamW; `fused=None` takes the fused kernel wherever torch has one."""
    beta1, beta2 = group["adamw_betas"]
    compiling = torch.compiler.is_compiling()
    fused = group["fused"]
    if fused is None and not group["foreach"]:
        fused = not compiling and all(map(_fusible, params, grads))
    adamw(
        params,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        foreach=bool(group["foreach"]),
        capturable=group["capturable"] and (compiling or not params[0].is_cpu),
        differentiable=False,
        fused=fused,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["adamw_eps"],
        maximize=group["maximize"],
    )


def _fusible(param: Tensor, grad: Tensor) -> bool:
    return param.device.type in _get_fused_kernels_supported_devices() and param.stride() == grad.stride()
