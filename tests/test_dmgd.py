"""DMGD in the limits where it is a known optimizer, against autograd, and with gradients made to break it."""

import math

import pytest
import torch

from deep_optim import DMGD, DeltaMomentum, Momentum
from deep_optim.ops.feature_map import feature_map
from deep_optim.ops.mlp_memory import sigmoid
from problem import SHAPES, copy_params, make_params, set_grads, snapshot, trained

MATRICES = [(6, 4), (4, 6), (5, 5), (1, 6), (6, 1), (1, 1), (4, 3, 2, 2)]
NAMES = ("memory.linear", "memory.w1", "memory.w2")


def gradient(seed, shape=(6, 4)):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(grads, **options):
    param = torch.nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = DMGD([param], **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach(), {name: value.clone() for name, value in optimizer.state[param].items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inner_steps, lookahead", [(1, 1.0), (3, 2.0), (4, 0.5)])
@pytest.mark.parametrize("output", ["identity", "adam", "newton_schulz"])
def test_without_hidden_features_it_is_delta_momentum_bit_for_bit(dtype, inner_steps, lookahead, output):
    options = dict(shapes=SHAPES, dtype=dtype, inner_steps=inner_steps, lookahead=lookahead, output=output)
    options |= dict(ns_steps=5)
    ours = trained(DMGD, hidden_dim=0, **options)
    assert all(map(torch.equal, ours, trained(DeltaMomentum, **options)))
    assert not all(map(torch.equal, ours, trained(DMGD, hidden_dim=2, **options)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden_dim", [0, 3])
@pytest.mark.parametrize("nesterov", [True, False])
def test_with_inner_rates_of_zero_it_is_momentum_bit_for_bit(dtype, hidden_dim, nesterov):
    options = dict(shapes=SHAPES, dtype=dtype, nesterov=nesterov, ns_steps=5)
    ours = trained(DMGD, inner_lr=0.0, hidden_lr=0.0, hidden_dim=hidden_dim, lookahead=1.0, **options)
    assert all(map(torch.equal, ours, trained(Momentum, feature_map="soft_rows", **options)))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (3, 2)], ids=str)
def test_the_memory_takes_one_gradient_step_of_each_objective(shape):
    """momentum = 1, one inner step: autograd of ½ ‖m(K)‖² and of its mirror image, with m as the docstring has it."""
    rate, h = 0.3, 3
    options = dict(momentum=1.0, inner_lr=rate, inner_steps=1, hidden_dim=h)
    grads = [gradient(seed, shape) for seed in range(3)]
    _, before = run(grads[:2], **options)
    _, after = run(grads, **options)
    wide = shape[0] < shape[1]
    linear, w1, w2 = (before[name].squeeze(0) for name in NAMES)
    if wide:
        linear, w1, w2 = linear.mT, w1.mT, w2.mT
    written = feature_map(grads[2], "soft_rows")
    keys = written.mT if wide else written  # [r, p]
    (r, p), size = keys.shape, keys.norm()
    hidden = torch.stack([sigmoid(math.sqrt(r * p) * w2 @ key / size) for key in keys]) * size / math.sqrt(r * h)
    features = torch.cat([keys, hidden], 1)  # [r, p + h]
    scaled = features / features.norm()
    scaled = scaled / torch.linalg.svdvals(scaled).pow(8).sum() ** 0.125  # by the bound on the largest eigenvalue
    weights = torch.cat([linear, w1], 1).requires_grad_()
    objective = 0.5 * (weights @ scaled.mT).square().sum() + 0.5 * (scaled.mT @ weights).square().sum()
    (descent,) = torch.autograd.grad(objective, weights)
    expected = weights.detach() - rate * descent + features  # what is written is what the target c makes it
    got = torch.cat([(after[name].mT if wide else after[name]).reshape(r, -1) for name in NAMES[:2]], 1)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=["tall", "wide"])
def test_hidden_weights_descend_the_objective_by_their_share(shape):
    """The step is along autograd's gradient of ½ ‖m(K) − c I‖², of size hidden_lr ‖W₂‖, on a sphere."""
    rate, h, size = 0.4, 3, 1e-4
    options = dict(inner_lr=rate, hidden_dim=h, hidden_lr=size)
    grads = [gradient(seed, shape) for seed in range(3)]
    _, before = run(grads[:2], **options)
    _, after = run(grads, **options)
    wide = shape[0] < shape[1]
    linear, w1, w2 = ((before[name].mT if wide else before[name]).reshape(-1, before_dim(name, h)) for name in NAMES)
    written = feature_map(grads[2], "soft_rows")
    keys = written.mT if wide else written
    (r, p), norm = keys.shape, keys.norm()
    keys = keys / norm
    target = norm / rate * torch.linalg.svdvals(keys).pow(8).sum() ** 0.25
    leaf = w2.clone().requires_grad_()
    hidden = sigmoid(math.sqrt(r * p) * keys @ leaf.mT) / math.sqrt(r * h)
    loss = 0.5 * (linear @ keys.mT + w1 @ hidden.mT - target * torch.eye(r, dtype=keys.dtype)).square().sum()
    (descent,) = torch.autograd.grad(loss, leaf)
    moved = (after["memory.w2"].mT if wide else after["memory.w2"]).reshape(w2.shape)
    tangent = descent - w2 * (descent * w2).sum() / w2.square().sum()
    expected = -size * w2.norm() * tangent / descent.norm()
    torch.testing.assert_close(moved - w2, expected, rtol=0, atol=3e-3 * expected.norm().item())
    torch.testing.assert_close(moved.norm(), w2.norm())


def before_dim(name, hidden_dim):
    return hidden_dim if name == "memory.w1" else 4  # the shorter side of every shape here is 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "shape, split", [(shape, split) for shape in MATRICES for split in (1, 2) if shape[0] % split == 0], ids=str
)
def test_state_has_the_stated_names_shapes_and_size(shape, dtype, split):
    """4 bytes per parameter and 4 h (m + n) per matrix (8 and 8 in float64); hidden parts lie as the matrix does."""
    h = 3
    (param,) = make_params([shape], dtype)
    optimizer = DMGD([{"params": [param], "split": split}], hidden_dim=h)
    set_grads([param], 0)
    optimizer.step()
    state = optimizer.state[param]
    m, n = shape[0] // split, param.numel() // shape[0]
    assert tuple(state) == NAMES
    assert state["memory.linear"].shape == param.shape
    assert state["memory.w1"].shape == ((split, h, n) if m < n else (split, m, h))
    assert state["memory.w2"].shape == ((split, m, h) if m < n else (split, h, n))
    item = 8 if dtype == torch.float64 else 4
    assert sum(value.nbytes for value in state.values()) == item * (param.numel() + split * h * (m + n))


