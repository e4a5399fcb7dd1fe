"""Counters of steps, and what is made of them: on the host, unless a CUDA graph has to find them on the device.

What a step needs of them is a number for each matrix. It is made where the counter is and handed to the device as it is
needed, by a copy that nobody waits for, as torch.optim hands over an `lr` that is a tensor.
"""

import math

import torch
from torch import Tensor


def count_step(states: list[dict[str, Tensor]]) -> None:
    for state in states:
        if "step" in state:
            state["step"] += 1


def weight_seen(beta: float, step: Tensor) -> Tensor:
    """Return 1 − β^t, the weight of what t steps have added to an average that started at zero.

    By expm1, since the difference loses all but a few digits in float32 when β is near 1.
    """
    return -torch.expm1(step * math.log(beta)) if beta > 0 else torch.ones_like(step)


def beside(numbers: Tensor, tensor: Tensor) -> Tensor:
    """Return `numbers`, which nobody writes later, on the device of `tensor`.

    CUDA has read pageable memory when the call returns, so that it may be freed; Apple's GPUs may not have.
    """
    return numbers.to(tensor.device, non_blocking=tensor.device.type != "mps")
