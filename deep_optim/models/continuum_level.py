"""One level of a continuum memory: an MLP block that learns from its context, a chunk at a time.

    y_t  = f(W; x_t)                                        read, at the weights of the chunk's start
    v_t  = f(W₀; x_{t−1}) + V x_t                           what x_{t−1} should have been answered
    η_t  = inner_lr · 2 σ(⟨g, x_t⟩)
    G    = ∇_W 1/(2 C D) Σ_{t in chunk} η_t ‖f(W; x_{t−1}) − v_t‖²
    W   ← W₀ + retention · (W − W₀) − G / √(1 + (‖G‖ / (max_step ‖W₀‖))²)      when C tokens have come

Nested Learning, arXiv:2512.24695, Eq. 71 with an L2 objective. All gradients of a chunk are taken at the weights of its
start, so that they are one batched product; chunks are half-open, so that every token is in one. The paper leaves keys
and values open. Here a level learns to answer an input with what came next: `V` says what of the next input is worth
knowing, as a correction to what the learned initial weights W₀ answer, and `g` which inputs are worth a write. At W =
W₀ the error is −η_t V x_t, a learned local surprise in place of the loss's own. The key of the very first token is
zero.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .sizes import check_sizes, check_tokens
from .state import State, check_state, size_of, state_dtype

Weights = dict[str, Tensor]


class WritableBlock(Protocol):
    """What a level asks of the block it writes into; weights are tensors by name, one set or one per sample."""

    def __call__(self, x: Tensor) -> Tensor: ...
    def weights(self) -> dict[str, Tensor]: ...
    def read(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor: ...
    def gradients(
        self, weights: Mapping[str, Tensor], key: Tensor, value: Tensor, rate: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


class ContinuumLevel(nn.Module):
    """A block, and what it has learned from each sample's context; see the module docstring for the equations.

    Every step is at most `max_step` times the norm of the initial weights, and what was written fades by `retention`:
    a level stays within max_step / (1 − retention) of where it began, whatever it reads.

    Args:
        block: a module that is also a `WritableBlock`.
        dim: its inputs and outputs, D.
        chunk_size: tokens from one update to the next, C.
        inner_lr: step size on the level's own objective; 0 makes it an ordinary MLP without any state.
        retention: how much of what was written survives an update.
        max_step: bound of one update, relative to the initial weights.
        restart: tokens after which the level goes back to its initial weights; None never does.
    """

    block: WritableBlock

    def __init__(
        self,
        block: nn.Module,
        dim: int,
        chunk_size: int,
        *,
        inner_lr: float,
        retention: float,
        max_step: float,
        restart: int | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.chunk_size, self.restart = dim, chunk_size, restart
        self.inner_lr, self.retention, self.max_step = inner_lr, retention, max_step
        self.block = block  # type: ignore[assignment]
        if inner_lr:
            self.target = nn.Linear(dim, dim, bias=False)  # V
            self.gate = nn.Linear(dim, 1, bias=False)  # g
            nn.init.normal_(self.target.weight, std=0.02)  # writes little until the outer loss asks for more
            nn.init.zeros_(self.gate.weight)  # η_t = inner_lr

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}, inner_lr={self.inner_lr}, retention={self.retention}"

    def forward(
        self, x: Tensor, state: State | None = None, *, write: bool = True, elapsed: int = 0
    ) -> tuple[Tensor, State]:
        """Answer x and learn from it.

        Args:
            x: [B, T, D], of the size a norm gives (entries of about 1).
            state: what the last call returned; None begins.
            write: whether to learn; without, the state comes back as it was.
            elapsed: tokens since the last restart, where there is one.

        Raises:
            ValueError: if the level learns and `x` is not [B, T, D], or `state` is another level's or batch's.
        """
        if self.inner_lr:
            check_tokens(x, self.dim)
        if state is not None:
            self.check(state, x)
        if not self.inner_lr:
            return self.block(x), {}
        with torch.autocast(x.device.type, enabled=False):  # a memory keeps its precision
            initial = self._initial()
            run = self._learn if write else self._recall
            y, state = run(x.to(self._dtype), state or self.initial_state(len(x)), initial, elapsed)
            return y.to(x.dtype), state

    def _recall(self, x: Tensor, state: State, initial: Weights, elapsed: int) -> tuple[Tensor, State]:
        return self.block.read(_sum(initial, state["written"]), x), state

    def _learn(self, x: Tensor, state: State, initial: Weights, elapsed: int) -> tuple[Tensor, State]:
        size = self.chunk_size
        inputs = torch.cat([state["inputs"], x], 1)  # one of the last chunk, those that wait, and the new ones
        waiting, end = state["inputs"].shape[1] - 1, inputs.shape[1] - 1
        full = end // size * size  # tokens in chunks that are complete
        written = state["written"]
        weights = _sum(initial, written)
        answers = []
        if full:
            bounds = self._bounds(initial)
            chunks = self._chunks(inputs[:, : full + 1], initial)
            for stop, chunk in zip(range(size, full + 1, size), chunks, strict=True):
                answer, gradients = self.block.gradients(weights, *chunk)
                answers.append(answer[:, 1:])
                if self.restart and (elapsed - waiting + stop) % self.restart == 0:
                    weights = {name: weight.expand_as(weights[name]) for name, weight in initial.items()}
                else:
                    weights = self._step(weights, gradients, initial, bounds)
            written = {name: weight - initial[name] for name, weight in weights.items()}
        rest = inputs[:, full:]
        answers.append(self.block.read(weights, rest[:, 1:]))
        return torch.cat(answers, 1)[:, waiting:], {"written": written, "inputs": rest.clone()}

    def _chunks(self, inputs: Tensor, initial: Weights) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Return keys x_{t−1}, values and rates of every chunk; behind them x_t of the last t, which is only read.

        What does not depend on the weights of the moment is computed for all chunks at once.
        """
        size = self.chunk_size
        key, token = inputs[:, :-1], inputs[:, 1:]
        value = self.block.read(initial, key) + token @ self.target.weight.to(inputs.dtype).mT
        openness = 2 * torch.sigmoid(token @ self.gate.weight.to(inputs.dtype)[0])
        rate = self.inner_lr * openness / (size * self.dim)  # η_t / (C D)  [B, full]
        keys = inputs.unfold(1, size + 1, size).mT.unbind(1)  # each [B, C + 1, D]
        values = nn.functional.pad(value.unflatten(1, (-1, size)), (0, 0, 0, 1)).unbind(1)
        rates = nn.functional.pad(rate.unflatten(1, (-1, size)), (0, 1)).unbind(1)
        return zip(keys, values, rates, strict=True)

    def _bounds(self, initial: Weights) -> Weights:
        """Return (max_step ‖W₀‖)² of each weight; of one that is all zero, about none."""
        return {name: self.max_step**2 * weight.square().sum() + 1e-12 for name, weight in initial.items()}

    def _step(self, weights: Weights, gradients: Weights, initial: Weights, bounds: Weights) -> Weights:
        """Return W after an update."""
        new = {}
        for name, gradient in gradients.items():
            square = torch.linalg.vector_norm(gradient.flatten(1), dim=1).square() / bounds[name]
            scale = torch.rsqrt(1 + square).view(-1, *[1] * (gradient.ndim - 1))
            new[name] = torch.addcmul(torch.lerp(initial[name], weights[name], self.retention), gradient, -scale)
        return new

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> State:
        """Return the state before the first token: nothing written, and a zero in place of the token before it.

        written: W − W₀ for each weight of the block, [B, ...]; inputs: the last token of the chunk before, and the
        n < C of the chunk under way, [B, 1 + n, D]. float32, or float64 where the weights are; on their device unless
        another is named. A level that does not learn in context has none.
        """
        if not self.inner_lr:
            return {}

        def zeros(like: Tensor, *shape: int) -> Tensor:
            return like.new_zeros(batch_size, *shape, dtype=self._dtype, device=device)

        written = {name: zeros(weight, *weight.shape) for name, weight in self.block.weights().items()}
        return {"written": written, "inputs": zeros(self.gate.weight, 1, self.dim)}

    def check(self, state: State, x: Tensor) -> None:
        """Raise ValueError unless the state is of this level, and of x's samples and device."""
        like = self.initial_state(len(x), "meta")
        if self.inner_lr:
            tokens = min(max(size_of(state, "inputs", 1), 1), self.chunk_size)
            like["inputs"] = like["inputs"].expand(-1, tokens, -1)
        check_state(state, like, x.device)

    def _initial(self) -> Weights:
        """Return W₀, in the dtype of the memory."""
        return {name: weight.to(self._dtype) for name, weight in self.block.weights().items()}

    @property
    def _dtype(self) -> torch.dtype:
        """Of the memory and its state."""
        return state_dtype(self.gate.weight.dtype)


