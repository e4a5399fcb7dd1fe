"""The inputs of a model's layers, as what an optimizer keyed by them needs: directions, not sizes.

    X̂   = rows of the layer's input, each of length 1              a sample of the step's tokens
    K   = X̂ / ‖X̂‖_F                                                the keys; or their Gram, whichever is smaller
    Σ   = KᵀK = mean x̂ x̂ᵀ                                          trace 1

A gradient does not tell which inputs it came from, so forward hooks look at them. Only sums are kept
(`input_sums.py`), over micro-batches, over the uses of a tied weight and over ranks (`sums_over_ranks.py`), and only
until the optimizer has stepped.
Nested Learning, arXiv:2512.24695, Eq. 34 and 57, where the keys are layer inputs.
"""

from collections.abc import Iterable
from numbers import Integral
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parallel import DistributedDataParallel

from .input_sums import InputKeys, InputSum, UnitRows, full_precision, gram_of
from .layer_inputs import number_of_rows, reading, spread_places, unit_rows, usual_sample
from .sums_over_ranks import SumsOverRanks, in_backward


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

    Over ranks Grams are summed, n² numbers per layer. Under DDP that is one asynchronous all-reduce, or one for each
    dtype, which starts when a forward pass ends whose gradients DDP will reduce (with `no_sync`, the last of a step)
    and runs beside backward. It takes a copy, into one buffer in which every layer has a Gram, n / m times the size of
    its weight [m, n] in float32, even where rows were few or a Gram was shared; the buffer lives until the last of them
    is used. What is seen later, and everything without DDP or where DDP itself is compiled, is summed at the step.

    All ranks must make the same training forward passes through DDP, though they may call different layers, and step or
    `clear()` together. A pass of one rank alone, to measure something, belongs under `model.eval()` or
    `torch.no_grad()`.

    Args:
        model: bare or wrapped (DDP, FSDP2). The weights of `nn.Linear` and `nn.Conv1d` to `nn.Conv3d` are watched, not
            those that are used without a call of their module, as in `nn.MultiheadAttention`.
        params: the parameters or parameter groups to watch, without groups of `rule="adamw"`; by default all.
        every: take one token (a patch, for a convolution) of so many, at fixed places that do not line up with
            sequences. The Gram is a mean over tokens: its error falls with the root of their number, its cost with the
            number. By default 8, and for a kernel of k places 8 k, which looks at the same share of the numbers.
        process_group: the ranks that see other data, whose Grams are summed; by default all ranks, if
            `torch.distributed` is initialised. Beside backward only if it is DDP's own.

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
    return InputCapture(model, modules, None if every is None else int(every), process_group)


class InputCapture:
    """What `capture_inputs` returns, for an optimizer's `inputs`. Leaving its `with` block removes the hooks."""

    def __init__(
        self,
        model: nn.Module | None = None,
        modules: Iterable[Any] = (),
        every: int | None = None,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        self._every = every
        self._seen = {module: InputSum() for module in modules}  # by module: a sharding wrapper exchanges its weight
        self._over_ranks = SumsOverRanks(self._seen, process_group)
        self._ready: dict[Tensor, InputSum] = {}  # by weight, summed over ranks
        self._forward: set[Any] = set()  # what was called outside of backward since the last step
        self._latest: tuple[Any, ...] | None = None  # the input seen last, how it was read, and its rows
        self._places: dict[Any, Tensor] = {}  # which rows are taken of so many
        self._handles = [module.register_forward_hook(self._observe, with_kwargs=True) for module in self._seen]
        if model is not None:  # last, so that a model that is one layer has been looked at
            inner = model.module if isinstance(model, DistributedDataParallel) else model
            self._handles.append(inner.register_forward_hook(self._end_forward))

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
            self._seen[module] = InputSum()
        self._over_ranks.drop()

    def gram(self, weight: Tensor) -> Tensor:
        """Return Σ [n, n] of the inputs since the last step, [G, n, n] for a grouped convolution.

        Every rank must ask. Raises KeyError for a weight that has seen none.
        """
        self.collect()
        rows, gram = self.keys(weight)
        return (gram if rows is None else gram_of(rows)).squeeze(0)  # type: ignore[union-attr]

    def collect(self) -> None:
        """Make what has been seen ready for `keys`: summed over the uses of a tied weight, and over ranks."""
        self._forget()
        for module, inputs in self._over_ranks.collect():
            self._ready.setdefault(module.weight, InputSum()).merge(inputs)

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
        if not in_backward():
            self._forward.clear()

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
            if not in_backward():  # where a reentrant checkpoint's first pass, without gradients, is not seen
                self._forward.add(module)
            elif module in self._forward:  # a checkpoint's second pass
                return
        with torch.no_grad(), full_precision(x.device.type):
            if compiling:  # equal products are merged by the compiler
                places = spread_places(number_of_rows(module, x), self._every_of(module), x.device)
                inputs.add_gram(gram_of(unit_rows(module, x.detach(), places)))
            else:
                inputs.add(self._rows(module, x))

    def _end_forward(self, model: nn.Module, args: object, output: object) -> None:
        self._over_ranks.send(model)

    def _every_of(self, module: Any) -> int:
        return usual_sample(module) if self._every is None else self._every

    def _rows(self, module: Any, x: Tensor) -> UnitRows:
        """The rows of an input, the same object for layers that are called with it in a row."""
        how = x._version, reading(module)
        if self._latest is not None and self._latest[0]() is x and self._latest[1] == how:
            return self._latest[2]
        asked = number_of_rows(module, x), self._every_of(module), x.device
        if asked not in self._places:
            self._places[asked] = spread_places(*asked)
        rows = UnitRows(unit_rows(module, x.detach(), self._places[asked]))
        self._latest = ref(x), how, rows
        return rows


def _flatten(params: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors among parameters, named parameters, or groups of them; of AdamW's groups none."""
    for each in params:
        if isinstance(each, dict):
            if each.get("rule") != "adamw":
                yield from _flatten([each["params"]] if isinstance(each["params"], Tensor) else each["params"])
        else:
            yield each[1] if isinstance(each, tuple) else each
