"""The keys of optimizers whose memory is keyed by layer inputs: found for each parameter, or its gradient's instead.

    Σ   = mean x̂ x̂ᵀ                 of the inputs that `capture_inputs` has seen, each at length 1
    Σ   = GᵀG / ‖G‖_F²               of a gradient, where there are no inputs

For one sample, G = δ xᵀ, the two are the same matrix; for a batch the second weighs the inputs by their errors.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deep_optim.capture import InputCapture
from deep_optim.ops.frobenius import frobenius_norm
from deep_optim.ops.times_gram import times_gram

from .base import MemoryOptimizer, only_makes_state
from .matrices import has_memory
from .rounding import exact_dtype
from .validation import check_choice

Missing = Literal["error", "gradient"]

_ROWS, _GRAM = "input.rows", "input.gram"  # the names in `state`, for the time of a step


class InputKeyedOptimizer(MemoryOptimizer):
    """A `MemoryOptimizer` that knows the layer inputs of its parameters.

    Subclasses have a hyper-parameter `missing`: what a matrix whose layer was not captured does, "error" or "gradient".
    A vector is no layer's weight and always goes by its gradient.
    """

    _inputs: InputCapture | None = None  # of the class, so that copies and unpickled optimizers start without

    def __init__(self, params: ParamsT, defaults: dict[str, Any], inputs: InputCapture | None) -> None:
        super().__init__(params, defaults)
        self.inputs = inputs

    @property
    def inputs(self) -> InputCapture | None:
        """Where the layer inputs come from. A wire and no hyper-parameter: a copy of the optimizer has none."""
        return self._inputs

    @inputs.setter
    def inputs(self, inputs: InputCapture | None) -> None:
        if not (inputs is None or isinstance(inputs, InputCapture)):
            raise TypeError(f"inputs must be what capture_inputs(model) returns, got {type(inputs).__name__}")
        self._inputs = inputs

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_choice(group, "missing", get_args(Missing))

    def check_gradients(self, group: dict[str, Any]) -> None:
        super().check_gradients(group)
        if self._inputs is not None and group is self.param_groups[0]:  # once a step: ranks must agree on the number
            _collect(self._inputs)
        if group["missing"] == "error" and (missing := self._missing(group)):
            raise RuntimeError(
                f"{type(self).__name__} has no inputs of these parameters' layers: {', '.join(missing)}; pass "
                "inputs=capture_inputs(model), made before the forward pass, or missing='gradient', which keys them "
                "by their gradients; nothing has been stepped"
            )

    def _missing(self, group: dict[str, Any]) -> list[str]:
        """The matrices that would be stepped without their inputs, by name or size."""
        names = group.get("param_names") or [f"of size {tuple(param.size())}" for param in group["params"]]
        return [
            name
            for name, param in zip(names, group["params"], strict=True)
            if param.grad is not None and param.numel() and param.ndim > 1 and has_memory(param, group)
            if not self._has_inputs(param)
            if self.state.get(param) or not only_makes_state(param, group)
        ]

    def _has_inputs(self, param: Tensor) -> bool:
        return self._inputs is not None and param in self._inputs

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        if self._inputs is None:
            super()._step_group(group, params)
        else:
            self._step_captured(group, params)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the keys are other tensors, of other shapes, at every step
    def _step_captured(self, group: dict[str, Any], params: list[Tensor]) -> None:
        alike: dict[Any, list[Tensor]] = {}  # what is stacked must have keys of one kind and shape
        for param in params:
            kind = [(name, keys.shape) for name, keys in self.observed([param], group).items()]
            alike.setdefault(tuple(kind), []).append(param)
        for members in alike.values():
            super()._step_group(group, members)
        for param in group["params"]:
            self._inputs.discard(param)  # type: ignore[union-attr]

    def observed(self, params: list[Tensor], group: dict[str, Any]) -> dict[str, Tensor]:
        if not all(map(self._has_inputs, params)):
            return {}
        rows, grams = zip(*(self._inputs.keys(param) for param in params), strict=True)  # type: ignore[union-attr]
        name, parts = (_GRAM, grams) if rows[0] is None else (_ROWS, rows)
        return {name: (parts[0] if len(parts) == 1 else torch.cat(parts)).to(exact_dtype(params[0]))}

    def times_keys(self, matrix: Tensor, written: Tensor, state: dict[str, Tensor]) -> Tensor:  # [B, m, n]
        """Return `matrix` Σ: by the keys or by their Gram where inputs were captured, else by the gradient's."""
        if _ROWS in state:
            return _in_groups(matrix, state[_ROWS], times_gram)
        if _GRAM in state:
            return _in_groups(matrix, state[_GRAM], torch.matmul)
        return times_gram(matrix, written / frobenius_norm(written))


def _in_groups(matrix: Tensor, keys: Tensor, product: Any) -> Tensor:
    """Multiply each block of rows with its own keys: [B, m, n] is as many blocks as there are keys."""
    return product(matrix.reshape(len(keys), -1, matrix.shape[-1]), keys).reshape(matrix.shape)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # ranks are asked, and the host waits for their answer
def _collect(inputs: InputCapture) -> None:
    inputs.collect()