def _sum(initial: Weights, written: Weights) -> Weights:
    """Return W = W₀ + (W − W₀), one set of weights per sample."""
    return {name: weight + written[name] for name, weight in initial.items()}


def check_chunk_sizes(chunk_sizes: Sequence[int]) -> None:
    """Refuse sizes that are no whole numbers of at least 1, or that do not divide one another."""
    if not isinstance(chunk_sizes, Sequence) or not chunk_sizes:
        raise ValueError(f"Invalid chunk_sizes: {chunk_sizes!r}, expected one number for each level")
    for size in chunk_sizes:
        check_sizes(chunk_sizes=size)
    ordered = sorted(chunk_sizes)
    for fast, slow in itertools.pairwise(ordered):
        if slow % fast:
            raise ValueError(f"Invalid chunk_sizes: {fast} does not divide {slow}; a slow chunk holds whole fast ones")


def level_rates(inner_lr: float | Sequence[float], levels: int) -> list[float]:
    """Return the inner learning rate of every level, each finite and at least 0."""
    rates = list(inner_lr) if isinstance(inner_lr, Sequence) else [inner_lr] * levels
    if len(rates) != levels:
        raise ValueError(f"{len(rates)} inner learning rates for {levels} levels")
    for rate in rates:
        if not 0.0 <= rate < float("inf"):  # also refuses NaN
            raise ValueError(f"Invalid inner_lr: {rate}, expected at least 0")
    return rates


def check_learning(retention: float, max_step: float) -> None:
    """Refuse a retention outside [0, 1], or a bound of steps that is not positive."""
    if not 0.0 <= retention <= 1.0:
        raise ValueError(f"Invalid retention: {retention}, expected 0 to 1")
    if not 0.0 < max_step < float("inf"):
        raise ValueError(f"Invalid max_step: {max_step}, expected more than 0")
