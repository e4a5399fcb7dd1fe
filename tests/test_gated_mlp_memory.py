"""The MLP memory of a sequence against a token loop whose gradients are autograd's, and the soft cap's algebra."""

import pytest
import torch
from torch.nn import functional as F

from deep_optim.ops.gated_mlp_memory import gated_mlp_memory, read_residual_mlp, soft_cap

SHAPES = [(6, 4, 8), (1, 3, 2), (2, 3, 11, 5, 3)]  # (..., T, d, h)


def make(shape, dtype=torch.float64):
    *batch, t, d, h = shape
    rng = torch.Generator().manual_seed(42)

    def randn(*size):
        return torch.randn(*batch, *size, generator=rng, dtype=torch.float64).to(dtype)

    query, value = randn(t, d), randn(t, d)
    key = F.normalize(randn(t, d), dim=-1)
    log_decay, step = -randn(t).abs(), randn(t).abs()
    weights = [(randn(d, h), randn(h, d)) for _ in range(4)]  # initial, frozen, change, velocity
    return query, key, value, log_decay, step, *weights


def token_loop(query, key, value, log_decay, step, initial, frozen, change, velocity, *, momentum):
    """The equation as written, one memory and one token at a time."""
    if query.ndim > 2:
        pick = [
            (tuple(w[i] for w in x) if isinstance(x, tuple) else x[i])
            for i in range(len(query))
            for x in (query, key, value, log_decay, step, initial, frozen, change, velocity)
        ]
        outs = [token_loop(*pick[9 * i : 9 * i + 9], momentum=momentum) for i in range(len(query))]
        answers, changes, velocities = zip(*outs, strict=True)
        stack = [tuple(torch.stack(w) for w in zip(*each, strict=True)) for each in (changes, velocities)]
        return torch.stack(answers), *stack
    answers = []
    for t in range(len(query)):
        w1, w2 = (weight.clone().requires_grad_() for weight in frozen)
        z = w2 @ key[t]
        hidden = z / (1 + z.square()).sqrt()
        error = key[t] + w1 @ hidden - value[t]
        gradient = torch.autograd.grad(0.5 * error.square().sum(), (w1, w2), retain_graph=True)
        slope = torch.autograd.grad(hidden.sum(), z)[0]
        n = hidden.square().sum() + (w1 * slope).square().sum() + 1e-2
        scale = (step[t] / n).detach()
        velocity = tuple(momentum * s - scale * g for s, g in zip(velocity, gradient, strict=True))
        change = tuple(log_decay[t].exp() * d + s for d, s in zip(change, velocity, strict=True))
        w1, w2 = (w + d for w, d in zip(initial, change, strict=True))
        z = w2 @ query[t]
        answers.append(query[t] + w1 @ (z / (1 + z.square()).sqrt()))
    return torch.stack(answers), change, velocity


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_chunk_is_the_tokens_one_by_one(shape, momentum):
    *inputs, velocity = make(shape)
    expected = token_loop(*inputs, tuple(momentum * s for s in velocity), momentum=momentum)
    out = gated_mlp_memory(*inputs, tuple(momentum * s for s in velocity) if momentum else None, momentum=momentum)
    torch.testing.assert_close(out[:2], expected[:2], rtol=0, atol=1e-10)
    if momentum:
        torch.testing.assert_close(out[2], expected[2], rtol=0, atol=1e-10)


def test_no_velocity_is_a_velocity_of_zero():
    *inputs, velocity = make((6, 4, 8))
    zero = tuple(torch.zeros_like(s) for s in velocity)
    expected = gated_mlp_memory(*inputs, zero, momentum=0.7)
    torch.testing.assert_close(gated_mlp_memory(*inputs, momentum=0.7), expected)


def test_a_step_of_one_is_at_most_the_whole_way_to_first_order():
    """n bounds the Jacobian's Gram: the error's first-order change is between none and all of it."""
    _, key, value, _, _, _, frozen, *_ = make((200, 4, 8))
    for k, v in zip(key, value, strict=True):
        none, one = torch.zeros(1, dtype=k.dtype), torch.ones(1, dtype=k.dtype)
        zero = tuple(torch.zeros_like(w) for w in frozen)
        change = gated_mlp_memory(k[None], k[None], v[None], none, one, frozen, frozen, zero)[1]
        before, moved = torch.autograd.functional.jvp(lambda *w, k=k: read_residual_mlp(w, k[None])[0], frozen, change)
        error = before - v
        assert -1e-12 <= -(moved @ error) <= error @ error
        assert moved.norm() <= error.norm()


