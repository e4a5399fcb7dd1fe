"""Other deep memories than the one `DMGD` has: the rows of the ablation in docs/research/dmgd.md, never for use.

Each is `DMGD` with one thing changed, and named for it; the two that predict rows and the one on coordinates are other
memories altogether, on `Momentum`'s keys and read-out. A variant goes by "dmgd:<name>" wherever an optimizer is named.
"""

from typing import Any

import torch
from torch import Tensor

import deep_optim
from deep_optim.ops.feature_map import feature_map
from deep_optim.ops.frobenius import frobenius_norm
from deep_optim.ops.mlp_memory import MLPMemory, mlp_memory_step, read_mlp_memory, sigmoid
from deep_optim.ops.newton_schulz import newton_schulz
from deep_optim.ops.two_sided_delta import erasure, gram_bound, write_and_read

NAMES = ("memory.linear", "memory.w1", "memory.w2")


class Plain(deep_optim.DMGD):
    """`DMGD`'s step in float32, tokens in rows, with every part open to change."""

    def update(self, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        wide = written.shape[-2] < written.shape[-1]
        linear, w1, w2, tokens = (x.mT if wide else x for x in (*(state[name] for name in NAMES), written))
        norm = frobenius_norm(tokens)
        key = tokens / norm  # [B, r, p]
        hidden = self.hidden(w2, key)  # [B, r, h]
        features = torch.cat([key, hidden], -1)
        erased = self.erased(torch.cat([linear, w1], -1), features, group)
        from_linear, from_w1 = erased.split([key.shape[-1], hidden.shape[-1]], -1)
        linear, _ = write_and_read(linear, tokens, from_linear, group["momentum"], None)
        w1, _ = write_and_read(w1, norm * hidden, from_w1, group["momentum"], None)
        state.update(zip(NAMES, (x.mT.contiguous() if wide else x for x in (linear, w1, w2)), strict=True))
        read = group["lookahead"] * tokens + group["momentum"] * self.answer(linear, w1, w2, key)
        return read.mT if wide else read

    def hidden(self, w2: Tensor, key: Tensor) -> Tensor:
        """h(K), as `DMGD` has it."""
        return self.scaled(sigmoid(key @ w2.mT * (key.shape[-2] * key.shape[-1]) ** 0.5))

    def scaled(self, hidden: Tensor) -> Tensor:
        """Bring hidden features of size 1 to a matrix of about norm 1."""
        return hidden / (hidden.shape[-2] * max(hidden.shape[-1], 1)) ** 0.5

    def erased(self, memory: Tensor, features: Tensor, group: dict[str, Any]) -> Tensor:
        """What the inner steps take from [M | W₁]."""
        rate = group["inner_lr"]
        out = erasure(memory, features, rate, rate, group["inner_steps"])
        return torch.zeros_like(memory) if out is None else out

    def answer(self, linear: Tensor, w1: Tensor, w2: Tensor, key: Tensor) -> Tensor:
        """What is read from the memory: its linear part."""
        return linear


class LinearHidden(Plain):
    """Hidden features without their non-linearity: a second, random, linear view of the keys."""

    def hidden(self, w2: Tensor, key: Tensor) -> Tensor:
        return self.scaled(0.6 * key @ w2.mT * (key.shape[-2] * key.shape[-1]) ** 0.5)  # 0.6: s at its typical size


class TwoHiddenLayers(Plain):
    """s(W₃ s(W₂ k)) with a random W₃."""

    def hidden(self, w2: Tensor, key: Tensor) -> Tensor:
        first = sigmoid(key @ w2.mT * (key.shape[-2] * key.shape[-1]) ** 0.5)
        width = first.shape[-1]
        w3 = torch.randn(width, width, generator=torch.Generator().manual_seed(3)) * (0.4 * width) ** -0.5
        return self.scaled(sigmoid(first @ w3))


class JacobianReadOut(Plain):
    """Reads M + W₁ diag(mean s′) W₂: how the memory's whole answer changes with the key."""

    def answer(self, linear: Tensor, w1: Tensor, w2: Tensor, key: Tensor) -> Tensor:
        r, p = key.shape[-2:]
        inside = (r * p) ** 0.5
        slope = (1 - sigmoid(key @ w2.mT * inside).square()).pow(1.5).mean(-2, keepdim=True)  # [B, 1, h]
        return linear + inside * (w1 * slope) @ w2 / (r * w2.shape[-2]) ** 0.5


class ClosedForm(Plain):
    """The inner regression solved with a ridge, instead of stepped: λ / (λ + 0.05) of each direction is erased."""

    def erased(self, memory: Tensor, features: Tensor, group: dict[str, Any]) -> Tensor:
        key = features / frobenius_norm(features)
        key = key * gram_bound(key).clamp(min=1e-9).rsqrt()
        gram = key.mT @ key
        inverse = torch.linalg.inv(gram + 0.05 * torch.eye(gram.shape[-1]))
        return group["inner_lr"] * (memory @ (gram @ inverse) + key @ (inverse @ (key.mT @ memory)))


class PredictRows(deep_optim.Momentum):
    """An MLP from rows to rows, residual, whose answer for the momentum's rows is added to the momentum.

    It learns to answer the next gradient ("next"), or the orthogonalised momentum ("orthogonal"), by one normalised
    step of each of its weights per gradient.
    """

    target = "next"

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = super().init_state(param, group)
        p = min(len(param), param.numel() // len(param))
        w2 = torch.randn(1, 32, p, generator=torch.Generator().manual_seed(0)) * p**-0.5
        return state | {"linear": torch.zeros(1, p, p), "w1": torch.zeros(1, p, 32), "w2": w2}

    def update(self, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        wide = written.shape[-2] < written.shape[-1]
        before = state["memory"]
        direction = super().update(written, state, group)
        rows = [x.mT if wide else x for x in (before, direction, written)]
        size = [frobenius_norm(x) for x in rows]
        old, new, gradient = (x / s * x.shape[-2] ** 0.5 for x, s in zip(rows, size, strict=True))  # rows of length 1
        memory = MLPMemory(state["linear"], state["w1"], state["w2"])
        key, goal = (old, gradient) if self.target == "next" else (new, newton_schulz(new) * new.shape[-1] ** 0.5)
        r = key.shape[-2]
        rates = (0.05 / r, 0.05 / r, 0.01 / r)
        memory = mlp_memory_step(memory, key, (goal - key).mT.contiguous(), rate=rates, decay=0.999)
        state.update(zip(("linear", "w1", "w2"), memory, strict=True))
        read = new + read_mlp_memory(memory, new).mT
        return read.mT if wide else read


class PredictOrthogonal(PredictRows):
    """The same with the other target."""

    target = "orthogonal"


class Coordinates(deep_optim.Momentum):
    """One small MLP per matrix, from each coordinate's averages over 2, 10 and 50 steps to its next gradient."""

    betas = (0.5, 0.9, 0.98)

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        w2 = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(0)) * 3**-0.5
        averages = {f"average{i}": torch.zeros_like(param) for i in range(3)}
        return averages | {"linear": torch.full((1, 1, 3), 1 / 3), "w1": torch.zeros(1, 1, 8), "w2": w2}

    def update(self, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        def keys() -> Tensor:  # [B, N, 3], each average at size 1
            columns = [state[f"average{i}"].flatten(1) for i in range(3)]
            return torch.stack([x / (frobenius_norm(x[:, None])[:, 0] / x.shape[-1] ** 0.5) for x in columns], -1)

        goal = (written / frobenius_norm(written) * written[0].numel() ** 0.5).flatten(1)[:, None]  # [B, 1, N]
        memory = MLPMemory(state["linear"], state["w1"], state["w2"])
        rate = 0.02 / goal.shape[-1]
        memory = mlp_memory_step(memory, keys(), goal, rate=(rate, rate, rate))
        state.update(zip(("linear", "w1", "w2"), memory, strict=True))
        for i, beta in enumerate(self.betas):
            state[f"average{i}"] = beta * state[f"average{i}"] + (1 - beta) * written
        return read_mlp_memory(memory, keys()).reshape(written.shape)


class InputsToErrors(deep_optim.Momentum):
    """An MLP from a layer's inputs to the gradients of its outputs (Eq. 37's keys and values), beside a linear map.

    [M | W₁] ← momentum · [M | W₁] − 0.5 · [M | W₁] E φφᵀ + [G | E δ h(x̂)ᵀ],   φ = [x̂, h(x̂)] at mean length 1

    over every eighth token, with a random hidden layer; only M is read. Without hidden features it is
    `InputDeltaMomentum`.
    """

    hidden_dim = 64
    every = 8

    def watch(self, model: torch.nn.Module) -> None:
        """Keep each linear layer's inputs, and the gradients of its outputs, for the step."""
        self.seen: dict[Tensor, list[Tensor]] = {}
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(self._inputs)
                module.register_full_backward_hook(self._errors)

    def _inputs(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if module.training:
            self.seen[module.weight] = [inputs[0].detach().flatten(0, -2)[:: self.every]]

    def _errors(self, module: Any, grad_input: Any, grad_output: tuple[Tensor, ...]) -> None:
        self.seen[module.weight].append(grad_output[0].flatten(0, -2)[:: self.every])

    def init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = super().init_state(param, group)
        w2 = torch.randn(1, self.hidden_dim, param.shape[1], generator=torch.Generator().manual_seed(0))
        return state | {"w1": torch.zeros(1, len(param), self.hidden_dim), "w2": w2}

    def _step_stack(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for param in params:  # each has its own tokens
            self.tokens = self.seen.pop(param)
            super()._step_stack(group, [param])

    def update(self, written: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        x, error = self.tokens  # [N, n], [N, m]
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)
        hidden = sigmoid(x / length @ state["w2"][0].T) / max(self.hidden_dim, 1) ** 0.5  # of length about 0.7
        features = torch.cat([x / length, hidden], -1)
        features = features / features.square().sum(-1).mean().sqrt()  # so that no eigenvalue exceeds 1
        both = torch.cat([state["memory"][0], state["w1"][0]], -1)  # [m, n + h]
        write = torch.cat([written[0], self.every * error.T @ (length * hidden)], -1)
        both = group["momentum"] * both - 0.5 * (both @ features.T) @ features / len(features) + write
        state["memory"], state["w1"] = (part[None] for part in both.split([x.shape[-1], self.hidden_dim], -1))
        return written + group["momentum"] * state["memory"]


class InputsToErrorsLinear(InputsToErrors):
    """Its control, without hidden features."""

    hidden_dim = 0


def _keys(name: str) -> type[deep_optim.DMGD]:
    class Keys(deep_optim.DMGD):
        def features(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
            return feature_map(grad, name)  # type: ignore[arg-type]

    return Keys


Variant = tuple[type[torch.optim.Optimizer], dict[str, Any]]

LINEAR = {"hidden_dim": 0}

# Tables of the document: row name to class and options. The first row of all is the reference.
TABLES: dict[str, dict[str, Variant]] = {
    "structure": {
        "reference": (deep_optim.DMGD, {}),
        "no hidden layer": (deep_optim.DMGD, LINEAR),
        "linear hidden layer": (LinearHidden, {}),
        "two hidden layers": (TwoHiddenLayers, {}),
        "Jacobian read-out": (JacobianReadOut, {}),
        "closed-form inner step": (ClosedForm, {}),
        "coordinate-wise MLP": (Coordinates, {}),
        "MLP from inputs to errors": (InputsToErrors, {}),
        "linear map from inputs to errors": (InputsToErrorsLinear, {}),
    },
    "target": {
        "dot product": (deep_optim.DMGD, {"inner_lr": 0.0}),
        "next gradient": (PredictRows, {}),
        "orthogonalised momentum": (PredictOrthogonal, {}),
    },
    "width": {f"hidden_dim={h}": (deep_optim.DMGD, {"hidden_dim": h}) for h in (64, 128)},
    "keys": {f"{name} keys": (_keys(name), {}) for name in ("identity", "tanh", "sign")},
    "retention": {f"momentum={m}": (deep_optim.DMGD, {"momentum": m}) for m in (0.98,)},
    "inner rates": {
        **{f"inner_steps={j}": (deep_optim.DMGD, {"inner_steps": j}) for j in (1, 4)},
        **{f"inner_lr={rate}": (deep_optim.DMGD, {"inner_lr": rate}) for rate in (0.25,)},
        **{f"hidden_lr={rate}": (deep_optim.DMGD, {"hidden_lr": rate}) for rate in (0.03,)},
        **{f"lookahead={k}": (deep_optim.DMGD, {"lookahead": k}) for k in (1.0, 3.0)},
    },
    "output map": {
        "ns_steps=5": (deep_optim.DMGD, {"ns_steps": 5}),
        "polar_express": (deep_optim.DMGD, {"ns_coefficients": "polar_express"}),
        "adam": (deep_optim.DMGD, {"output": "adam", "lr": 3e-3}),
    },
    "defaults": {
        "one inner step": (deep_optim.DMGD, LINEAR | {"inner_steps": 1}),
        "no lookahead": (deep_optim.DMGD, LINEAR | {"lookahead": 1.0}),
        "five steps of Newton-Schulz": (deep_optim.DMGD, LINEAR | {"ns_steps": 5}),
        "all three": (deep_optim.DeltaMomentum, {}),
    },
}  # fmt: skip

HIDDEN = {"hidden_dim": 16}  # of the reference, and of every row that says nothing else

VARIANTS: dict[str, Variant] = {
    f"dmgd:{name}": (cls, (HIDDEN if issubclass(cls, deep_optim.DMGD) else {}) | options)
    for table in TABLES.values()
    for name, (cls, options) in table.items()
}
