"""AdamW for what is no matrix: torch's own, on the states of this package."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from .rounding import from_master, is_low, to_master
from .sharding import local


def init_adamw_state(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return torch.optim.AdamW's state of one parameter, under its names; the step is where its kernels want it."""
    on_host = not group["capturable"] and (group["fused"] is False or group["foreach"])
    return {
        "step": torch.zeros((), dtype=torch.float32, device="cpu" if on_host else param.device),
        "exp_avg": torch.zeros_like(param),
        "exp_avg_sq": torch.zeros_like(param),
    }


def adamw_step(params: list[Tensor], states: list[dict[str, Tensor]], group: Mapping[str, Any]) -> None:
    """Step `params` in place by torch's AdamW."""
    exact = [i for i, param in enumerate(params) if not is_low(param)]
    if exact:
        _adamw([local(params[i]) for i in exact], [_grad(params[i]) for i in exact], [states[i] for i in exact], group)
    for param, state in zip(params, states, strict=True):  # one at a time: a float32 copy of all would double the model
        if is_low(param):
            master = to_master(param, state)
            _adamw([master], [_grad(param).to(master.dtype)], [state], group)
            from_master(master, param, state)


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return local(param.grad)


def _adamw(
    params: list[Tensor], grads: list[Tensor], states: list[dict[str, Tensor]], group: Mapping[str, Any]
) -> None:
    beta1, beta2 = group["adamw_betas"]
    exp_avgs = [local(state["exp_avg"]) for state in states]
    exp_avg_sqs = [local(state["exp_avg_sq"]) for state in states]
    compiling = torch.compiler.is_compiling()
    fused = group["fused"]
    if fused is None and not group["foreach"]:
        fused = not compiling and all(map(_fusible, params, grads, exp_avgs, exp_avg_sqs))
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
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
    if fused:  # whose kernels do not tell autograd that they wrote
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])


def _fusible(param: Tensor, *others: Tensor) -> bool:
    """Whether torch's fused kernels can step this parameter: they read memory in order and ignore strides."""
    supported = param.device.type in _get_fused_kernels_supported_devices()
    return supported and all(tensor.is_contiguous() for tensor in (param, *others))
