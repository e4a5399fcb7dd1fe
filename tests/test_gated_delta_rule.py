"""The gated delta rule: its reference against autograd and its algebra, the chunk form against the reference."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from deep_optim.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_reference

SHAPES = [(8, 8, 8), (1, 3, 2), (0, 4, 3), (37, 5, 7), (2, 3, 21, 6, 4)]  # (..., T, d, m)
FORMS = {"chunk": gated_delta_rule, "reference": gated_delta_rule_reference}


def make(shape, dtype=torch.float64, lowest_decay=0.3):
    *batch, t, d, m = shape
    rng = torch.Generator().manual_seed(42)

    def randn(*size):
        return torch.randn(*batch, *size, generator=rng, dtype=torch.float64)

    def rand(*size):
        return torch.rand(*batch, *size, generator=rng, dtype=torch.float64)

    decay = lowest_decay ** rand(t)
    tensors = randn(t, d), F.normalize(randn(t, d), dim=-1), randn(t, m), decay.log(), 2 * rand(t), randn(m, d)
    return tuple(tensor.to(dtype) for tensor in tensors)


def written(form, keys, values, rate, change=None, decay=1.0):
    """The change of a memory after writing rows of keys and values."""
    t, d, m = *keys.shape, values.shape[1]
    gates = torch.full((2, t), 1.0, dtype=keys.dtype)
    change = torch.zeros(m, d, dtype=keys.dtype) if change is None else change
    return form(keys, keys, values, (decay * gates[0]).log(), rate * gates[1], change)[1]


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_chunk_is_the_tokens_one_by_one(shape, chunk_size, momentum):
    inputs = make(shape)
    velocity = inputs[-1].flip(-1) if momentum else None
    out = gated_delta_rule(*inputs, velocity, momentum=momentum, chunk_size=chunk_size)
    expected = gated_delta_rule_reference(*inputs, velocity, momentum=momentum)
    for ours, theirs in zip(out, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_the_reference_is_one_gradient_step_from_what_has_decayed():
    """M_0 is in the value and in the answer alone; the memory M_0 + D is what descends."""
    query, key, value, log_decay, rate, change = make((3, 4, 5))
    initial = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    answer, end, _ = gated_delta_rule_reference(query, key, value - key @ initial.mT, log_decay, rate, change)
    memory = initial + change
    for t in range(3):
        memory = (initial + log_decay[t].exp() * (memory - initial)).requires_grad_()
        (grad,) = torch.autograd.grad(0.5 * (memory @ key[t] - value[t]).square().sum(), memory)
        memory = (memory - rate[t] * grad).detach()
        torch.testing.assert_close(answer[t] + initial @ query[t], memory @ query[t])
    torch.testing.assert_close(initial + end, memory)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_momentum_is_torch_sgd_on_the_stated_objective(form):
    _, key, value, _, _, change = make((6, 4, 5))
    memory = torch.nn.Parameter(change.clone())
    optimizer = torch.optim.SGD([memory], lr=0.3, momentum=0.8)
    for k, v in zip(key, value, strict=True):
        optimizer.zero_grad()
        (0.5 * (memory @ k - v).square().sum()).backward()
        optimizer.step()
    none, rate = torch.zeros(6, dtype=torch.float64), torch.full((6,), 0.3, dtype=torch.float64)
    out = form(key, key, value, none, rate, change, momentum=0.8)
    torch.testing.assert_close(out[1], memory.detach())
    torch.testing.assert_close(out[2], -0.3 * optimizer.state[memory]["momentum_buffer"])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_orthonormal_keys_are_recalled_exactly(form):
    _, key, value, *_ = make((4, 6, 5))
    key = torch.linalg.qr(key.mT).Q.mT
    torch.testing.assert_close(key @ written(form, key, value, 1.0).mT, value)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_key_that_is_written_again_answers_the_new_value_only(form):
    _, key, value, *_ = make((4, 6, 5))
    change = written(form, key[[0, 0, 0]], value[:3], 1.0)
    torch.testing.assert_close(change @ key[0], value[2])
    assert torch.linalg.matrix_rank(change) == 1


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_rate_of_two_reflects(form):
    """I − 2 k kᵀ has the eigenvalue −1: an odd number of tokens flips the answer, which is how parity is counted."""
    _, key, value, _, _, change = make((7, 6, 5))
    zero = torch.zeros_like(value)
    flipped = written(form, key[[0] * 7], zero, 2.0, change)
    torch.testing.assert_close(flipped @ key[0], -change @ key[0])
    torch.testing.assert_close(written(form, key, zero, 2.0, change).norm(), change.norm())  # and preserves lengths


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_without_writes_the_change_fades_by_the_decays(form):
    query, key, value, log_decay, rate, change = make((9, 6, 5))
    answer, end, _ = form(query, key, value, log_decay, 0 * rate, change)
    torch.testing.assert_close(end, log_decay.exp().prod() * change)
    torch.testing.assert_close(answer, log_decay.exp().cumprod(0)[:, None] * (query @ change.mT))


def test_the_printed_rule_recalls_half():
    """Decay a I − η k kᵀ and the gradient's own erasure take what the key reads away twice."""
    _, key, value, *_ = make((1, 6, 5))
    k, v = key[0], value[0]
    printed = torch.zeros(5, 6, dtype=torch.float64)
    for _ in range(100):
        printed = printed @ (torch.eye(6, dtype=torch.float64) - 0.5 * torch.outer(k, k)) - 0.5 * torch.outer(
            printed @ k - v, k
        )
    torch.testing.assert_close(printed @ k, v / 2)
    torch.testing.assert_close(written(gated_delta_rule, key.expand(100, 6), value.expand(100, 5), 0.5) @ k, v)