def test_hidden_weights_are_the_same_for_every_optimizer_and_scaled_to_the_keys():
    shapes = [(300, 40), (40, 300), (300, 40)]
    drawn = []
    for count in (1, 3):
        params = make_params(shapes[:count])
        optimizer = DMGD(params, hidden_dim=64)
        torch.manual_seed(count)  # the global generator has no say
        set_grads(params, 0)
        optimizer.step()
        drawn.append([optimizer.state[param]["memory.w2"] for param in params])
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[1][0], drawn[1][2])
    assert torch.equal(drawn[1][1].mT, drawn[1][0])
    torch.testing.assert_close(drawn[0][0].square().mean(), torch.tensor(1 / 40), rtol=0.1, atol=0)
    assert drawn[0][0].mean().abs() < 0.02


@pytest.mark.parametrize("hidden_lr", [0.0, 0.1])
def test_transposing_the_weights_transposes_everything(hidden_lr):
    grads = [gradient(seed) for seed in range(4)]
    weights, state = run(grads, hidden_lr=hidden_lr)
    mirrored, other = run([grad.mT.contiguous() for grad in grads], hidden_lr=hidden_lr)
    torch.testing.assert_close(mirrored, weights.mT)
    for name in NAMES:
        torch.testing.assert_close(other[name], state[name].mT)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("hidden_lr", [0.0, 0.1])
