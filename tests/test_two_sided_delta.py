"""The two-sided delta rule against autograd, step by step, and against the bounds that keep it stable."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from deep_optim.ops.two_sided_delta import (
    _coefficients,
    erasing_polynomial,
    inverse_bound,
    most_erased,
    two_sided_delta,
)

SHAPES = [(6, 4), (4, 6), (5, 5), (1, 6), (6, 1), (1, 1), (3, 7, 4), (2, 2, 4, 9)]


def make(shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=rng, dtype=torch.float64) for _ in range(2))


def step_sizes(inner_steps):
    """Those of Chebyshev's semi-iteration: the reciprocals of the Chebyshev nodes of [0.2, 1]."""
    if inner_steps == 1:
        return [1.0]
    nodes = [math.cos((2 * i + 1) * math.pi / (2 * inner_steps)) for i in range(inner_steps)]
    return [1 / (0.6 + 0.4 * node) for node in nodes]


def descend(memory, key, inner_steps, transposed):
    """Gradient steps on ½ ‖M Kᵀ‖², or on ½ ‖Kᵀ M‖², by autograd."""
    for size in step_sizes(inner_steps):
        memory = memory.detach().requires_grad_()
        answer = key.mT @ memory if transposed else memory @ key.mT
        (grad,) = torch.autograd.grad(0.5 * answer.square().sum(), memory)
        memory = memory - size * grad
    return memory.detach()


def scaled_key(written, gram_norm):
    """K = U / (‖U‖ √λ), from singular values."""
    key = written / torch.linalg.matrix_norm(written, keepdim=True)
    if gram_norm == "trace":
        return key
    bound = torch.linalg.svdvals(key).pow(8).sum(-1).pow(0.25)[..., None, None]
    return key / bound.sqrt()


