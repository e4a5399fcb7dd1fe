"""The inputs that all ranks have seen: summed while backward runs where DDP allows it, and the rest at the step.

    S   = Σ over ranks S_r,     S_r = X̂_rᵀX̂_r        of each layer; zero on a rank that has not called it

    forward          ┃ backward                                   ┃ step
    S_r of the ranks ┃ all-reduce of S, then DDP's of gradients   ┃ wait for S; whatever was seen since: reduced here

The order of collectives must be the same on all ranks. When the forward pass of the module inside DDP ends, every rank
has launched those of the step before and none of this backward, whose buckets depend on what each rank has called; so
this is where the sums are sent.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .input_sums import InputSum, gram_dtype, gram_size


class SumsOverRanks:
    """Moves what was seen, by layer, out of `seen` and into sums over ranks."""

    def __init__(self, seen: dict[Any, InputSum], process_group: "dist.ProcessGroup | None") -> None:
        self._seen, self._process_group = seen, process_group
        self._under_way: list[_Buffer] = []
        self._arrived: dict[Any, InputSum] = {}
        self._late: set[Any] = set()  # layers that no rank had called when their sums were sent

    def send(self, model: nn.Module) -> None:
        """Start the sum over ranks, at the end of a forward pass of `model`, if DDP will reduce its gradients.

        A layer that no rank has called by then, such as one that a reentrant checkpoint hides, sends zeros once, and
        from then on waits for the step. So does all where DDP itself is compiled: graphs hold no collectives of ours.
        """
        if not torch.compiler.is_compiling() and _reduces_gradients_of(model, self._process_group):
            self._receive()  # no more than one buffer is under way, and all ranks know the same of late layers
            layers = [layer for layer in self._seen if layer.weight.requires_grad and layer not in self._late]
            self._under_way = [
                _Buffer(self._take(members), dtype, device, self._process_group)
                for (dtype, device), members in _by_kind(layers).items()
            ]

    def collect(self) -> list[tuple[Any, InputSum]]:
        """Take all that was seen since the last time, summed over ranks. Every rank must ask."""
        self._receive()
        arrived, self._arrived = list(self._arrived.items()), {}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self._process_group) > 1:
            return arrived + self._reduce_now()
        return arrived + list(self._take([layer for layer, inputs in self._seen.items() if not inputs.empty]).items())

    def drop(self) -> None:
        """Forget what was sent. What is under way ends by itself: to wait for ranks that have failed would hang."""
        self._under_way, self._arrived = [], {}

    def _take(self, layers: list[Any]) -> dict[Any, InputSum]:
        taken = {layer: self._seen[layer] for layer in layers}
        self._seen.update((layer, InputSum()) for layer in layers)
        return taken

    def _receive(self) -> None:
        """Wait for what is under way, and add it to what has come since the last step."""
        for buffer in self._under_way:
            for layer, gram in buffer.wait():
                if gram is None:
                    self._late.add(layer)
                else:
                    self._arrived.setdefault(layer, InputSum()).add_gram(gram)
        self._under_way = []

    def _reduce_now(self) -> list[tuple[Any, InputSum]]:
        """Sum over ranks at once, without the layers that no rank has called."""
        device = next(iter(self._seen)).weight.device
        called = torch.tensor([not inputs.empty for inputs in self._seen.values()], dtype=torch.int32, device=device)
        dist.all_reduce(called, group=self._process_group)
        layers = [layer for layer, ranks in zip(self._seen, called.tolist(), strict=True) if ranks]
        sums, under_way = [], []
        for layer, inputs in self._take(layers).items():
            gram = inputs.total()
            if gram is None:
                gram = torch.zeros(gram_size(layer), dtype=gram_dtype(layer), device=layer.weight.device)
            else:
                gram = gram.clone()  # other layers may hold the same tensor
            under_way.append(dist.all_reduce(gram, group=self._process_group, async_op=True))  # beside the next sum
            sums.append((layer, InputSum(gram)))
        for reduction in under_way:
            reduction.wait()
        return sums


class _Buffer:
    """The Grams of layers, one behind the other and then how many ranks called each, on their way over ranks."""

    def __init__(
        self,
        sums: dict[Any, InputSum],
        dtype: torch.dtype,
        device: torch.device,
        process_group: "dist.ProcessGroup | None",
    ) -> None:
        sizes = [math.prod(gram_size(layer)) for layer in sums]
        numbers = torch.empty(sum(sizes) + len(sizes), dtype=dtype, device=device)
        *grams, self._called = numbers.split([*sizes, len(sizes)])
        self._called.fill_(1)
        self._grams: dict[Any, Tensor] = {}  # [G, n, n]
        for place, layer in enumerate(list(sums)):
            gram = self._grams[layer] = grams[place].view(gram_size(layer))
            total = sums.pop(layer).total()  # frees this rank's, before the next is made of its rows
            if total is None:
                gram.zero_()
                self._called[place].zero_()
            else:
                gram.copy_(total)
        self._work = dist.all_reduce(numbers, group=process_group, async_op=True)

    def wait(self) -> Iterator[tuple[Any, Tensor | None]]:
        """Each layer's sum over ranks, None where no rank has called it."""
        self._work.wait()
        for (layer, gram), ranks in zip(self._grams.items(), self._called.tolist(), strict=True):
            yield layer, gram if ranks else None


def _by_kind(layers: list[Any]) -> dict[tuple[torch.dtype, torch.device], list[Any]]:
    kinds: dict[tuple[torch.dtype, torch.device], list[Any]] = {}
    for layer in layers:
        kinds.setdefault((gram_dtype(layer), layer.weight.device), []).append(layer)
    return kinds


def _reduces_gradients_of(model: nn.Module, process_group: "dist.ProcessGroup | None") -> bool:
    """Whether this is a forward pass after which DDP, on the ranks of `process_group`, reduces gradients of `model`."""
    ddp = DistributedDataParallel._active_ddp_module  # None where the module is called without its wrapper
    return (
        ddp is not None
        and ddp.module is model
        and model.training
        and torch.is_grad_enabled()
        and ddp.require_backward_grad_sync
        and not in_backward()
        and ddp.process_group is (dist.group.WORLD if process_group is None else process_group)
        and dist.get_world_size(process_group) > 1
    )


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
