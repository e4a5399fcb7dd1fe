"""The inputs of a model's layers, as what an optimizer keyed by them needs: directions, not sizes.

    X̂   = rows of the layer's input, each of length 1              a sample of the step's tokens
    K   = X̂ / ‖X̂‖_F                                                the keys; or their Gram, whichever is smaller
    Σ   = KᵀK = mean x̂ x̂ᵀ                                          trace 1

A gradient does not tell which inputs it came from, so forward hooks look at them. Only sums are kept, and only until
the optimizer has stepped: tr X̂ᵀX̂ is the number of tokens, so that adding Grams, over micro-batches, over the uses of a
tied weight or over ranks, and dividing by the trace is the mean over all of them.
Nested Learning, arXiv:2512.24695, Eq. 34 and 57, where the keys are layer inputs.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .layer_inputs import number_of_rows, reading, spread_places, unit_rows, usual_sample


class InputKeys(NamedTuple):
    """One weight's keys K [G, N, n] or their Gram Σ [G, n, n], for the G groups of a convolution; the other is None."""

    rows: Tensor | None
    gram: Tensor | None


def capture_inputs(
    model: nn.Module,
    params: Iterable[Any] | None = None,
    *,
    every: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
) -> "InputCapture":
    """Watch what goes into the linear layers and convolutions of `model`, for the optimizers that take `inputs`.

    Counts every forward pass that can be trained on: in training mode, with gradients enabled, of a weight that needs
    one; a pass that activation checkpointing repeats counts once. Compiled models need the hooks before their first
    call, and then keep Grams only.

    Keeps, from the forward pass to the step, the smaller of two float32 tensors for each input: the sampled rows, or
    their n × n Gram. A layer with an input of N tokens and n features costs 2 N n² / `every` FLOPs where the Gram is
    taken (its forward and backward take 6 N m n), and nearly nothing where it is not. Layers called with the same
    tensor in a row share this.

    Args:
        model: bare or wrapped (DDP, FSDP2). The weights of `nn.Linear` and `nn.Conv1d` to `nn.Conv3d` are watched, not
            those that are used without a call of their module, as in `nn.MultiheadAttention`.
        params: the parameters or parameter groups to watch, without groups of `rule="adamw"`; by default all.
        every: take one token (a patch, for a convolution) of so many, at fixed places that do not line up with
            sequences. The Gram is a mean over tokens: its error falls with the root of their number, its cost with the
            number. By default 8, and for a kernel of k places 8 k, which looks at the same share of the numbers.
        process_group: the ranks that see other data, whose Grams are summed at the step; by default all ranks, if
            `torch.distributed` is initialised. Each step reduces n² numbers per layer.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if there is nothing to watch, or `every` is no whole number of at least 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> capture = capture_inputs(model, every=1)
        >>> model(torch.ones(3, 4)).mean().backward()
        >>> round(capture.gram(model[0].weight).trace().item(), 4)
        1.0
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture_inputs takes a module, got {type(model).__name__}")
    if every is not None and (not isinstance(every, Integral) or isinstance(every, bool) or every < 1):
        raise ValueError(f"Invalid every value: {every}")
    wanted = None if params is None else set(_flatten(params))
    modules = [
        module
        for module in model.modules()
        if isinstance(module, (nn.Linear, _ConvNd)) and not isinstance(module, _ConvTransposeNd)
        if isinstance(module._parameters.get("weight"), nn.Parameter)
        if wanted is None or module.weight in wanted
    ]
    if not modules:
        raise ValueError("the model has no linear layer or convolution to capture the inputs of")
    return InputCapture(modules, None if every is None else int(every), process_group)


class InputCapture:
    """What `capture_inputs` returns, for an optimizer's `inputs`. Leaving its `with` block removes the hooks."""

    def __init__(
        self, modules: Iterable[Any] = (), every: int | None = None, process_group: "dist.ProcessGroup | None" = None
    ) -> None:
        self._every, self._process_group = every, process_group
        self._seen = {module: _Sum() for module in modules}  # by module: a sharding wrapper exchanges its weight
        self._ready: dict[Tensor, _Sum] = {}  # by weight, summed over ranks
        self._forward: set[Any] = set()  # what was called outside of backward since the last step
        self._latest: tuple[Any, ...] | None = None  # the input seen last, how it was read, and its rows
        self._places: dict[Any, Tensor] = {}  # which rows are taken of so many
        self._handles = [module.register_forward_hook(self._observe, with_kwargs=True) for module in self._seen]

    def remove(self) -> None:
        """Take the hooks off the model and forget everything."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def __enter__(self) -> "InputCapture":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        return InputCapture, ()  # copies of the model, its moving average among them, capture nothing

    def clear(self) -> None:
        """Forget the inputs seen since the last step, as `zero_grad` forgets gradients: for a step that is skipped."""
        self._forget()
        self._ready.clear()
        for module in self._seen:
            self._seen[module] = _Sum()

    def gram(self, weight: Tensor) -> Tensor:
        """Return Σ [n, n] of the inputs since the last step, [G, n, n] for a grouped convolution.

        Every rank must ask. Raises KeyError for a weight that has seen none.
        """
        self.collect()
        rows, gram = self.keys(weight)
        return (gram if rows is None else _gram(rows)).squeeze(0)  # type: ignore[union-attr]

    def collect(self) -> None:
        """Make what has been seen ready for `keys`: summed over the uses of a tied weight, and over ranks."""
        self._forget()
        seen = self._over_ranks() if dist.is_available() and dist.is_initialized() else self._seen
        for module, inputs in seen.items():
            if not inputs.empty:
                self._ready.setdefault(module.weight, _Sum()).merge(inputs)
                self._seen[module] = _Sum()

    def __contains__(self, weight: object) -> bool:
        return weight in self._ready

    def keys(self, weight: Tensor) -> InputKeys:
        """Return the collected keys of a weight, or raise KeyError."""
        return self._ready[weight].keys()

    def discard(self, weight: Tensor) -> None:
        """Forget what was collected for a weight."""
        self._ready.pop(weight, None)

    def _forget(self) -> None:
        """Drop what is of use within a step; an optimizer may step inside backward, before the last second pass."""
        self._latest = None
        self._places.clear()
        if not _in_backward():
            self._forward.clear()

    def _over_ranks(self) -> "dict[Any, _Sum]":
        """Return the sums over all ranks of what each has seen; a layer that none has seen is left out."""
        group = self._process_group
        if dist.get_world_size(group) == 1:
            return self._seen
        device = next(iter(self._seen)).weight.device
        used = torch.tensor([not inputs.empty for inputs in self._seen.values()], dtype=torch.int32, device=device)
        dist.all_reduce(used, group=group)
        summed, under_way = {}, []
        for (module, inputs), ranks in zip(self._seen.items(), used.tolist(), strict=True):
            if ranks:
                gram = inputs.total(module).clone()  # other layers may hold the same tensor
                under_way.append(dist.all_reduce(gram, group=group, async_op=True))  # while the next is summed up
                summed[module] = _Sum(gram)
        for reduction in under_way:
            reduction.wait()
        return summed

    def _observe(self, module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object) -> None:
        if not (module.training and torch.is_grad_enabled() and module in self._seen and module.weight.requires_grad):
            return
        inputs, x = self._seen[module], args[0] if args else kwargs["input"]
        if isinstance(x, DTensor):
            raise RuntimeError(
                "capture_inputs does not support tensor parallelism, where a layer's inputs are a DTensor; build the "
                "optimizer without inputs= and with missing='gradient'"
            )
        compiling = torch.compiler.is_compiling()
        if not compiling:
            if not _in_backward():  # where a reentrant checkpoint's first pass, without gradients, is not seen
                self._forward.add(module)
            elif module in self._forward:  # a checkpoint's second pass
                return
        with torch.no_grad(), _full_precision(x.device.type):
            if compiling:  # equal products are merged by the compiler
                places = spread_places(number_of_rows(module, x), self._every_of(module), x.device)
                inputs.add_gram(_gram(unit_rows(module, x.detach(), places)))
            else:
                inputs.add(self._rows(module, x))

    def _every_of(self, module: Any) -> int:
        return usual_sample(module) if self._every is None else self._every

    def _rows(self, module: Any, x: Tensor) -> "_Rows":
        """The rows of an input, the same object for layers that are called with it in a row."""
        how = x._version, reading(module)
        if self._latest is not None and self._latest[0]() is x and self._latest[1] == how:
            return self._latest[2]
        asked = number_of_rows(module, x), self._every_of(module), x.device
        if asked not in self._places:
            self._places[asked] = spread_places(*asked)
        rows = _Rows(unit_rows(module, x.detach(), self._places[asked]))
        self._latest = ref(x), how, rows
        return rows


class _Rows:
    """Unit rows [G, N, n] of one input, and their Gram once somebody has asked for it."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._gram: Tensor | None = None

    def gram(self) -> Tensor:
        if self._gram is None:
            self._gram = _gram(self.rows)
        return self._gram


