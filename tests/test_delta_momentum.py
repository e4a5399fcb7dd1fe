"""Delta momentum in the limits where its answer is known, and at the edges where others fail."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deep_optim import DeltaMomentum, Momentum
from deep_optim.ops.feature_map import feature_map
from problem import SHAPES, make_params, trained

SIDES = ["right", "left", "both"]
LITERAL = dict(side="right", gram_norm="trace", feature_map="identity")  # nearest to the printed rule


def gradient(seed, shape=(4, 6)):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(grads, start=None, **options):
    param = torch.nn.Parameter(torch.zeros_like(grads[0]) if start is None else start.clone())
    optimizer = DeltaMomentum([param], **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach(), optimizer.state[param]["memory"]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("gram_norm", ["eigenvalue", "trace"])
@pytest.mark.parametrize("feature_map", ["identity", "soft_rows"])
def test_no_inner_step_is_momentum_bit_for_bit(side, gram_norm, feature_map):
    options = dict(feature_map=feature_map, lr=0.1)
    ours = trained(DeltaMomentum, SHAPES, inner_lr=0.0, side=side, gram_norm=gram_norm, **options)
    assert all(map(torch.equal, ours, trained(Momentum, SHAPES, **options)))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5), (1, 6), (6, 1)], ids=str)
def test_memory_takes_one_gradient_step_of_the_stated_objective(side, shape):
    """momentum = 1: autograd of ½ ‖M Kᵀ − c I‖² (right), of ½ ‖Kᵀ M − c I‖² (left), or of both."""
    rate = 0.3
    _, memory = run([gradient(0, shape)], momentum=1.0, inner_lr=rate, gram_norm="trace", side=side)
    before = memory.clone().requires_grad_()
    _, after = run([gradient(0, shape), gradient(1, shape)], momentum=1.0, inner_lr=rate, gram_norm="trace", side=side)
    written = feature_map(gradient(1, shape), "soft_rows")
    key = written / written.norm()
    sides = ["right", "left"] if side == "both" else [side]
    objective = sum(_objective(before, key, name) for name in sides)
    (descent,) = torch.autograd.grad(objective, before)
    # each side's own target would write the gradient once more; the rule writes it once
    torch.testing.assert_close(after, before.detach() - rate * descent + written)


def _objective(memory, key, side):
    return 0.5 * (memory @ key.mT if side == "right" else key.mT @ memory).square().sum()


@pytest.mark.parametrize("gram_norm, order", [("trace", "fro"), ("eigenvalue", 2)])
def test_the_target_writes_the_gradient_itself(gram_norm, order):
    """½ ‖M Kᵀ − c I‖² with K = G / s and c = s / inner_lr: its gradient at M = 0 is −c K, and one step adds G."""
    grad, rate = gradient(0), 0.3
    scale = torch.linalg.matrix_norm(grad, order)
    key = grad / scale
    memory = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    target = scale / rate * torch.eye(4, dtype=torch.float64)
    (descent,) = torch.autograd.grad(0.5 * (memory @ key.mT - target).square().sum(), memory)
    torch.testing.assert_close(-rate * descent, grad)
    torch.testing.assert_close(run([grad], **{**LITERAL, "gram_norm": gram_norm})[1], grad)


def test_for_one_sample_it_is_the_input_keyed_rule():
    """g = δ xᵀ: gᵀg / ‖g‖² = x̂ x̂ᵀ, so that M ← M (β I − c x̂ x̂ᵀ) + δ xᵀ, without ever seeing x."""
    expected = torch.zeros(4, 6, dtype=torch.float64)
    grads = []
    for t in range(5):
        error, x = gradient(t, (4, 1)), gradient(t + 50, (6, 1))
        unit = x / x.norm()
        expected = expected @ (0.9 * torch.eye(6, dtype=torch.float64) - 0.5 * unit @ unit.mT) + error @ x.mT
        grads.append(error @ x.mT)
    torch.testing.assert_close(run(grads, momentum=0.9, inner_lr=0.5, **LITERAL)[1], expected)
    for exact in ("eigenvalue", "trace"):  # at rank one they are the same number
        options = {**LITERAL, "gram_norm": exact}
        torch.testing.assert_close(run(grads, momentum=0.9, inner_lr=0.5, **options)[1], expected)


def test_equals_momentum_while_gradients_share_no_direction():
    """With orthogonal keys there is nothing to erase: the delta rule is torch's SGD."""
    grads = [torch.eye(2, 6, dtype=torch.float64).roll(2 * i, dims=1) for i in range(3)]
    ours, _ = run(grads, lr=0.1, momentum=0.9, output="identity", weight_decay=0, nesterov=False, **LITERAL)
    theirs = torch.nn.Parameter(torch.zeros(2, 6, dtype=torch.float64))
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for grad in grads:
        theirs.grad = grad
        sgd.step()
    torch.testing.assert_close(ours, theirs.detach())