def test_the_cap_leaves_orthogonal_keys_to_themselves():
    rate = torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64)
    key = torch.linalg.qr(torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q.mT
    beta, seen = soft_cap(key, rate, torch.zeros(6, 6, dtype=torch.float64))
    torch.testing.assert_close(beta, rate / (1 + rate))
    torch.testing.assert_close(seen, key.mT @ rate.diag() @ key)


@pytest.mark.parametrize("tokens", [1, 16, 1000])
def test_equal_keys_share_one_step(tokens):
    """The sum telescopes to f(Σ b), below 1 for chunks of any size."""
    rate = 2 * torch.rand(tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    key = F.normalize(torch.ones(tokens, 5, dtype=torch.float64), dim=-1)
    beta, _ = soft_cap(key, rate, torch.zeros(5, 5, dtype=torch.float64))
    torch.testing.assert_close(beta.sum(), rate.sum() / (1 + rate.sum()))
    assert (beta >= 0).all()


def test_the_cap_may_be_cut_anywhere():
    _, key, _, _, rate, *_ = make((2, 9, 4, 1))
    nothing = torch.zeros(2, 4, 4, dtype=torch.float64)
    whole = soft_cap(key, rate, nothing)
    for cut in range(10):
        first, seen = soft_cap(key[:, :cut], rate[:, :cut], nothing)
        second, seen = soft_cap(key[:, cut:], rate[:, cut:], seen)
        torch.testing.assert_close((torch.cat([first, second], -1), seen), whole)


def recall(common, capped, writes=128):
    """Write random pairs in chunks of 16; the last 8: their cosine with what is read, and the length of the error."""
    rng = torch.Generator().manual_seed(0)
    d, h = 64, 128
    shared, own, value = (F.normalize(torch.randn(n, d, generator=rng), dim=-1) for n in (1, writes, writes))
    key = F.normalize(common * shared + (1 - common**2) ** 0.5 * own, dim=-1)
    initial = torch.zeros(d, h), torch.randn(h, d, generator=rng)
    weights = initial
    for k, v in zip(key.split(16), value.split(16), strict=True):
        rate, none = torch.ones(16), torch.zeros(16)
        step = soft_cap(k, rate, torch.zeros(d, d))[0] if capped else rate
        change = tuple(w - w_0 for w, w_0 in zip(weights, initial, strict=True))
        _, change, _ = gated_mlp_memory(k, k, v, none, step, initial, weights, change)
        weights = tuple(w_0 + c for w_0, c in zip(initial, change, strict=True))
    answer = read_residual_mlp(weights, key[-8:])
    error = (answer - value[-8:]).norm(dim=-1).mean().item()
    return F.cosine_similarity(answer, value[-8:], dim=-1).mean().item(), error


def test_the_cap_keeps_correlated_keys_stable():
    """Keys with a common component of 0.7: full steps on frozen gradients diverge, capped ones learn little."""
    assert recall(0.7, capped=False)[1] > 1e3
    assert recall(0.7, capped=True)[1] < 1.3
    assert recall(0.0, capped=True)[0] > 0.6  # keys that share nothing are recalled; 0.8 without the cap


def test_it_can_be_differentiated_twice():
    *inputs, velocity = make((3, 2, 2))
    flat = [*inputs[:5], *(w for pair in (*inputs[5:], velocity) for w in pair)]
    flat = [tensor.requires_grad_() for tensor in flat]

    def end(*flat):
        pairs = [tuple(flat[i : i + 2]) for i in range(5, 13, 2)]
        answer, change, velocity = gated_mlp_memory(*flat[:5], *pairs, momentum=0.5)
        return answer, *change, *velocity

    assert torch.autograd.gradcheck(end, flat)
    assert torch.autograd.gradgradcheck(end, flat, fast_mode=True)