@pytest.mark.parametrize("gram_norm", ["eigenvalue", "trace"])
@pytest.mark.parametrize("inner_steps", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_erases_what_gradient_steps_on_either_objective_erase(shape, inner_steps, gram_norm):
    memory, written = make(shape)
    wide = shape[-2] < shape[-1]
    key = scaled_key(written, gram_norm)
    options = dict(decay=0.9, inner_steps=inner_steps, gram_norm=gram_norm)
    for short, long in ((0.4, 0.0), (0.0, 0.3), (0.4, 0.3)):
        out, _ = two_sided_delta(memory, written, short=short, long=long, **options)
        right = memory - descend(memory, key, inner_steps, transposed=wide)  # erased along the short dimension
        left = memory - descend(memory, key, inner_steps, transposed=not wide)
        torch.testing.assert_close(out, 0.9 * memory - short * right - long * left + written)


@pytest.mark.parametrize("lookahead", [None, 0.0, 1.0, 2.5])
def test_reads_the_memory_and_the_write_again(lookahead):
    memory, written = make((6, 4))
    after, read = two_sided_delta(memory, written, decay=0.9, short=0.5, long=0.5, lookahead=lookahead)
    torch.testing.assert_close(read, after if lookahead is None else lookahead * written + 0.9 * after)


@pytest.mark.parametrize("gram_norm", ["eigenvalue", "trace"])
def test_what_nothing_like_it_was_written_over_is_kept(gram_norm):
    """Keys and memory share no direction: the delta rule is plain momentum."""
    memory, written = torch.zeros(6, 4).double(), torch.zeros(6, 4).double()
    memory[:3, :2], written[3:, 2:] = make((3, 2))[0], make((3, 2))[1]
    after, _ = two_sided_delta(memory, written, decay=0.9, short=0.5, long=0.5, inner_steps=3, gram_norm=gram_norm)
    torch.testing.assert_close(after, 0.9 * memory + written)


@pytest.mark.parametrize("inner_steps", range(1, 8))
def test_the_share_erased_lies_in_its_bounds(inner_steps):
    """0 ≤ λ T(λ) ≤ most_erased on [0, 1], at most proportional to λ, and nearly 1 wherever λ is above 0.2."""
    eigenvalue = torch.linspace(0, 1, 1001, dtype=torch.float64)
    erased = sum(c * eigenvalue ** (i + 1) for i, c in enumerate(_coefficients(inner_steps)))
    assert erased.min() >= 0 and erased.max() <= most_erased(inner_steps) + 1e-12
    torch.testing.assert_close(erased.max().item(), most_erased(inner_steps), rtol=1e-4, atol=0)
    if inner_steps > 1:
        spread = most_erased(inner_steps) - 1
        assert (erased[eigenvalue >= 0.2] - 1).abs().max() <= spread + 1e-12
    slope = (erased[1] / eigenvalue[1]).item()
    assert slope == pytest.approx(sum(step_sizes(inner_steps)), rel=0.02)


@given(seed=st.integers(0, 1000), m=st.integers(1, 12), n=st.integers(1, 12), decades=st.integers(0, 6))
def test_the_bound_is_never_below_the_eigenvalue_and_never_far_above(seed, m, n, decades):
    key = make((m, n), seed)[0] * torch.logspace(0, -decades, n, dtype=torch.float64)
    gram = key.mT @ key / key.square().sum()
    eigenvalue = torch.linalg.eigvalsh(gram).max()
    bound = 1 / inverse_bound(gram @ gram).squeeze()
    assert eigenvalue * (1 - 1e-12) <= bound <= eigenvalue * min(m, n) ** 0.25 * (1 + 1e-12)


def test_the_bound_is_exact_for_a_rank_one_gradient():
    gram = torch.zeros(4, 4, dtype=torch.float64)
    gram[1, 1] = 1.0
    assert inverse_bound(gram @ gram).item() == 1.0


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_near_float64(shape, dtype, monkeypatch):
    """Only what is erased is computed in low precision, to within a few of its roundings."""
    monkeypatch.setattr("deep_optim.ops.two_sided_delta.working_dtype", lambda _: dtype)
    memory, written = make((5, *shape))
    options = dict(decay=0.9, short=0.5, long=0.5, inner_steps=3)
    exact, _ = two_sided_delta_in_float64(memory, written, options)
    out, read = two_sided_delta(memory.float(), written.float(), **options)
    assert out.dtype == read.dtype == torch.float32
    error = (out.double() - exact).norm() / (exact - 0.9 * memory - written).norm()
    assert error < 16 * torch.finfo(dtype).eps


def two_sided_delta_in_float64(memory, written, options):
    key = scaled_key(written, "eigenvalue")
    wide = memory.shape[-2] < memory.shape[-1]
    right, left = (memory - descend(memory, key, 3, transposed=side) for side in (wide, not wide))
    return 0.9 * memory - 0.5 * (right + left) + written, None


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_any_size_of_gradient_is_right(scale):
    memory, written = make((6, 4))
    options = dict(decay=0.9, short=0.5, long=0.5, inner_steps=3)
    expected, expected_read = two_sided_delta(memory, written, **options)
    if scale == 0.0:
        expected, expected_read = 0.9 * memory, 0.81 * memory
    out, read = two_sided_delta((memory * (scale or 1)).float(), (written * scale).float(), **options)
    torch.testing.assert_close(out.double() / (scale or 1), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(read.double() / (scale or 1), expected_read, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    memory, written = make((6, 4))
    written[0, 0] = bad
    assert not two_sided_delta(memory, written, decay=0.9, short=0.5, long=0.0)[0].isfinite().all()


def test_arguments_are_left_alone_and_layout_is_kept():
    for shape in ((6, 4), (4, 6)):
        memory, written = make((3, *shape))
        before = memory.clone(), written.clone()
        after, read = two_sided_delta(memory, written, decay=0.9, short=0.5, long=0.5, inner_steps=3)
        assert torch.equal(memory, before[0]) and torch.equal(written, before[1])
        assert after.is_contiguous() and read.is_contiguous()


@pytest.mark.parametrize("gram_norm", ["eigenvalue", "trace"])
@pytest.mark.parametrize("inner_steps", [1, 2, 3, 6])
def test_nothing_written_is_aging_alone_in_either_norm(inner_steps, gram_norm):
    """A Gram of zero has no scale: nothing is divided by it."""
    memory, _ = make((3, 6, 4))
    written = torch.zeros_like(memory)
    options = dict(decay=0.9, short=0.4, long=0.3, inner_steps=inner_steps, gram_norm=gram_norm)
    after, read = two_sided_delta(memory, written, **options)
    torch.testing.assert_close(after, 0.9 * memory)
    torch.testing.assert_close(read, 0.81 * memory)


def test_one_dead_member_of_a_stack_leaves_the_others_alone():
    memory, written = make((3, 6, 4))
    written[1] = 0.0
    options = dict(decay=0.9, short=0.4, long=0.3, inner_steps=3)
    after, _ = two_sided_delta(memory, written, **options)
    for i in range(3):
        torch.testing.assert_close(after[i], two_sided_delta(memory[i], written[i], **options)[0])


@pytest.mark.parametrize("inner_steps", [2, 3, 4, 5, 6])
def test_a_polynomial_of_a_bfloat16_gram_is_right_to_its_roundings(inner_steps):
    """Each power of the Gram is rounded once or twice; the coefficients, which cancel, are not."""
    eigenvalue = torch.linspace(0.02, 1, 50, dtype=torch.float64)
    gram = torch.diag(eigenvalue).bfloat16()
    eigenvalue = gram.double().diagonal()
    share = eigenvalue * inverse_bound(gram.double() @ gram.double()).squeeze()
    coefficients = _coefficients(inner_steps)
    exact = sum(c * share ** (i + 1) for i, c in enumerate(coefficients))
    roundings = sum(abs(c) * (i + 1) * share ** (i + 1) for i, c in enumerate(coefficients))
    (result,) = erasing_polynomial(gram[None], inner_steps, "eigenvalue")
    assert result.dtype == torch.bfloat16
    erased = result.double().diagonal() * eigenvalue
    assert ((erased - exact).abs() <= torch.finfo(torch.bfloat16).eps * roundings).all()


@pytest.mark.parametrize("shape", [(96, 32), (32, 96)], ids=["tall", "wide"])
@pytest.mark.parametrize("inner_steps, products", [(1, 1), (3, 3), (4, 4), (6, 5)])
def test_costs_the_flops_that_it_states(shape, inner_steps, products):
    """4 r p² on each of both sides, and a few products in the short dimension, however many inner steps."""
    memory, written = make(shape)
    with FlopCounterMode(display=False) as counter:
        two_sided_delta(memory, written, decay=0.9, short=0.5, long=0.5, inner_steps=inner_steps)
    assert counter.get_total_flops() == 2 * 4 * 96 * 32**2 + products * 2 * 32**3