@pytest.mark.parametrize("common", [0.0, 0.7, 1.0])
def test_erasing_never_expands_in_float32(common):
    """Rates up to 2 on keys that share a component, up to being equal; 2,048 tokens in chunks of 64."""
    query, key, value, _, rate, change = make((2048, 16, 4), torch.float32)
    key = F.normalize(common**0.5 * key[:1] + (1 - common) ** 0.5 * key, dim=-1)
    rate[::3] = 2.0
    none = torch.zeros(2048)
    norms = [change.norm()]
    for part in range(0, 2048, 256):
        piece = slice(part, part + 256)
        _, change, _ = gated_delta_rule(query[piece], key[piece], 0 * value[piece], none[piece], rate[piece], change)
        norms.append(change.norm())
    assert all(later <= 1.0001 * before for before, later in itertools.pairwise(norms))


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_decays_of_a_thousandth_keep_float32_accurate(momentum):
    """After 13 such tokens a product of decays is below float32."""
    single = [tensor.float().requires_grad_() for tensor in make((64, 8, 5), lowest_decay=1e-3)]
    double = [tensor.detach().double().requires_grad_() for tensor in single]
    out = gated_delta_rule(*single, momentum=momentum)[:2]
    exact = gated_delta_rule_reference(*double, momentum=momentum)[:2]
    grads = torch.autograd.grad(sum(each.square().sum() for each in out), single)
    exact_grads = torch.autograd.grad(sum(each.square().sum() for each in exact), double)
    for ours, theirs in zip((*out, *grads), (*exact, *exact_grads), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rate, diverges", [(1.0, True), (0.1, False)])
def test_momentum_needs_a_rate_that_shrinks_with_it(rate, diverges):
    """Every key by itself is stable below 2 (1 + momentum); keys that change are not, unless writes are averaged."""
    query, key, value, log_decay, *_, change = make((1024, 16, 16), torch.float32, lowest_decay=0.999)
    out = gated_delta_rule(query, key, value, log_decay, torch.full((1024,), rate), change, momentum=0.9)
    assert (not out[1].isfinite().all() or out[1].norm() > 1e6) == diverges


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_a_sequence_may_be_cut_anywhere(momentum):
    query, key, value, log_decay, rate, change = make((2, 13, 5, 3))
    whole = gated_delta_rule(query, key, value, log_decay, rate, change, momentum=momentum, chunk_size=4)
    for cut in range(14):
        parts, carried = [], (change, None)
        for piece in (slice(0, cut), slice(cut, 13)):
            tokens = (t[:, piece] for t in (query, key, value, log_decay, rate))
            part, *carried = gated_delta_rule(*tokens, *carried, momentum=momentum, chunk_size=4)
            parts.append(part)
        torch.testing.assert_close((torch.cat(parts, -2), *carried), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_only_the_leading_rows_need_answer(form, momentum):
    inputs = make((9, 4, 6))
    whole, part = form(*inputs, momentum=momentum), form(*inputs, momentum=momentum, answers=2)
    torch.testing.assert_close(part[0], whole[0][:, :2])
    torch.testing.assert_close(part[1], whole[1])


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_it_can_be_differentiated_twice(momentum):
    """Across a chunk's end, in everything it takes."""
    inputs = [tensor.requires_grad_() for tensor in (*make((5, 2, 2)), make((5, 2, 2))[-1].flip(0))]

    def end(*inputs):
        tensors = inputs if momentum else inputs[:-1]
        return tuple(x for x in gated_delta_rule(*tensors, momentum=momentum, chunk_size=3) if x is not None)

    assert torch.autograd.gradcheck(end, inputs)
    assert torch.autograd.gradgradcheck(end, inputs, fast_mode=True)
