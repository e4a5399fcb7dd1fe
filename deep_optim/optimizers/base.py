"""The loop every optimizer here shares; an algorithm is the methods it leaves open.

    written   = features(G)                       what the memory is written with
    direction = update(written, state)            write it, and read the memory
    W ← (1 − lr · weight_decay) · W − lr · (σ(direction) + pull(W))

A group is stepped in stacks [B, m, n]: parameters of one shape are handed to `update` together, so that the equation
is written once and a step has few launches. State is kept per parameter and never shows the stacking. Sharded matrices
are stepped whole, each on one rank (`sharding`), or where they are, if `entrywise` says that nothing needs them whole.
"""

from collections.abc import Callable
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deep_optim.ops.newton_schulz import Coefficients

from .adamw import adamw_step, init_adamw_state
from .checkpoint import ExactStateMixin
from .counters import count_step
from .descent import descend_along, descend_stack
from .in_place import InPlaceMixin
from .matrices import has_memory, matrix_shape
from .output_map import OutputMap, apply_output, init_output_state
from .rounding import COMPENSATION, exact_dtype, init_compensation
from .sharded_step import entry_by_entry, matrix_by_matrix
from .sharding import Loads, can_spread, matrix_cost, whole
from .stacks import as_matrices, matrices, stack, stacks, unstack
from .validation import check_at_least, check_betas, check_choice, check_count, check_lr, check_range

# The older name is for torch before it had the newer one, and warns where it has both.
_check_graph_capture: Callable[[torch.optim.Optimizer], None] = (
    getattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", None)
    or torch.optim.Optimizer._cuda_graph_capture_health_check
)