def test_the_loss_scale_does_not_matter_in_float32(scale, hidden_lr):
    grads = [gradient(seed).float() for seed in range(4)]
    weights, state = run(grads, hidden_lr=hidden_lr)
    scaled_weights, scaled_state = run([grad * scale for grad in grads], hidden_lr=hidden_lr)
    torch.testing.assert_close(scaled_weights, weights, rtol=0.03, atol=0.03 * weights.abs().max().item())
    for name in NAMES[:2]:  # the products round in bfloat16
        error = (scaled_state[name].double() / scale - state[name]).norm() / state[name].norm()
        assert error < 0.02
    torch.testing.assert_close(scaled_state["memory.w2"], state["memory.w2"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("hidden_lr", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inner_steps", [1, 4, 8])
def test_a_zero_gradient_writes_nothing(hidden_lr, dtype, inner_steps):
    """The memory only ages, by the common decay; nothing divides by zero, at the first step or later."""
    options, zero = dict(hidden_lr=hidden_lr, inner_steps=inner_steps), torch.zeros(6, 4, dtype=dtype)
    for first in ([], [gradient(0).to(dtype)]):
        _, before = run([*first, zero], **options)
        _, after = run([*first, zero, zero], **options)
        for name in NAMES[:2]:
            torch.testing.assert_close(after[name], 0.95 * before[name])
        torch.testing.assert_close(after["memory.w2"], before["memory.w2"])


@pytest.mark.parametrize("hidden_lr", [0.0, 0.1])
def test_rank_one_gradients_and_dead_rows_give_finite_steps(hidden_lr):
    rank_one = gradient(0, (6, 1)) @ gradient(1, (1, 4))
    dead = gradient(2)
    dead[[1, 4]] = 0.0
    for grad in (rank_one, dead):
        weights, state = run([grad] * 20, hidden_lr=hidden_lr)
        assert weights.isfinite().all() and all(value.isfinite().all() for value in state.values())
    assert state["memory.linear"][[1, 4]].abs().max() == 0


@pytest.mark.parametrize("inner_steps", [1, 2, 3, 6])
def test_is_stable_at_the_largest_inner_lr_on_streams_made_to_break_it(inner_steps):
    """New directions every step, sizes that jump by 1e6, rank one now and then."""
    largest_inner_lr = 1.95 / 1.05 / (1 + (inner_steps > 1) / math.cosh(inner_steps * math.acosh(1.5))) / 2 - 1e-9
    rng = torch.Generator().manual_seed(0)
    grads = []
    for t in range(200):
        grad = torch.zeros(8, 8, dtype=torch.float64)
        grad[t % 8, (3 * t) % 8] = 1.0
        if t % 3 == 0:
            grad += torch.randn(8, 8, generator=rng, dtype=torch.float64)
        grads.append(grad * (1.0 if t % 7 else 1e6))
    _, state = run(grads, inner_lr=largest_inner_lr, inner_steps=inner_steps)
    bound = max(float(grad.norm()) for grad in grads) / (1 - 0.95)  # what plain momentum may reach
    assert state["memory.linear"].norm() < bound and state["memory.w1"].norm() < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_parameters_move_like_their_float32_twins(dtype):
    params = make_params(dtype=dtype)
    twins = [torch.nn.Parameter(param.detach().float()) for param in params]
    optimizers = DMGD(params), DMGD(twins)
    for step in range(3):
        set_grads(params, step)
        for param, twin in zip(params, twins, strict=True):
            twin.grad = param.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param.float(), twin.detach(), rtol=3 * torch.finfo(dtype).eps, atol=0.01)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
def test_an_empty_matrix_is_left_alone(shape):
    param = torch.nn.Parameter(torch.zeros(shape))
    param.grad = torch.zeros(shape)
    optimizer = DMGD([param])
    optimizer.step()
    assert not optimizer.state[param] and optimizer.memory_report() == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 2, 4], ids=["first", "a vector", "last"])
def test_raises_at_a_gradient_that_is_not_finite_before_anything_moves(bad, position):
    params, optimizer, before = self_made(nonfinite="raise")
    params[position].grad.view(-1)[-1] = bad
    with pytest.raises(RuntimeError, match=r"not finite.*nonfinite='skip'"):
        optimizer.step()
    for param, (value, state) in zip(params, before, strict=True):
        assert torch.equal(param, value)
        assert all(torch.equal(optimizer.state[param][name], state[name]) for name in state)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_skips_only_the_parameter_whose_gradient_is_not_finite(bad):
    params, optimizer, before = self_made(nonfinite="skip")
    params[1].grad.view(-1)[0] = bad
    optimizer.step()
    for index, (param, (value, state)) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(param, value) == (index == 1)
        if index == 1:
            assert all(torch.equal(optimizer.state[param][name], state[name]) for name in state)


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_gradient_whose_norm_alone_overflows_is_not_refused(nonfinite):
    params, optimizer, before = self_made(nonfinite=nonfinite)
    for param in params:
        param.grad = torch.full_like(param, 1e30)
    optimizer.step()
    assert all(not torch.equal(param, value) for param, (value, _) in zip(params, before, strict=True))
    assert all(param.isfinite().all() for param in params)


def self_made(**options):
    params = make_params()
    optimizer = DMGD([{"params": params[:3]}, {"params": params[3:]}], **options)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    set_grads(params, 2)
    state = [{name: value.clone() for name, value in optimizer.state[param].items()} for param in params]
    return params, optimizer, list(zip(snapshot(params), state, strict=True))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_dim": -1}, "Invalid hidden_dim value: -1"),
        ({"hidden_dim": 2.5}, "Invalid hidden_dim value: 2.5"),
        ({"inner_steps": 0}, "Invalid inner_steps value: 0"),
        ({"inner_lr": 0.9}, "Invalid inner_lr value: 0.9, stable up to"),
        ({"hidden_lr": math.nan}, "Invalid hidden_lr value: nan"),
        ({"lookahead": -0.5}, "Invalid lookahead value: -0.5"),
        ({"nonfinite": "ignore"}, "Invalid nonfinite: 'ignore'"),
    ],
    ids=str,
)
def test_refuses_what_it_cannot_use(options, message):
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        DMGD(make_params(), **options)
    with pytest.raises(ValueError):
        DMGD([{"params": make_params(), **options}])


def test_copies_do_not_share_a_memory():
    params = make_params()
    optimizer = DMGD(params)
    set_grads(params, 0)
    optimizer.step()
    twin = DMGD(copy_params(params))
    twin.load_state_dict(optimizer.state_dict())
    for old, new in zip(optimizer.state.values(), twin.state.values(), strict=True):
        assert all(old[name].data_ptr() != new[name].data_ptr() for name in old)