class _Sum:
    """The inputs of one layer: rows while they are no more than n, then the sum of their Grams.

    Tensors are replaced, never written, because layers share them.
    """

    def __init__(self, gram: Tensor | None = None) -> None:
        self.rows: list[_Rows] = []
        self.total_gram = gram
        self._keys: InputKeys | None = None

    @property
    def empty(self) -> bool:
        return not self.rows and self.total_gram is None

    def add(self, rows: _Rows) -> None:
        self._keys = None
        self.rows.append(rows)
        if self.total_gram is not None or sum(part.rows.shape[-2] for part in self.rows) > rows.rows.shape[-1]:
            self._fold()

    def add_gram(self, gram: Tensor) -> None:
        self._keys = None
        self.total_gram = gram if self.total_gram is None else self.total_gram + gram

    def merge(self, other: "_Sum") -> None:
        if other.total_gram is not None:
            self.add_gram(other.total_gram)
            self._fold()
        for rows in other.rows:
            self.add(rows)

    def _fold(self) -> None:
        for rows in self.rows:
            self.add_gram(rows.gram())
        self.rows = []

    def total(self, module: Any) -> Tensor:
        """The sum of Grams, zero for a layer that this rank has not called."""
        self._fold()
        if self.total_gram is None:
            weight, groups = module.weight, getattr(module, "groups", 1)
            n = math.prod(weight.shape[1:])
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.total_gram = torch.zeros(groups, n, n, dtype=dtype, device=weight.device)
        return self.total_gram

    def keys(self) -> InputKeys:
        if self._keys is None:
            if self.total_gram is None:
                rows = torch.cat([part.rows for part in self.rows], -2)
                self._keys = InputKeys(rows / torch.linalg.matrix_norm(rows, keepdim=True).clamp(min=1), None)
            else:  # the trace is the number of tokens; 1 instead of none
                trace = self.total_gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
                self._keys = InputKeys(None, self.total_gram / trace.clamp(min=1))
        return self._keys


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _full_precision(device: str) -> AbstractContextManager[Any]:
    """Switch autocast off where it is on: entering its context costs as much as a small Gram."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _flatten(params: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors among parameters, named parameters, or groups of them; of AdamW's groups none."""
    for each in params:
        if isinstance(each, dict):
            if each.get("rule") != "adamw":
                yield from _flatten([each["params"]] if isinstance(each["params"], Tensor) else each["params"])
        else:
            yield each[1] if isinstance(each, tuple) else each


def _gram(rows: Tensor) -> Tensor:  # [G, N, n] -> [G, n, n]
    return rows.mT @ rows
