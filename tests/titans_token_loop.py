"""The docstring of models/self_modifying_titans.py, one sample, one head and one token at a time."""

import torch
from torch.nn import functional as F


def unit(z):
    return z / (z @ z + 1e-6).sqrt()


def soft(z):
    return z / (1 + z @ z).sqrt()


def token_loop(layer, x):
    static = torch.cat([layer.query(x), layer.key(x), layer.value(x)], -1)
    padded = F.pad(static, (0, 0, 3, 0))
    mixed = F.silu(sum(layer.conv[:, i] * padded[:, i : i + x.shape[1]] for i in range(4)))
    mixed = mixed.unflatten(-1, (3, layer.heads, -1))
    rates = layer.rates(x).unflatten(-1, (2, layer.heads))
    samples = []
    for b in range(len(x)):
        heads = [head_loop(layer, h, mixed[b, :, :, h], rates[b, :, :, h]) for h in range(layer.heads)]
        normed = [o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight for o in heads]
        samples.append(layer.out(torch.cat(normed, -1) * F.silu(layer.gate(x[b]))))
    return torch.stack(samples)


def head_loop(layer, h, mixed, rates):
    """The answers of one head, [T, d]; mixed [T, 3, d], rates [T, 2]."""
    d = mixed.shape[-1]
    names = (*(("memory",) if layer.memory == "linear" else ()), *layer.adapt)
    change = {name: torch.zeros_like(layer.initial[name][h]) for name in names}
    speed, frozen = dict(change), {}
    if layer.memory == "mlp":
        mlp_initial = [layer.initial[name][h] for name in ("w1", "w2")]
        mlp_change = mlp_speed = [torch.zeros_like(w) for w in mlp_initial]
    answers = []
    for t in range(len(mixed)):
        if t % layer.projection_chunk_size == 0:
            frozen = dict(change)

        def ask(name, z, frozen=frozen):
            memory = layer.initial[name][h] + layer.gain[name][h] * frozen[name]
            return memory @ z if name in ("lr", "retention") else z + memory @ z

        x_query, x_key, value = mixed[t, 0], unit(mixed[t, 1]), mixed[t, 2]
        query = unit(ask("query", x_query) if "query" in names else x_query)
        key = unit(ask("key", x_key) if "key" in names else x_key)
        value = ask("value", value) if "value" in names else value
        lr = rates[t, 0] + (ask("lr", x_key)[0] if "lr" in names else 0)
        retention = rates[t, 1] + (ask("retention", x_key)[0] if "retention" in names else 0)
        rate, decay = 2 * torch.sigmoid(lr), torch.sigmoid(retention)
        erase = torch.eye(d, dtype=key.dtype) - rate * torch.outer(key, key)
        for name in names:
            target = soft(ask(name, value)) - layer.initial[name][h] @ key
            target = target if name in ("lr", "retention") else target - key
            decayed = decay * change[name]
            write = decayed @ erase + rate * torch.outer(target, key) - decayed
            speed[name] = layer.momentum * speed[name] + (1 - layer.momentum) * write
            change[name] = decayed + speed[name]
        if layer.memory == "linear":
            answers.append(query + (layer.initial["memory"][h] + change["memory"]) @ query)
            continue
        if t % layer.chunk_size == 0:
            mlp_frozen = [w + c for w, c in zip(mlp_initial, mlp_change, strict=True)]
            seen = torch.zeros(d, d, dtype=key.dtype)
        overlap = key @ seen @ key
        step = (overlap + rate) / (1 + overlap + rate) - overlap / (1 + overlap)
        seen = seen + rate * torch.outer(key, key)
        target = soft(ask_mlp(mlp_frozen, value))
        error = ask_mlp(mlp_frozen, key) - target
        jacobian = torch.autograd.functional.jacobian(lambda *w, key=key: ask_mlp(w, key), tuple(mlp_frozen))
        gradient = [torch.tensordot(error, j, 1) for j in jacobian]
        hidden = mlp_frozen[1] @ key
        slope = (1 + hidden.square()) ** -1.5
        size = (hidden / (1 + hidden.square()).sqrt()).square().sum() + (mlp_frozen[0] * slope).square().sum() + 1e-2
        size = size / (1 - layer.momentum)
        mlp_speed = [layer.momentum * s - step / size * g for s, g in zip(mlp_speed, gradient, strict=True)]
        mlp_change = [decay * c + s for c, s in zip(mlp_change, mlp_speed, strict=True)]
        answers.append(ask_mlp([w + c for w, c in zip(mlp_initial, mlp_change, strict=True)], query))
    return torch.stack(answers)


def ask_mlp(weights, z):
    hidden = weights[1] @ z
    return z + weights[0] @ (hidden / (1 + hidden.square()).sqrt())
