"""Self-modifying Titans: a layer whose memory is written in context, and so are the maps that decide what is written.

Every head has a main memory, and for each name in `adapt` a memory of what that projection should be. The token reaches
them by static projections x^query, x^key, x^value (linear, causal convolution, SiLU; the key at length 1), and a memory
that maps vectors is residual, M(z) = z + W z:

    q_t = unit(M_query(x^query)),  k_t = unit(M_key(x^key)),  v_t = M_value(x^value)
    b_t = 2 sigmoid(x^lr + W_lr x^key)                      how strongly to write, in (0, 2)
    a_t = sigmoid(x^retention + W_retention x^key)          what is kept of the change since the initial state
    v̂_box = soft(M_box(v_t)),  soft(z) = z / √(1 + ‖z‖²)    each memory makes the value that it is to learn
    D_box ← a_t D_box (I − b_t k_t k_tᵀ) + b_t (v̂_box − M_box,0(k_t)) k_tᵀ
    o_t = M_memory(q_t),  y_t = W_out (RMSNorm(o_t) ⊙ SiLU(W_gate x_t))

W_box = W_box,0 + gain_box D_box. W_box,0 is learned in training: a sequence starts from it, and decays to it. The main
memory answers q_t with all of D. The memories share k, b and a, so that they are the rows of one matrix, written by one
`gated_delta_rule`. What they say of one another (q, k, v, b, a, v̂) is read at the start of a chunk of
`projection_chunk_size` tokens; every write, and the answer to q_t, is exact to the token.

Nested Learning, arXiv:2512.24695, Eq. 83-93. It departs from the printed rules in five places, for reasons given in
docs/models/self_modifying_titans.md: one erasure, decay to the initial state, soft, gain, the answer after the write.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.gated_delta_rule import gated_delta_rule
from ..ops.gated_mlp_memory import gated_mlp_memory, read_residual_mlp, soft_cap
from .causal_conv import causal_conv
from .sizes import check_sizes, check_tokens
from .state import State, check_state, pieces, state_dtype

_CONV_WIDTH = 4  # the paper's
_LOST = (-7.0, -10.0)  # log₂(1 − retention) of the first and the last head: half is lost after 89 to 710 tokens
_GAIN = 0.01  # of a fresh layer: projections hardly move until training finds use in it
_STD = 0.02  # of a fresh layer's initial memories
_MATRICES = ("key", "value", "query")  # boxes that map vectors to vectors
_SCALARS = ("lr", "retention")  # boxes that map vectors to a number


class SelfModifyingTitans(nn.Module):
    """A recurrent layer in place of attention: y, state = layer(x, state).

    With memory="linear", d = dim / heads and C = chunk_size a token costs about 10 D² + 32 D d + 9 C D FLOPs, and a
    sample holds 6 D d numbers; nothing grows with the length. The residual connection around the layer and the norm in
    front of it are the surrounding block's.

    Args:
        dim: width of tokens, D.
        heads: memories per layer; divides `dim`.
        memory: the main memory. "linear" is exact within chunks; "mlp" is a residual MLP of two layers, whose gradients
            wait for the end of a chunk.
        chunk_size: tokens taken at once by the main memory. A matter of cost for "linear", of the model for "mlp".
        projection_chunk_size: tokens between two looks at what the memories of projections hold.
        adapt: which projections have a memory: any of "key", "value", "query", "lr", "retention".
        momentum: if not 0, writes are averaged over tokens with this decay before they reach a memory (Titans).
        hidden: features of an "mlp" memory; 2 dim / heads by default.

    Raises:
        ValueError: for sizes that are none, heads that do not divide `dim`, names that are unknown.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        *,
        memory: Literal["linear", "mlp"] = "linear",
        chunk_size: int = 16,
        projection_chunk_size: int = 64,
        adapt: Iterable[str] = ("key", "value", "lr", "retention"),
        momentum: float = 0.0,
        hidden: int | None = None,
    ) -> None:
        adapt = tuple(adapt) if not isinstance(adapt, str) else (adapt,)
        check_sizes(dim=dim, heads=heads, chunk_size=chunk_size, projection_chunk_size=projection_chunk_size)
        check_sizes(hidden=1 if hidden is None else hidden)
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got dim={dim} and heads={heads}")
        if memory not in ("linear", "mlp"):
            raise ValueError(f"memory must be 'linear' or 'mlp', got {memory!r}")
        if unknown := [name for name in adapt if name not in _MATRICES + _SCALARS]:
            raise ValueError(f"adapt takes names out of {_MATRICES + _SCALARS}, got {unknown[0]!r}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        super().__init__()
        self.dim, self.heads, self.memory, self.adapt, self.momentum = dim, heads, memory, adapt, momentum
        self.chunk_size, self.projection_chunk_size = chunk_size, projection_chunk_size
        main = ("memory",) if memory == "linear" else ()  # first: the rows that answer the query
        matrices = (*main, *(name for name in _MATRICES if name in adapt))
        scalars = [name for name in _SCALARS if name in adapt]
        self.width, self.matrices = (width := dim // heads), len(matrices)
        self.rows = {**dict.fromkeys(matrices, width), **dict.fromkeys(scalars, 1)}  # of the stack of memories

        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.gate, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.rates = nn.Linear(dim, 2 * heads)
        self.conv = nn.Parameter(torch.empty(3 * dim, _CONV_WIDTH))
        self.initial = nn.ParameterDict({name: torch.empty(heads, rows, width) for name, rows in self.rows.items()})
        self.gain = nn.ParameterDict({name: torch.empty(heads) for name in self.rows})
        if memory == "mlp":
            hidden = 2 * width if hidden is None else hidden
            self.initial["w1"] = torch.empty(heads, width, hidden)
            self.initial["w2"] = torch.empty(heads, hidden, width)
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the layer anew: memories near the identity, b = 1, retention 0.992 to 0.999 by head."""
        for linear in (self.query, self.key, self.value, self.gate, self.out):
            linear.reset_parameters()
        self.norm.reset_parameters()
        nn.init.uniform_(self.conv, -(_CONV_WIDTH**-0.5), _CONV_WIDTH**-0.5)  # as nn.Conv1d
        lost = torch.logspace(*_LOST, self.heads, base=2.0)
        nn.init.zeros_(self.rates.weight)
        with torch.no_grad():
            self.rates.bias.copy_(torch.cat([torch.zeros(self.heads), torch.logit(1 - lost)]))
        for name, initial in self.initial.items():
            nn.init.normal_(initial, std=1.0 if name == "w2" else _STD)  # W₂ k ~ 1 for keys of length 1
        for gain in self.gain.values():
            nn.init.constant_(gain, _GAIN)

    def forward(self, x: Tensor, state: State | None = None, *, write: bool = True) -> tuple[Tensor, State]:
        """Return y [B, T, D] and the state after the last token; T may be anything, 0 too.

        A sequence may be cut anywhere: layer(x) is layer(x[:, :t]) followed by layer(x[:, t:], state).

        Args:
            x: tokens, [B, T, D].
            state: from a call before; None starts from the learned initial memories. It is not changed.
            write: if False, memories are read as they stand and do not change; only the convolution moves on.

        Raises:
            ValueError: if `x` is not [B, T, dim], or `state` is another layer's or batch's.
        """
        check_tokens(x, self.dim)
        dtype = self._dtype
        if state is None:
            state = self.initial_state(len(x))
        else:
            check_state(state, self.initial_state(len(x), "meta"), x.device)
            state = {**state, "step": state["step"].cpu()}  # nothing to do but for a state that was moved as a whole
        mixed = torch.cat([self.query(x), self.key(x), self.value(x)], -1).to(dtype)
        rates = self.rates(x).to(dtype)
        with torch.autocast(x.device.type, enabled=False):  # the recurrence keeps its precision
            mixed, tail = causal_conv(mixed, self.conv.to(dtype), state["tail"])
            query, key, value = F.silu(mixed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, T, d]
            lr, retention = rates.unflatten(-1, (2, self.heads, 1)).permute(2, 0, 3, 1, 4)  # [B, H, T, 1]
            tokens = query, unit(key), value, lr, retention
            answer, state = self._write(tokens, state) if write else (self._read(tokens, state), state)
            answer = F.rms_norm(answer, (answer.shape[-1],), self.norm.weight.to(dtype), self.norm.eps)
        gated = answer.transpose(1, 2).flatten(2).to(x.dtype) * F.silu(self.gate(x))
        return self.out(gated), {**state, "tail": tail}

    def _write(self, tokens: tuple[Tensor, ...], state: State) -> tuple[Tensor, State]:
        """Write every token and answer its query; return the answers [B, H, T, d] and the state."""
        step, stack = int(state["step"]), dict(state["stack"])
        main: State = {name: state[name] for name in ("w1", "w2", "seen") if name in state}
        initial, gain = self._initial(), self._gain()
        answers = [tokens[0][:, :, :0]]
        for begins, piece in pieces(tokens, step, self.projection_chunk_size):
            if begins:
                stack["frozen"] = stack["change"]
            boxes = initial + gain * stack["frozen"]  # M_box [B, H, rows, d]
            query, key, value, log_decay, rate = self._project(piece, boxes)
            target = self._own_values(value, boxes) - key @ initial.mT
            answer, stack["change"], velocity = gated_delta_rule(
                query,
                key,
                target,
                log_decay,
                (1 - self.momentum) * rate,  # writes are averaged: their sum diverges
                stack["change"],
                stack.get("velocity"),
                momentum=self.momentum,
                answers=self.rows.get("memory", 0),
                chunk_size=self.chunk_size,
            )
            if velocity is not None:
                stack["velocity"] = velocity
            if self.memory == "linear":
                answer = answer + query @ initial[:, : self.width].mT
            else:
                answer, main = self._write_mlp((query, key, value, log_decay, rate), main, step)
            step += key.shape[2]
            answers.append(answer)
        return torch.cat(answers, 2), {"stack": stack, **main, "step": torch.full_like(state["step"], step)}

    def _write_mlp(self, tokens: tuple[Tensor, ...], main: State, step: int) -> tuple[Tensor, State]:
        """Write projected tokens into the main memory, by chunks of its own."""
        initial = self._initial_mlp()
        w1, w2, seen = dict(main["w1"]), dict(main["w2"]), main["seen"]
        answers = []
        for begins, (query, key, value, log_decay, rate) in pieces(tokens, step, self.chunk_size):
            if begins:
                w1["frozen"], w2["frozen"], seen = w1["change"], w2["change"], torch.zeros_like(seen)
            frozen = initial[0] + w1["frozen"], initial[1] + w2["frozen"]
            beta, seen = soft_cap(key, rate, seen)
            answer, change, velocity = gated_mlp_memory(
                query,
                key,
                soft(read_residual_mlp(frozen, value)),
                log_decay,
                (1 - self.momentum) * beta,
                initial,
                frozen,
                (w1["change"], w2["change"]),
                (w1["velocity"], w2["velocity"]) if self.momentum else None,
                momentum=self.momentum,
            )
            w1["change"], w2["change"] = change
            if velocity is not None:
                w1["velocity"], w2["velocity"] = velocity
            answers.append(answer)
        return torch.cat(answers, 2), {"w1": w1, "w2": w2, "seen": seen}

    def _read(self, tokens: tuple[Tensor, ...], state: State) -> Tensor:
        """Answer the queries out of the memories as they stand."""
        stack, initial = state["stack"], self._initial()
        begins = int(state["step"]) % self.projection_chunk_size == 0
        query, *_ = self._project(tokens, initial + self._gain() * stack["change" if begins else "frozen"])
        if self.memory == "linear":
            return query @ (initial + stack["change"])[..., : self.width, :].mT
        w1, w2 = self._initial_mlp()
        return read_residual_mlp((w1 + state["w1"]["change"], w2 + state["w2"]["change"]), query)

    def _project(self, tokens: Iterable[Tensor], boxes: Tensor) -> tuple[Tensor, ...]:
        """Return query, key, value [B, H, L, d], log a and b [B, H, L], as the memories say."""
        x_query, x_key, x_value, lr, retention = tokens
        box = dict(zip(self.rows, boxes.split(list(self.rows.values()), -2), strict=True))
        static = {"query": x_query, "key": x_key, "value": x_value}
        query, key, value = (x @ box[name].mT if name in box else x for name, x in static.items())
        logits = {"lr": lr, "retention": retention}
        lr, retention = (x + x_key @ box[name].mT if name in box else x for name, x in logits.items())
        return unit(query), unit(key), value, F.logsigmoid(retention)[..., 0], 2 * lr.sigmoid()[..., 0]

    def _own_values(self, value: Tensor, boxes: Tensor) -> Tensor:  # [B, H, L, d] -> [B, H, L, rows]
        """Return what each memory makes of the value, at most 1 long."""
        answers = value @ boxes.mT
        vector, scalar = answers.tensor_split([self.matrices * self.width], -1)
        vector = soft(vector.unflatten(-1, (self.matrices, self.width)))
        return torch.cat([vector.flatten(-2), soft(scalar[..., None])[..., 0]], -1)

    def _initial(self) -> Tensor:
        """Return M_box,0 of the stack, [H, rows, d]: the learned part, and the identity of what maps vectors."""
        eye = torch.eye(self.width, dtype=self._dtype, device=self.conv.device)
        parts = [self.initial[name].to(self._dtype) + (0 if name in _SCALARS else eye) for name in self.rows]
        return torch.cat(parts, -2) if parts else eye.new_zeros(self.heads, 0, self.width)

    def _initial_mlp(self) -> tuple[Tensor, Tensor]:
        """Return W₁ [H, d, h] and W₂ [H, h, d] at the start of a sequence."""
        return self.initial["w1"].to(self._dtype), self.initial["w2"].to(self._dtype)

    def _gain(self) -> Tensor:
        """Return the gain of every row of the stack, [H, rows, 1]."""
        parts = [self.gain[name][:, None].expand(-1, rows) for name, rows in self.rows.items()]
        gain = torch.cat(parts, -1) if parts else self.conv.new_zeros(self.heads, 0)
        return gain[..., None].to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the recurrence and its state."""
        return state_dtype(self.conv.dtype)

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> State:
        """Return the state before the first token, of float32, or float64 where the parameters are, and on their device
        unless another is named.

        stack: the change D of the stack of memories [B, H, rows, d], as it is and as it was when the projections' chunk
        began ("frozen"); and its velocity S, with momentum; w1, w2: the same of the two layers of an "mlp" memory;
        seen: Σ b k kᵀ of the main memory's chunk, for "mlp"; tail: the convolution's [B, 3, 3 D]; step: tokens written,
        on the CPU wherever the rest is: it says where chunks end, and reading it from a device would wait for that.
        """
        dtype, device = self._dtype, self.conv.device if device is None else device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=device)

        def memory(*shape: int) -> State:
            names = ("change", "frozen", "velocity") if self.momentum else ("change", "frozen")
            return {name: zeros(self.heads, *shape) for name in names}

        state: State = {"stack": memory(sum(self.rows.values()), self.width)}
        if self.memory == "mlp":
            state |= {name: memory(*self.initial[name].shape[1:]) for name in ("w1", "w2")}
            state["seen"] = zeros(self.heads, self.width, self.width)
        return {**state, "tail": zeros(_CONV_WIDTH - 1, 3 * self.dim), "step": torch.tensor(0, device="cpu")}


def unit(z: Tensor) -> Tensor:
    """Return the vectors in the last dimension at length 1; zero stays zero."""
    return z * (z.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def soft(z: Tensor) -> Tensor:
    """Return z / √(1 + ‖z‖²): vectors below length 1, so that what memories make of one another stays bounded."""
    return z * (1 + z.square().sum(-1, keepdim=True)).rsqrt()
