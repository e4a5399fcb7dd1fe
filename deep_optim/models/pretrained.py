"""Ad-hoc level stacking: the MLPs of a trained model become levels of a continuum memory.

    f_ℓ, W₀  ←  the ℓ-th MLP of the model and its weights,       V ← 0

Nested Learning, arXiv:2512.24695, section 7.3. Around each MLP stays what the model has there: attention, norms,
shortcuts. With V = 0 a level finds nothing to correct, so that the model begins as it was at any inner learning rate;
what is worth writing is for continued training to find. At a rate of zero the MLP itself is called, and logits are the
model's bit for bit.

The blocks may be any modules from [B, T, D] to [B, T, D]: their gradients come from torch.func, and can be
differentiated.
"""

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .continuum_level import ContinuumLevel, check_chunk_sizes, check_learning, level_rates
from .sizes import check_sizes
from .state import State, check_names


class ModuleBlock(nn.Module):
    """Any module from [B, T, D] to [B, T, D] as the block of a level; all its parameters are written in context."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that a memory starts from."""
        return dict(self.module.named_parameters())

    def read(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:  # [B, n, D] -> [B, n, D]
        """Return the module's answer under the given weights, one set or one per sample."""
        name, own = next(self.module.named_parameters())
        if weights[name].ndim == own.ndim:
            return torch.func.functional_call(self.module, dict(weights), x)
        return torch.func.vmap(self._answer, randomness="different")(dict(weights), x)

    def gradients(
        self, weights: Mapping[str, Tensor], key: Tensor, value: Tensor, rate: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return f(key), and the gradients of ½ Σ_t rate_t ‖f(key_t) − value_t‖², for every sample's own weights."""
        gradient = torch.func.grad(self._objective, has_aux=True)
        gradients, answer = torch.func.vmap(gradient, randomness="different")(dict(weights), key, value, rate)
        return answer, gradients

    def _answer(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:  # [n, D] -> [n, D]
        return torch.func.functional_call(self.module, weights, x[None])[0]

    def _objective(self, weights: dict[str, Tensor], key: Tensor, value: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        answer = self._answer(weights, key)
        return 0.5 * (rate * (answer - value).square().sum(-1)).sum(), answer


class _Run(NamedTuple):
    """One call of a model: the states that its levels begin with and, as they are reached, end with."""

    before: State | None
    after: State
    write: bool


_run: ContextVar[_Run | None] = ContextVar("_run", default=None)


class InContextMLP(nn.Module):
    """A level where a model expects its MLP: x [B, T, D] to y [B, T, D], the state passed beside the model.

    Called outside of `PretrainedContinuum`, by a trainer that knows the bare model say, it begins every call anew.
    """

    def __init__(self, name: str, level: ContinuumLevel) -> None:
        super().__init__()
        self.name, self.level = name, level

    def forward(self, x: Tensor) -> Tensor:
        run = _run.get()
        if run is None:
            return self.level(x)[0]
        if self.name in run.after:
            raise RuntimeError(
                f"{self.name} was called twice in one call of the model; a level reads one stream of tokens"
            )
        before = None if run.before is None else run.before[self.name]
        y, run.after[self.name] = self.level(x, before, write=run.write)
        return y


class PretrainedContinuum(nn.Module):
    """A trained model whose MLPs learn in context: `output, state = continuum(*args, state=state, **kwargs)`.

    `ContinuumMemory.from_pretrained_mlps` makes it. Works on every model whose MLPs are children called `name`, such as
    the decoders of Hugging Face's transformers. The model is changed: each such child now holds the MLP as
    `level.block.module`. Its other arguments and results, caches too, pass through as they are.

    A token of padding is a token to the levels. A model that checkpoints activations computes them again after
    the call, from the beginning and writing: leave `state` and `write` at their defaults then. The state of a level has
    the size of its MLP, for every sample.

    Args:
        model: a trained model.
        chunk_sizes: of its MLPs in order; fewer than there are repeat, so that neighbours differ.
        name: of the children that are MLPs.
        dim: their features; by default `model.config.hidden_size`, or the `in_features` of a layer in the first.
        inner_lr, retention, max_step: of `ContinuumMemory`; rates belong to chunk sizes.

    Raises:
        ValueError: if no child has the name; one of them has no parameters, is part of another, or stands in two
            places; `dim` cannot be found; or a number is out of range. The model is unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        chunk_sizes: Sequence[int],
        *,
        name: str = "mlp",
        dim: int | None = None,
        inner_lr: float | Sequence[float] = 1.0,
        retention: float = 0.95,
        max_step: float = 0.1,
    ) -> None:
        super().__init__()
        check_chunk_sizes(chunk_sizes)
        rates = level_rates(inner_lr, len(chunk_sizes))
        check_learning(retention, max_step)
        if any(isinstance(module, InContextMLP) for module in model.modules()):
            raise ValueError("the model's MLPs are levels already")
        places = _places(model, name)
        if dim is None:
            dim = _width(model, model.get_submodule(places[0]))
        check_sizes(dim=dim)
        self.model, self.places = model, places
        for index, path in enumerate(places):
            mlp, which = model.get_submodule(path), index % len(chunk_sizes)
            level = ContinuumLevel(
                ModuleBlock(mlp),
                dim,
                chunk_sizes[which],
                inner_lr=rates[which],
                retention=retention,
                max_step=max_step,
            )
            if level.inner_lr:
                nn.init.zeros_(level.target.weight)
                weight = next(mlp.parameters())
                level.target.to(weight)
                level.gate.to(weight)
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, name, InContextMLP(path, level))

    def forward(self, *args: Any, state: State | None = None, write: bool = True, **kwargs: Any) -> tuple[Any, State]:
        """Call the model on `args` and `kwargs`.

        Args:
            state: what an earlier call returned, for the same samples; None begins.
            write: whether the MLPs learn.

        Returns:
            What the model returns, and the state of its MLPs, a plain dict of dicts under their names.

        Raises:
            ValueError: if `state` is another model's or batch's.
            RuntimeError: if the model calls an MLP twice, or not at all.
        """
        if state is not None:
            check_names(state, self.places)
        run = _Run(state, {}, write)
        token = _run.set(run)
        try:
            output = self.model(*args, **kwargs)
        finally:
            _run.reset(token)
        if unreached := [name for name in self.places if name not in run.after]:
            raise RuntimeError(f"the model did not call {unreached[0]}, which would miss these tokens for good")
        return output, run.after


def _places(model: nn.Module, name: str) -> list[str]:
    """Return the paths of the children called `name`, each a module of its own with parameters."""
    found: dict[nn.Module, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path.rpartition(".")[2] != name:
            continue
        if module in found:
            raise ValueError(f"{found[module]} and {path} are one module, and a level has one place in the chain")
        if next(module.parameters(), None) is None:
            raise ValueError(f"{path} has no parameters: there is nothing that a level could write")
        if outer := next((other for other in found.values() if path.startswith(f"{other}.")), None):
            raise ValueError(f"{path} is a part of {outer}, and both are called {name!r}")
        found[module] = path
    if not found:
        raise ValueError(f"the model has no module called {name!r}; pass the name of its MLPs as name=")
    return list(found.values())


def _width(model: nn.Module, mlp: nn.Module) -> int:
    """Return the features of a model, by its configuration or the first linear layer of an MLP."""
    configured = getattr(getattr(model, "config", None), "hidden_size", None)
    sizes = [layer.in_features for layer in mlp.modules() if isinstance(layer, nn.Linear)]
    if isinstance(configured, int):
        return configured
    if not sizes:
        raise ValueError("cannot tell the width of the model's MLPs; pass it as dim=")
    return sizes[0]