def test_memory_saturates_on_a_repeated_gradient():
    """Plain momentum piles up to 1 / (1 − β); a rank-one key settles at 1 / (1 − β + c)."""
    grad = gradient(0, (1, 6))
    _, memory = run([grad] * 200, momentum=0.95, inner_lr=0.5, **LITERAL)
    torch.testing.assert_close(memory, grad / (1 - 0.95 + 0.5))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("gram_norm", ["eigenvalue", "trace"])
def test_retention_factor_has_its_spectrum_where_stated(side, gram_norm):
    """The map vec(M) ↦ kept memory is symmetric with eigenvalues in [β − c · sides, β]."""
    shape, momentum, rate = (4, 3), 0.9, 0.5
    columns = []
    warm = [gradient(seed, shape) for seed in range(3)]
    for basis in torch.eye(12, dtype=torch.float64):
        param = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = DeltaMomentum([param], momentum=momentum, inner_lr=rate, side=side, gram_norm=gram_norm)
        for grad in warm:
            param.grad = grad.clone()
            optimizer.step()
        zero_memory = _step_from(optimizer, param, torch.zeros(shape, dtype=torch.float64))
        columns.append((_step_from(optimizer, param, basis.reshape(shape)) - zero_memory).flatten())
    factor = torch.stack(columns)
    torch.testing.assert_close(factor, factor.mT)
    values = torch.linalg.eigvalsh(factor)
    sides = 2 if side == "both" else 1
    assert momentum - sides * rate - 0.01 <= values.min() and values.max() <= momentum + 1e-9
    if gram_norm == "eigenvalue":  # the loudest direction is forgotten at nearly the full rate: the bound is close
        assert values.min() < momentum - 0.75 * sides * rate


def _step_from(optimizer, param, memory):
    saved = {name: value.clone() for name, value in optimizer.state[param].items()}
    optimizer.state[param]["memory"].copy_(memory)
    param.grad = gradient(7, param.shape)
    optimizer.step()
    after = optimizer.state[param]["memory"].clone()
    for name, value in saved.items():
        optimizer.state[param][name].copy_(value)
    return after


