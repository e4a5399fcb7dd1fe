"""DMGD in the limits where it is a known optimizer, against autograd, and with gradients made to break it."""

import math
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import deep_optim
from deep_optim import DeltaMomentum, Momentum
from deep_optim.ops.feature_map import feature_map
from deep_optim.ops.mlp_memory import sigmoid
from problem import SHAPES, copy_params, make_params, set_grads, trained

DMGD = partial(deep_optim.DMGD, hidden_dim=16)  # by default there are none
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


def test_hidden_weights_are_drawn_once_and_then_rounded():
    """Ranks and devices may differ in the dtype of a parameter, and in their default device or dtype."""
    drawn = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        (param,) = make_params([(6, 4)], dtype)
        optimizer = DMGD([param])
        set_grads([param], 0)
        optimizer.step()
        drawn[dtype] = optimizer.state[param]["memory.w2"]
    assert drawn[torch.bfloat16].dtype == torch.float32
    assert not torch.equal(drawn[torch.float64].float().double(), drawn[torch.float64])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(drawn[dtype], drawn[torch.float64].float())


@pytest.mark.parametrize("shape", [(12, 5), (4, 12), (6, 4, 2)], ids=str)
def test_blocks_of_rows_are_matrices_of_their_own(shape):
    """Each block has the memory, and makes the step, of a parameter that is this block."""
    (whole,) = make_params([shape], torch.float64)
    blocks = [torch.nn.Parameter(block.clone()) for block in whole.detach().chunk(2)]
    options = dict(hidden_dim=3, hidden_lr=0.1)
    split, apart = DMGD([{"params": [whole], "split": 2}], **options), DMGD(blocks, **options)
    for step in range(3):
        set_grads([whole], step)
        for block, grad in zip(blocks, whole.grad.chunk(2), strict=True):
            block.grad = grad.clone()
        split.step()
        apart.step()
    torch.testing.assert_close(whole.detach(), torch.cat(blocks).detach())
    for name in NAMES:
        torch.testing.assert_close(split.state[whole][name], torch.cat([apart.state[block][name] for block in blocks]))


def test_state_is_contiguous_whatever_the_shape():
    params = make_params(MATRICES)
    optimizer = DMGD(params)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
        assert all(value.is_contiguous() for state in optimizer.state.values() for value in state.values())


def test_adam_output_keeps_four_bytes_more_per_parameter_and_a_counter():
    (param,) = make_params([(6, 4)])
    optimizer = DMGD([param], output="adam", hidden_dim=3)
    set_grads([param], 0)
    optimizer.step()
    assert sum(value.nbytes for value in optimizer.state[param].values()) == 8 * 24 + 4 * 3 * (6 + 4) + 4


