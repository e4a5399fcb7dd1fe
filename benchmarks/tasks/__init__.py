"""What the optimizers are measured on. A task is the small object described by `Task`; `make_task` finds it by name."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
TASKS = ("text", "vision", "regression", "gpt")


class Task(Protocol):
    """Everything random comes from the seed; the validation set is the same for all seeds and optimizers."""

    name: str  # the key of the search spaces: "text", "vision-vit", ...
    metric: str  # what `evaluate` returns under "loss", for axes and tables
    steps: int  # customary length of a run
    aux_lr: float  # AdamW's rate for embeddings, head, norms and biases under every matrix optimizer
    weight_decay: float  # of matrices; `param_groups` leaves vectors undecayed
    memory: tuple[str, ...]  # names of what `param_groups` would not take for a hidden matrix but should

    def model(self, seed: int) -> nn.Module: ...
    def batches(self, seed: int, steps: int) -> Iterator[Batch]: ...
    def loss(self, model: nn.Module, batch: Batch) -> Tensor: ...
    def evaluate(self, model: nn.Module) -> dict[str, float]: ...
    def describe(self) -> dict[str, Any]: ...


def make_task(name: str, **options: Any) -> Task:
    """The task called `name`; the options are those of its class."""
    if name == "text":
        from .text import Text

        return Text(**options)
    if name == "vision":
        from .vision import Vision

        return Vision(**options)
    if name == "regression":
        from .regression import Regression

        return Regression(**options)
    if name == "gpt":
        from .gpt import GPT

        return GPT(**options)
    raise ValueError(f"no task named {name!r}; there are: {', '.join(TASKS)}")