@given(exponent=st.integers(-40, 40), side=st.sampled_from(SIDES), gram_norm=st.sampled_from(["eigenvalue", "trace"]))
def test_the_loss_scale_does_not_matter(exponent, side, gram_norm):
    grads = [gradient(seed) for seed in range(4)]
    scale = 2.0**exponent
    options = dict(side=side, gram_norm=gram_norm)
    weights, memory = run(grads, **options)
    scaled_weights, scaled_memory = run([grad * scale for grad in grads], **options)
    torch.testing.assert_close(scaled_memory, memory * scale, rtol=1e-6, atol=1e-9 * scale)
    torch.testing.assert_close(scaled_weights, weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("gram_norm", ["eigenvalue", "trace"])
def test_transposing_the_weights_swaps_the_sides(gram_norm):
    grads = [gradient(seed) for seed in range(5)]
    mirrored = [grad.mT.contiguous() for grad in grads]
    for side, other in zip(SIDES, ["left", "right", "both"], strict=True):
        weights, _ = run(grads, side=side, gram_norm=gram_norm)
        torch.testing.assert_close(run(mirrored, side=other, gram_norm=gram_norm)[0], weights.mT)


@pytest.mark.parametrize("gram_norm", ["eigenvalue", "trace"])
@pytest.mark.parametrize("side", SIDES)
def test_is_stable_at_the_largest_inner_lr_on_streams_made_to_break_it(side, gram_norm):
    """New directions every step, sizes that jump by 1e6, and a first gradient of rank one."""
    limit = 1.95 / 1.05 / (2 if side == "both" else 1)
    rng = torch.Generator().manual_seed(0)
    grads, largest = [], 0.0
    for t in range(300):
        grad = torch.zeros(8, 8, dtype=torch.float64)
        grad[t % 8, (3 * t) % 8] = 1.0
        if t > 150:  # the largest diagonal entry alone in its block, the largest eigenvalue in another
            grad = torch.block_diag(torch.tensor(1.5), torch.full((7, 7), 7**-0.5)).double()
        if t % 3 == 0:
            grad += torch.randn(8, 8, generator=rng, dtype=torch.float64)
        grads.append(grad * (1.0 if t % 7 else 1e6))
        largest = max(largest, float(grads[-1].norm()))
    _, memory = run(grads, momentum=0.95, inner_lr=limit, side=side, gram_norm=gram_norm)
    assert memory.norm() < largest / (1 - 0.95)  # what plain momentum may reach


@pytest.mark.parametrize("side, sides", [("right", 1), ("left", 1), ("both", 2)])
@pytest.mark.parametrize("inner_steps, erased", [(1, 1.0), (3, 10 / 9)])
def test_refuses_an_unstable_inner_lr(side, sides, inner_steps, erased):
    """1 + momentum over the sides, less what several steps overshoot and a twentieth for rounding."""
    params = make_params([(2, 2)], torch.float64)
    options = dict(side=side, momentum=0.8, inner_steps=inner_steps)
    limit = 1.8 / 1.05 / erased / sides
    DeltaMomentum(params, inner_lr=limit - 1e-9, **options)
    with pytest.raises(ValueError, match="Invalid inner_lr value"):
        DeltaMomentum(params, inner_lr=limit + 1e-9, **options)


@pytest.mark.parametrize("output", ["identity", "adam", "newton_schulz"])
def test_a_zero_gradient_writes_nothing(output):
    """The memory only ages, by the common decay."""
    (param,) = make_params([(4, 6)], torch.float64)
    optimizer = DeltaMomentum([param], momentum=0.9, output=output)
    param.grad = gradient(0)
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[param].items()}
    param.grad = torch.zeros(4, 6, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["memory"], 0.9 * before["memory"])


def test_rows_of_zeros_and_parameters_of_zeros_give_finite_steps():
    grad = gradient(0, (6, 4))
    grad[[1, 4]] = 0.0
    weights, memory = run([grad] * 3)
    assert weights.isfinite().all() and memory[[1, 4]].abs().max() == 0


@pytest.mark.parametrize("lr", [1e-4, 1e-3, 1e-2, 1e-1, 0.5])
def test_the_printed_rule_diverges_on_the_papers_own_example(lr):
    """Eq. 49 on Eq. 53: without a step size on the Gram, ‖g‖² = 757 multiplies the momentum by about −756."""
    k, a, w, momentum = 1.0, 1.0, 5.0, 0.9
    point = torch.tensor([[-3.5, 2.0]], dtype=torch.float64, requires_grad=True)
    memory = torch.zeros(1, 2, dtype=torch.float64)
    values = []
    for _ in range(500):
        value = point[0, 0] ** 2 + k * (point[0, 0] - point[0, 1] + a * torch.sin(w * point[0, 0])) ** 2
        (grad,) = torch.autograd.grad(value, point)
        values.append(value.item())
        memory = memory @ (momentum * torch.eye(2, dtype=torch.float64) - grad.mT @ grad) - lr * grad
        point = (point + memory).detach().requires_grad_()
        if not torch.isfinite(point).all():
            break
    assert not min(values[1:]) < 1e-6
    if lr >= 1e-3:
        assert not torch.isfinite(point).all() or max(values) > 10 * values[0]


@pytest.mark.parametrize(("feature_map", "stays"), [("identity", True), ("soft_rows", False)])
def test_updates_stay_in_the_span_of_the_gradients_rows_unless_features_change_it(feature_map, stays):
    """What one task leaves of another whose inputs are orthogonal to its own; rows brought to equal length leave it."""
    rng = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=rng, dtype=torch.float64)).Q
    inside, outside = basis[:, :5], basis[:, 5:]
    param = torch.nn.Parameter(torch.zeros(8, 12, dtype=torch.float64))
    optimizer = DeltaMomentum([param], lr=0.1, feature_map=feature_map, weight_decay=0.0)
    for _ in range(5):
        param.grad = torch.randn(8, 5, generator=rng, dtype=torch.float64) @ inside.mT
        optimizer.step()
    left = (param.detach() @ outside).norm() / param.detach().norm()
    assert (left < 1e-6) == stays
