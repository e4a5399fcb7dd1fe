"""The loop every optimizer here shares; an algorithm is the methods it leaves open.

    written   = features(G)                       what the memory is written with
    direction = update(written, state)            write it, and read the memory
    W ← (1 − lr · weight_decay) · W − lr · σ(direction)

A group is stepped in stacks [B, m, n]: parameters of one shape are handed to `update` together, so that the equation
is written once and a step has few launches. State is kept per parameter and never shows the stacking.
"""

from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deep_optim.ops.newton_schulz import Coefficients

from .adamw import adamw_step, init_adamw_state
from .checkpoint import ExactStateMixin
from .matrices import has_memory, matrix_shape
from .output_map import OutputMap, apply_output, init_output_state
from .validation import check_at_least, check_betas, check_choice, check_lr, check_range

_STACK_NUMEL = 2**24  # 64 MB in float32: enough to fill a device, small beside a model


class MemoryOptimizer(ExactStateMixin, torch.optim.Optimizer):
    """Descend along what a memory of past gradients answers.

    Subclasses define `init_state` and `update`, may define `features` and `check_group`, and never override `step`.
    Which parameters have a memory: all under `output="identity"`, else those with two dimensions or more, read as
    matrices [rows, rest]; the others, and groups with `rule="adamw"`, are stepped by torch's AdamW. A group with
    `split=s` has its matrices cut into s blocks of rows, each with a memory of its own (fused query, key and value).

    State is float32, float64 for float64 parameters. A parameter whose first gradient is all zero gets its state and
    waits for the next one, so that whoever materialises state with zero gradients leaves no trace in the training.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        defaults = {"rule": "memory", "split": 1, **defaults}
        self.check_group(defaults)
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError or RuntimeError for hyper-parameters this algorithm cannot use."""
        check_lr(group)
        check_range(group, "momentum", 0.0, 1.0)
        check_at_least(group, 0.0, "weight_decay")
        check_at_least(group, 1, "ns_steps", "split")
        check_choice(group, "rule", ("memory", "adamw"))
        check_choice(group, "output", get_args(OutputMap))
        check_choice(group, "ns_coefficients", get_args(Coefficients))
        check_betas(group, "adamw_betas")
        if not group["adamw_eps"] >= 0.0:
            raise ValueError(f"Invalid epsilon value: {group['adamw_eps']}")
        if group["output"] == "adam" and group["momentum"] == 1.0:
            raise ValueError(f"Invalid momentum value: {group['momentum']}, output='adam' needs less than 1")
        if group["differentiable"]:
            raise RuntimeError(
                f"{type(self).__name__} does not support `differentiable`: memories are written in place"
            )
        if group["fused"] and group["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the tensors kept for one parameter; the names are the checkpoint format.

        `param` stands for the parameter in the state's dtype and has no meaningful values. A tensor of its shape is
        handed to `update` as matrices, a scalar as [1, 1, 1]; any other must come with a leading dimension `split`.
        """
        raise NotImplementedError

    def features(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Return what is written in place of `grad` [B, m, n]: the gradient itself."""
        return grad

    def update(self, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Write [B, m, n] into the memory and return the direction to subtract.

        New values are assigned to the entries of `state`; arguments are not modified.
        """
        raise NotImplementedError

    def read(self, written: Tensor, memory: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the memory, or under Nesterov the memory as it would be after the same write once more."""
        return written.add(memory, alpha=group["momentum"]) if group["nesterov"] else memory

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self.check_group(group)
            for param in group["params"]:
                self._check_param(param, group)
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise

    def _check_param(self, param: Tensor, group: dict[str, Any]) -> None:
        if param.is_complex():
            raise RuntimeError(f"{type(self).__name__} does not support complex parameters")
        if has_memory(param, group) and param.numel() and param.ndim and len(param) % group["split"]:
            raise ValueError(f"split={group['split']} does not divide a parameter of size: {tuple(param.size())}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Perform a single optimization step and return the closure's loss, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # before anything is written
            for param in group["params"]:
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients, please consider SparseAdam instead"
                    )
        for group in self.param_groups:
            params: list[Tensor] = []
            self._init_group(group, params)
            self._step_group(group, params)
        return loss

    def _init_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Fill `params` with what this step moves. Under torch.compile this runs eagerly, before tracing."""
        for param in group["params"]:
            if param.grad is None or param.numel() == 0:
                continue
            if not self.state[param]:
                self.state[param].update(self.new_state(param, group))
                if _is_zero(param.grad):
                    continue
            params.append(param)

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter that has seen no gradient."""
        dtype = torch.promote_types(param.dtype, torch.float32)
        if not has_memory(param, group):
            return init_adamw_state(torch.empty_like(param, dtype=dtype))
        like = torch.empty_like(param, dtype=dtype, memory_format=torch.contiguous_format)
        state = {**self.init_state(like, group), **init_output_state(like, group)}
        if group["capturable"] and "step" in state:
            state["step"] = state["step"].to(param.device)
        return state

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        # low-precision parameters take the step in float32 and are rounded once
        masters = [param.to(torch.promote_types(param.dtype, torch.float32)) for param in params]
        vectors = [i for i, param in enumerate(params) if not has_memory(param, group)]
        if vectors:
            adamw_step(
                [masters[i] for i in vectors],
                [params[i].grad.to(masters[i].dtype) for i in vectors],  # type: ignore[union-attr]
                [self.state[params[i]] for i in vectors],
                group,
            )
        for stack in _stacks(params, group):
            self._step_stack(group, [params[i] for i in stack], [masters[i] for i in stack])
        for param, master in zip(params, masters, strict=True):
            if param.dtype != master.dtype:
                param.copy_(master)

    def _step_stack(self, group: dict[str, Any], params: list[Tensor], masters: list[Tensor]) -> None:
        """Step parameters of one shape; with m × n matrices and B = split · len(params), all is [B, m, n]."""
        shape = matrix_shape(params[0], group)
        dtype = masters[0].dtype
        states = [self.state[param] for param in params]
        for state in states:
            if "step" in state:
                state["step"] += 1
        grad = _stack([param.grad.to(dtype).reshape(shape) for param in params])  # type: ignore[union-attr]
        views = {name: [_as_matrices(state[name], params[0].shape, shape) for state in states] for name in states[0]}
        stacked = {name: _stack(tensors) for name, tensors in views.items()}
        before = dict(stacked)

        written = self.features(-grad if group["maximize"] else grad, stacked, group)
        direction = apply_output(self.update(written, stacked, group), written, stacked, group)

        for name, tensors in views.items():
            if stacked[name] is not before[name]:
                torch._foreach_copy_(tensors, torch.split(stacked[name], len(tensors[0])))
        _descend(masters, direction, group)


def _stacks(params: list[Tensor], group: dict[str, Any]) -> Iterator[list[int]]:
    """Indices of the parameters that have a memory, in stacks of one shape, dtype and device."""
    groups: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        if has_memory(param, group):
            groups.setdefault((param.shape, param.dtype, param.device), []).append(i)
    for members in groups.values():
        size = max(1, _STACK_NUMEL // params[members[0]].numel())
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _as_matrices(tensor: Tensor, param_shape: torch.Size, shape: tuple[int, int, int]) -> Tensor:
    if tensor.shape == param_shape and tensor.ndim:
        return tensor.view(shape)
    return tensor.view(1, 1, 1).expand(shape[0], 1, 1) if tensor.ndim == 0 else tensor


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _is_zero(grad: Tensor) -> bool:
    capturing = grad.is_cuda and torch.cuda.is_current_stream_capturing()
    return not capturing and not bool(grad.any())


def _descend(params: list[Tensor], direction: Tensor, group: dict[str, Any]) -> None:
    """W ← (1 − lr · weight_decay) · W − lr · D, in place, for parameters that share out the stack D."""
    lr, weight_decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        lr = lr.reshape(())
        direction, step = lr * direction, -1.0
    else:
        step = -lr
    blocks = torch.split(direction, len(direction) // len(params))
    if weight_decay != 0:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, [block.reshape(p.shape) for p, block in zip(params, blocks, strict=True)], alpha=step)