@pytest.mark.parametrize("lookahead", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("nesterov", [True, False])
def test_adam_output_is_unbiased_for_any_lookahead(lookahead, nesterov):
    """With nothing erased and a constant gradient of one size, every step is lr, from the first to the last."""
    param = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    options = dict(inner_lr=0.0, output="adam", lr=0.1, weight_decay=0.0, nesterov=nesterov, lookahead=lookahead)
    optimizer = DMGD([param], **options)
    for step in range(1, 5):
        param.grad = torch.ones_like(param)
        optimizer.step()
        torch.testing.assert_close(param.detach(), torch.full_like(param, -0.1 * step), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("inner_lr", [1e-3, 0.5])
def test_training_the_hidden_weights_never_poisons_them(scale, inner_lr):
    """Their size is kept to the last digits, whatever the size of the gradients and of the target."""
    grads = [gradient(seed).float() * scale for seed in range(10)]
    _, state = run(grads, hidden_lr=0.1, inner_lr=inner_lr)
    _, untrained = run(grads[:1], hidden_lr=0.0)
    torch.testing.assert_close(state["memory.w2"].norm(), untrained["memory.w2"].norm())
    assert not torch.equal(state["memory.w2"], untrained["memory.w2"])


def test_no_inner_lr_means_no_target_to_train_hidden_weights_on():
    grads = [gradient(seed) for seed in range(3)]
    _, trained_state = run(grads, hidden_lr=0.1, inner_lr=0.0)
    _, state = run(grads, hidden_lr=0.0, inner_lr=0.0)
    assert torch.equal(trained_state["memory.w2"], state["memory.w2"])


@pytest.mark.parametrize("hidden_lr", [0.0, 0.1])
@pytest.mark.parametrize("transposed", [False, True], ids=["tall", "wide"])
def test_costs_the_flops_that_it_states(hidden_lr, transposed):
    """8 m (1 + h/m)² per parameter and three products of m + h, and 2 h for the features; W₂ about as much again."""
    r, p, h = 96, 32, 16
    param = torch.nn.Parameter(torch.zeros((p, r) if transposed else (r, p)))
    optimizer = DMGD([param], output="identity", hidden_dim=h, hidden_lr=hidden_lr)
    param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    stated = 8 * p * (1 + h / p) ** 2 * r * p + 3 * 2 * (p + h) ** 3 + 2 * r * p * h
    if hidden_lr:
        assert 1.5 * stated < counter.get_total_flops() < 2 * stated
    else:
        assert counter.get_total_flops() == stated


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("transposed", [False, True], ids=["tall", "wide"])
def test_the_first_write_is_the_soft_rows_in_closed_form(transposed, scale):
    """Each key over its length and 0.3 of the RMS of the lengths, the whole brought back to the gradient's norm."""
    grad = gradient(0, (8, 3)).float() * scale
    _, state = run([grad.mT.contiguous() if transposed else grad])
    keys = grad.double() / scale
    length = keys.norm(dim=1, keepdim=True)
    expected = keys / (length + 0.3 * length.square().mean().sqrt())
    expected = expected * keys.norm() / expected.norm()
    written = state["memory.linear"].double() / scale
    torch.testing.assert_close(written.mT if transposed else written, expected, rtol=1e-5, atol=1e-5)


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
@pytest.mark.parametrize("inner_steps", [1, 4, 6])
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


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_dim": -1}, "Invalid hidden_dim value: -1"),
        ({"hidden_dim": 2.5}, "Invalid hidden_dim value: 2.5"),
        ({"inner_steps": 0}, "Invalid inner_steps value: 0"),
        ({"inner_lr": 0.9}, "Invalid inner_lr value: 0.9, stable up to"),
        ({"hidden_lr": math.nan}, "Invalid hidden_lr value: nan"),
        ({"lookahead": -0.5}, "Invalid lookahead value: -0.5"),
        ({"lookahead": 0.0}, "Invalid lookahead value: 0.0 .nesterov=False"),
        ({"lookahead": math.inf}, "Invalid lookahead value: inf"),
        ({"inner_steps": 7}, "Invalid inner_steps value: 7, expected 1 to 6"),
        ({"inner_steps": 2.0}, "Invalid inner_steps value: 2.0"),
        ({"inner_steps": True}, "Invalid inner_steps value: True"),
        ({"hidden_dim": math.inf}, "Invalid hidden_dim value: inf"),
        ({"hidden_lr": math.inf}, "Invalid hidden_lr value: inf"),
        ({"backend": "cuda"}, "Invalid backend: 'cuda'"),
        ({"nonfinite": "pass"}, "Invalid nonfinite: 'pass'"),
    ],
    ids=str,
)
def test_refuses_what_it_cannot_use(options, message):
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        DMGD(make_params(), **options)
    with pytest.raises(ValueError):
        DMGD([{"params": make_params(), **options}])


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=["wide", "tall"])
def test_a_memory_keeps_its_hidden_dim(shape):
    (param,) = params = make_params([shape])
    optimizer = DMGD(params, hidden_dim=3)
    optimizer.param_groups[0]["hidden_dim"] = 2  # nothing is kept yet
    set_grads(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["hidden_dim"] = 3
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="have hidden_dim=2, the group says 3; a memory keeps its size"):
        optimizer.step()
    assert torch.equal(param, before)


def test_copies_do_not_share_a_memory():
    params = make_params()
    optimizer = DMGD(params)
    set_grads(params, 0)
    optimizer.step()
    twin = DMGD(copy_params(params))
    twin.load_state_dict(optimizer.state_dict())
    for old, new in zip(optimizer.state.values(), twin.state.values(), strict=True):
        assert all(old[name].data_ptr() != new[name].data_ptr() for name in old)


@pytest.mark.parametrize("size", [64, 7])
@pytest.mark.parametrize("inner_steps", range(1, 7))
def test_is_stable_at_the_largest_inner_lr_in_bfloat16_too(inner_steps, size, monkeypatch):
    """The polynomial's coefficients cancel: what is accepted must survive the rounding of its products."""
    monkeypatch.setattr("deep_optim.ops.two_sided_delta.working_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr("deep_optim.ops.deep_momentum.working_dtype", lambda _: torch.bfloat16)
    inner_lr = 1.95 / 1.05 / (1 + (inner_steps > 1) / math.cosh(inner_steps * math.acosh(1.5))) / 2 - 1e-9
    rng = torch.Generator().manual_seed(0)
    low_rank = torch.randn(size, 3, generator=rng) @ torch.randn(3, size, generator=rng)
    grads = [low_rank + 0.01 * torch.randn(size, size, generator=rng) for _ in range(60)]
    _, state = run(grads, inner_lr=inner_lr, inner_steps=inner_steps)
    assert state["memory.linear"].norm() < max(float(grad.norm()) for grad in grads) / (1 - 0.95)


def test_hidden_weights_do_not_depend_on_the_default_device():
    (param,) = params = make_params([(4, 3)])
    optimizer = DMGD(params)
    set_grads(params, 0)
    torch.set_default_device("meta")
    try:
        optimizer.step()
    finally:
        torch.set_default_device(None)
    assert all(value.device.type == "cpu" for value in optimizer.state[param].values())


def test_hidden_weights_survive_a_tiny_inner_lr_and_a_huge_gradient():
    _, state = run([1e30 * gradient(seed).float() for seed in range(3)], inner_lr=1e-10, hidden_lr=0.1)
    assert all(value.isfinite().all() for value in state.values())


def test_by_default_there_is_no_hidden_layer():
    params = make_params()
    optimizer = deep_optim.DMGD(params)
    set_grads(params, 0)
    optimizer.step()
    assert optimizer.state[params[0]]["memory.w1"].shape == (1, 6, 0)