class MemoryOptimizer(InPlaceMixin, ExactStateMixin, torch.optim.Optimizer):
    """Descend along what a memory of past gradients answers.

    Subclasses define `init_state` and `update`, may define `features`, `observed`, `output`, `pull` and `check_group`,
    and never override `step`.
    Which parameters have a memory: all under `output="identity"`, else those with two dimensions or more, read as
    matrices [rows, rest]; the others, and groups with `rule="adamw"`, are stepped by torch's AdamW. A group with
    `split=s` has its matrices cut into s blocks of rows, each with a memory of its own (fused query, key and value).

    State is float32, float64 for float64 parameters. It is made at a parameter's first gradient; if that is all zero
    and so is lr, nothing else happens, so that whoever materialises state that way leaves no trace in the training.
    """

    group_defaults: ClassVar[dict[str, Any]] = {"rule": "memory", "split": 1}
    per_parameter: ClassVar[tuple[str, ...]] = (COMPENSATION,)  # names of state that stay out of the stacks
    read_only: ClassVar[tuple[str, ...]] = ()  # names of state that stacks read and never write
    reads_weights: ClassVar[bool] = False  # whether `pull` does
    _loads: Loads  # of the step under way

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self.check_group({**self.group_defaults, **defaults})
        super().__init__(params, defaults)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError or RuntimeError for hyper-parameters this algorithm cannot use."""
        check_lr(group)
        check_range(group, "momentum", 0.0, 1.0)
        check_at_least(group, 0.0, "weight_decay")
        check_count(group, "ns_steps", "split")
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

    def check_gradients(self, group: dict[str, Any]) -> None:
        """Raise RuntimeError for gradients this algorithm cannot use; called for every group before any is stepped."""
        for param in group["params"]:
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients, please consider SparseAdam instead"
                )

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

    def observed(self, params: list[Tensor], group: dict[str, Any]) -> dict[str, Tensor]:
        """Return what the other methods are to find in `state` for these parameters in this step, and never again."""
        return {}

    def pull(
        self, params: list[Tensor], written: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> Tensor | None:
        """Return what draws at the weights [B, m, n] past the output map, or None for nothing but `weight_decay`.

        Like it, it is taken at the old weights (`matrices` stacks `params`), and is not turned around by `maximize`.
        """
        return None

    def entrywise(self, group: dict[str, Any]) -> bool:
        """Return whether `features` and `update` work entry by entry, and nothing follows but the output map."""
        return False

    def cost(self, param: Tensor, group: dict[str, Any]) -> float:
        """Return what a matrix costs beside others of the group, by which sharded ones are spread over the ranks."""
        return matrix_cost(param)

    def read(self, written: Tensor, memory: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the memory, or under Nesterov the memory with the same write added once more."""
        return written.add(memory, alpha=group["momentum"]) if group["nesterov"] else memory

    def output(self, direction: Tensor, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """Return σ(`direction`), all [B, m, n]: what becomes of the memory's answer before it moves the weights."""
        return apply_output(direction, written, state, group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for name, default in self.group_defaults.items():
            if isinstance(param_group, dict):  # else torch refuses it
                param_group.setdefault(name, default)
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
        if has_memory(param, group) and param.ndim > 1 and len(param) % group["split"]:
            raise ValueError(f"split={group['split']} does not divide a parameter of size: {tuple(param.size())}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Perform a single optimization step and return the closure's loss, if there is one."""
        _check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # before anything is written
            self.check_gradients(group)
        self._loads = {}
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
                if only_makes_state(param, group):
                    continue
            params.append(param)

    def new_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter that has seen no gradient."""
        like = torch.empty_like(param, dtype=exact_dtype(param))
        compensation = init_compensation(param, group)
        if not has_memory(param, group):
            return init_adamw_state(like, group) | compensation
        state = {**self.init_state(like, group), **init_output_state(like, group), **compensation}
        if group["capturable"] and "step" in state:
            state["step"] = state["step"].to(param.device)
        return state

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        vectors = [param for param in params if not has_memory(param, group)]
        if vectors:
            adamw_step(vectors, [self.state[param] for param in vectors], group)
        having = [param for param in params if has_memory(param, group)]
        sharded = [param for param in having if can_spread(param, param.grad)]
        if sharded:
            self._step_sharded(group, sharded)
        alike: dict[Any, list[Tensor]] = {}  # by the names of their state, which options may have changed between
        for param in having:
            if not can_spread(param, param.grad):
                alike.setdefault(tuple(self.state[param]), []).append(param)
        for members in alike.values():
            for stacked in stacks(members):
                self._step_stack(group, stacked)

    def _step_stack(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Step parameters of one shape; with m × n matrices and B = split · len(params), all is [B, m, n]."""
        states = [self.state[param] for param in params]
        count_step(states)
        grads = [param.grad for param in params if param.grad is not None]  # all have one
        if self.addressable(params, grads, states, group):  # asked once for a stack in a step
            self.step_in_place(params, grads, states, group)
        else:
            descend_stack(params, states, self.direction(group, params, params, grads, states), group)

    def direction(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        weights: list[Tensor],  # of `params`, whole
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
        read: Tensor | None = None,
    ) -> Tensor:  # [B, m, n]
        """Write the gradients into the memories and return what the weights are to be moved against.

        `read` is what `write_in_place` returned, if that has been done.
        """
        shape = matrix_shape(grads[0], group)
        done = self.per_parameter if read is None else (*self.per_parameter, *self.in_place)
        names = [name for name in states[0] if name not in done]
        before = {name: stack([as_matrices(state[name], grads[0], shape) for state in states]) for name in names}
        stacked = before | self.observed(params, group)

        if read is not None:
            written = read  # nobody looks at it
        else:
            grad = matrices(grads, shape, exact_dtype(grads[0]))
            written = self.features(-grad if group["maximize"] else grad, stacked, group)
            read = self.update(written, stacked, group)
        direction = self.output(read, written, stacked, group)
        pull = self.pull(weights, written, stacked, group)

        for name in names:
            if stacked[name] is not before[name]:
                unstack([state[name] for state in states], stacked[name])
        return direction if pull is None else direction + pull

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # ranks wait for one another
    def _step_sharded(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Step sharded parameters of any shapes."""
        states = [self.state[param] for param in params]
        count_step(states)
        directions = (entry_by_entry if self.entrywise(group) else matrix_by_matrix)(self, group, params)
        descend_along(params, states, directions, group)


def capturing(param: Tensor) -> bool:
    """Return whether a CUDA graph is recording, so that nothing on the device can be asked about."""
    return param.is_cuda and torch.cuda.is_current_stream_capturing()


def only_makes_state(param: Tensor, group: dict[str, Any]) -> bool:
    """Return whether a parameter's first gradient is a checkpointer's, which has state made by zeros at lr = 0."""
    return not capturing(param) and group["lr"] == 0 and not whole(param.grad).any()  # type: ignore[arg-type]
