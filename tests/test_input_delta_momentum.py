"""Input-keyed delta momentum in the limits where its answer is known, and what it asks of whoever uses it."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

from deep_optim import DGD, DeltaMomentum, InputDeltaMomentum, Momentum, capture_inputs, param_groups
from deep_optim.ops.times_gram import times_gram
from problem import SHAPES, copy_params, make_model, model_loss, set_grads, snapshot, trained

PLAIN = dict(output="identity", nesterov=False, weight_decay=0.0)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(n=6, m=4, **options):
    torch.manual_seed(0)
    return nn.Linear(n, m, bias=False, dtype=torch.float64, **options)


def train(model, optimizer, batches, loss=lambda y: y.square().mean()):
    for batch in batches:
        optimizer.zero_grad()
        loss(model(batch)).backward()
        optimizer.step()
    return snapshot(model.parameters())


@pytest.mark.parametrize("m, keys, n", [(3, 2, 5), (5, 2, 3), (40, 6, 7), (2, 9, 4), (4, 0, 3)], ids=str)
def test_both_ways_to_multiply_with_a_gram_are_one_product(m, keys, n):
    matrix, key = draw(2, m, n), draw(2, keys, n, seed=1)
    torch.testing.assert_close(times_gram(matrix, key), matrix @ (key.mT @ key))


@pytest.mark.parametrize(
    "m, keys, n, flops",
    [(8, 2, 16, 4 * 8 * 2 * 16), (64, 12, 16, 2 * 16 * 16 * (64 + 12)), (8, 99, 4, 2 * 4 * 4 * 107)],
)
def test_takes_the_cheaper_way(m, keys, n, flops):
    """By torch's own count of what was multiplied."""
    with FlopCounterMode(display=False) as counter:
        times_gram(draw(1, m, n), draw(1, keys, n))
    assert counter.get_total_flops() == flops <= 4 * m * keys * n


@pytest.mark.parametrize("tokens", [3, 50], ids=["rows", "gram"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("output", ["identity", "adam", "newton_schulz"])
def test_no_inner_step_is_momentum_bit_for_bit(tokens, nesterov, output):
    moved = []
    for cls in (InputDeltaMomentum, Momentum):
        model = nn.Sequential(linear(), nn.Tanh(), linear(4, 3))
        options = dict(inputs=capture_inputs(model), inner_lr=0.0) if cls is InputDeltaMomentum else {}
        optimizer = cls(model.parameters(), lr=0.1, nesterov=nesterov, output=output, **options)
        moved.append(train(model, optimizer, [draw(tokens, 6, seed=seed) for seed in range(4)]))
    assert all(map(torch.equal, *moved))


@pytest.mark.parametrize("tokens", [3, 50], ids=["rows", "gram"])
def test_the_memory_takes_one_gradient_step_of_the_stated_objective(tokens):
    """By autograd: ½ E ‖M x̂ − c δ‖² with the target that makes the write the gradient itself."""
    layer, rate, beta = linear(), 0.3, 0.9
    optimizer = InputDeltaMomentum([layer.weight], inputs=capture_inputs(layer, every=1), momentum=beta, inner_lr=rate)
    x = draw(tokens, 6)
    for seed in range(3):
        before = optimizer.state[layer.weight].get("memory", torch.zeros_like(layer.weight)).clone().requires_grad_()
        train(layer, optimizer, [x := draw(tokens, 6, seed=seed)])
        keys = x / x.norm(dim=1, keepdim=True)
        objective = 0.5 * (before @ keys.mT).square().sum(0).mean()
        (descent,) = torch.autograd.grad(objective, before)
        expected = beta * before.detach() - rate * descent + layer.weight.grad
        torch.testing.assert_close(optimizer.state[layer.weight]["memory"], expected)


@pytest.mark.parametrize("tokens", [4, 40], ids=["rows", "gram"])
def test_constant_inputs_settle_at_the_preconditioned_gradient(tokens):
    """M* = G (Σ + μ I)⁻¹ / inner_lr, μ = (1 − momentum) / inner_lr."""
    layer, x, beta, rate = linear(), draw(tokens, 6), 0.9, 0.7
    options = dict(momentum=beta, inner_lr=rate, lr=0.0, **PLAIN)
    optimizer = InputDeltaMomentum([layer.weight], inputs=capture_inputs(layer, every=1), **options)
    train(layer, optimizer, [x] * 400)
    keys = x / x.norm(dim=1, keepdim=True)
    sigma, mu = keys.mT @ keys / tokens, (1 - beta) / rate
    expected = layer.weight.grad @ torch.linalg.inv(sigma + mu * torch.eye(6, dtype=torch.float64)) / rate
    torch.testing.assert_close(optimizer.state[layer.weight]["memory"], expected)


def test_of_one_token_it_is_delta_momentum_without_hooks():
    """G = δ xᵀ: the gradient's Gram at trace 1 is the input's."""
    ours, theirs = linear(), linear()
    options = dict(lr=0.1, inner_lr=0.8)
    batches = [draw(1, 6, seed=seed) for seed in range(5)]
    moved = train(ours, InputDeltaMomentum([ours.weight], inputs=capture_inputs(ours, every=1), **options), batches)
    literal = dict(side="right", gram_norm="trace", feature_map="identity")
    torch.testing.assert_close(moved, train(theirs, DeltaMomentum([theirs.weight], **options, **literal), batches))


@pytest.mark.parametrize("output", ["identity", "newton_schulz"])
def test_without_inputs_it_is_delta_momentum_on_the_right(output):
    options = dict(lr=0.1, inner_lr=0.8, output=output)
    ours = trained(InputDeltaMomentum, SHAPES, missing="gradient", **options)
    literal = dict(side="right", gram_norm="trace", feature_map="identity")
    torch.testing.assert_close(ours, trained(DeltaMomentum, SHAPES, **options, **literal))


def test_some_parameters_may_be_captured_and_others_not():
    """Four of one shape: few tokens, as many as features, many, and no layer; each as it would be alone."""
    torch.manual_seed(0)
    layers = nn.ModuleList([linear(5, 5) for _ in range(3)])
    free = nn.Parameter(draw(5, 5))
    alone, lonely = deepcopy(layers), nn.Parameter(free.detach().clone())

    def run(layers, free, optimizers, captures):
        for seed in range(3):
            for each in optimizers:
                each.zero_grad()
            inputs = [draw(rows, 5, seed=10 * seed + rows) for rows in (2, 5, 40)]
            loss = sum((layer(x) @ free).square().mean() for layer, x in zip(layers, inputs, strict=True))
            loss.backward()
            for each in optimizers:
                each.step()
        return snapshot([*layers.parameters(), free])

    make = dict(missing="gradient", lr=0.1, inner_lr=1.0)
    together = InputDeltaMomentum([*layers.parameters(), free], inputs=capture_inputs(layers, every=1), **make)
    apart = [InputDeltaMomentum([layer.weight], inputs=capture_inputs(layer, every=1), **make) for layer in alone]
    apart.append(InputDeltaMomentum([lonely], **make))
    torch.testing.assert_close(run(layers, free, [together], None), run(alone, lonely, apart, None))


def test_convolutions_and_their_groups_are_erased_by_their_own_patches():
    """A grouped convolution is two convolutions side by side."""
    torch.manual_seed(0)
    whole = nn.Conv1d(4, 6, 2, groups=2, bias=False, dtype=torch.float64)
    halves = [nn.Conv1d(2, 3, 2, bias=False, dtype=torch.float64) for _ in range(2)]
    for half, weight in zip(halves, whole.weight.detach().chunk(2), strict=True):
        half.weight.data.copy_(weight)
    options = dict(lr=0.1, inner_lr=1.0, **PLAIN)
    batches = [draw(3, 4, 5, seed=seed) for seed in range(4)]
    (moved,) = train(
        whole, InputDeltaMomentum(whole.parameters(), inputs=capture_inputs(whole, every=1), **options), batches,
        lambda y: y.square().sum(),
    )  # fmt: skip
    for index, half in enumerate(halves):
        optimizer = InputDeltaMomentum(half.parameters(), inputs=capture_inputs(half, every=1), **options)
        parts = [batch.chunk(2, 1)[index] for batch in batches]
        (part,) = train(half, optimizer, parts, lambda y: y.square().sum())
        torch.testing.assert_close(moved.chunk(2)[index], part)


def test_blocks_of_a_fused_projection_share_the_inputs():
    fused, parts = linear(6, 8), [linear(6, 4) for _ in range(2)]
    for part, weight in zip(parts, fused.weight.detach().chunk(2), strict=True):
        part.weight.data.copy_(weight)
    groups = [{"params": [fused.weight], "split": 2}]
    batches = [draw(20, 6, seed=seed) for seed in range(3)]
    options = dict(lr=0.1, inner_lr=1.0)
    (moved,) = train(
        fused, InputDeltaMomentum(groups, inputs=capture_inputs(fused), **options), batches, lambda y: y.square().sum()
    )
    for part, expected in zip(parts, moved.chunk(2), strict=True):
        optimizer = InputDeltaMomentum([part.weight], inputs=capture_inputs(part), **options)
        torch.testing.assert_close(train(part, optimizer, batches, lambda y: y.square().sum()), [expected])


def test_gradient_accumulation_is_the_batch_and_each_step_starts_anew():
    ours, theirs = linear(), linear()
    options = dict(lr=0.1, inner_lr=1.0)
    accumulating = InputDeltaMomentum([ours.weight], inputs=capture_inputs(ours, every=1), **options)
    at_once = InputDeltaMomentum([theirs.weight], inputs=capture_inputs(theirs, every=1), **options)
    for seed in range(3):
        batch = draw(12, 6, seed=seed)
        for part in batch.split([3, 9]):
            ours(part).square().sum().backward()
        theirs(batch).square().sum().backward()
        for optimizer in (accumulating, at_once):
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(ours.weight, theirs.weight)
    assert ours.weight not in accumulating.inputs


def test_a_matrix_without_inputs_is_refused_by_name_before_anything_is_written():
    model = make_model()
    params = [*model.named_parameters(), ("free", nn.Parameter(torch.ones(2, 3)))]
    optimizer = InputDeltaMomentum(params, inputs=capture_inputs(model))
    model_loss(model, 0).backward()
    params[-1][1].grad = torch.ones(2, 3)
    before = snapshot(param for _, param in params)
    with pytest.raises(RuntimeError, match="no inputs of these parameters' layers: free; pass inputs=capture_inputs"):
        optimizer.step()
    assert all(map(torch.equal, before, (param for _, param in params))) and not optimizer.state
    params[-1][1].grad = None
    optimizer.step()  # what was captured is still there
    assert set(optimizer.state) == {param for _, param in params[:-1]}


def test_a_forgotten_capture_is_refused_by_size():
    (param,) = (nn.Parameter(torch.ones(2, 3)),)
    optimizer = InputDeltaMomentum([param, bias := nn.Parameter(torch.ones(3))])
    bias.grad = torch.ones(3)
    optimizer.step()  # a vector has no inputs
    param.grad = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match=r"of size \(2, 3\)"):
        optimizer.step()
    with pytest.raises(TypeError, match="inputs must be what capture_inputs"):
        InputDeltaMomentum([param], inputs=nn.Linear(2, 2))


def test_a_checkpointer_may_have_state_made_without_inputs():
    """By zero gradients at lr = 0, as torch.distributed.checkpoint does to an optimizer that has not stepped yet."""
    model = nn.Sequential(linear(), linear(4, 3))
    optimizer = InputDeltaMomentum(model.parameters(), inputs=capture_inputs(model))
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert set(state) == {"0.weight", "1.weight"}
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    with pytest.raises(RuntimeError, match="no inputs"):  # at any other rate, a gradient of zeros is one
        optimizer.step()


@pytest.mark.parametrize("cls", [InputDeltaMomentum, DGD])
def test_fully_sharded_models_step_by_their_inputs(cls, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain, sharded = (nn.Sequential(linear(), nn.Tanh(), linear(4, 3)) for _ in range(2))
        fully_shard(sharded)
        moved = [
            train(model, cls(model.parameters(), lr=0.1, inputs=capture_inputs(model)), [draw(40, 6)] * 2)
            for model in (plain, sharded)
        ]
        torch.testing.assert_close([each.full_tensor() for each in moved[1]], moved[0])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("output", ["identity", "newton_schulz"])
def test_what_is_no_matrix_or_has_no_elements_needs_no_inputs(output):
    model = nn.Linear(6, 4, dtype=torch.float64)
    empty = nn.Parameter(torch.ones(0, 3))
    optimizer = InputDeltaMomentum([*model.parameters(), empty], inputs=capture_inputs(model), output=output)
    before, empty.grad = snapshot(model.parameters()), torch.ones(0, 3)
    model(draw(9, 6)).square().mean().backward()
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))


def test_ranks_are_asked_once_a_step(monkeypatch):
    model = nn.Sequential(linear(), linear(4, 3))
    capture, calls = capture_inputs(model), []
    collect = capture.collect
    monkeypatch.setattr(capture, "collect", lambda: (calls.append(1), collect()))
    optimizer = InputDeltaMomentum([{"params": layer.parameters()} for layer in model], inputs=capture)
    train(model, optimizer, [draw(9, 6)] * 3)
    assert len(calls) == 3


def test_inputs_may_be_of_a_lower_precision_than_the_weights():
    class Casting(nn.Linear):
        def forward(self, x):
            return super().forward(x.to(self.weight.dtype))

    torch.manual_seed(0)
    model = Casting(6, 4, bias=False, dtype=torch.float64)
    optimizer = InputDeltaMomentum(model.parameters(), inputs=capture_inputs(model), inner_lr=1.0)
    train(model, optimizer, [draw(9, 6).float()] * 2)
    assert optimizer.state[model.weight]["memory"].dtype == torch.float64


def test_embeddings_and_heads_that_go_to_adamw_need_no_inputs():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 7))
    groups = param_groups(model)
    optimizer = InputDeltaMomentum(groups, inputs=capture_inputs(model, groups))
    before = snapshot(model.parameters())
    model(torch.arange(7)).square().mean().backward()
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))


def test_a_copy_has_no_inputs_until_it_is_given_some():
    model, x = linear(), draw(9, 6)
    optimizer = InputDeltaMomentum([model.weight], inputs=capture_inputs(model))
    train(model, optimizer, [x])
    other, twin = deepcopy((optimizer, model))
    with pytest.raises(RuntimeError, match="no inputs"):
        train(twin, other, [x])
    other.inputs = capture_inputs(twin)
    torch.testing.assert_close(train(twin, other, [x, x]), train(model, optimizer, [x, x]))


def test_inputs_are_no_part_of_a_checkpoint(tmp_path):
    model = linear()
    optimizer = InputDeltaMomentum([model.weight], inputs=capture_inputs(model))
    train(model, optimizer, [draw(9, 6)])
    torch.save(optimizer.state_dict(), tmp_path / "file")
    assert set(torch.load(tmp_path / "file", weights_only=True)["state"][0]) == {"memory"}
    assert "inputs" not in optimizer.param_groups[0] and "inputs" not in optimizer.defaults


def test_two_optimizers_use_up_their_own_inputs():
    model = nn.Sequential(linear(), nn.Tanh(), linear(4, 3))
    capture = capture_inputs(model)
    first, second = (InputDeltaMomentum([model[i].weight], inputs=capture) for i in (0, 2))
    model(draw(8, 6)).square().mean().backward()
    first.step()
    assert model[0].weight not in capture and model[2].weight in capture
    second.step()
    assert model[2].weight not in capture


def test_what_saw_no_gradient_keeps_no_inputs():
    model = nn.Sequential(linear(), linear(4, 3))
    capture = capture_inputs(model)
    optimizer = InputDeltaMomentum(model.parameters(), inputs=capture)
    model(draw(8, 6)).square().mean().backward()
    model[0].weight.grad = None
    optimizer.step()
    assert model[0].weight not in capture


def test_a_compiled_step_follows_the_inputs_and_is_not_compiled_for_each():
    """The number of tokens, and whether rows or a Gram are kept, is a fact about one step."""
    model, twin = (nn.Sequential(linear(), nn.Tanh(), linear(4, 3)) for _ in range(2))
    optimizer, eager = (
        InputDeltaMomentum(each.parameters(), lr=0.1, inner_lr=1.0, inputs=capture_inputs(each, every=1))
        for each in (model, twin)
    )
    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(lambda: optimizer.step(), backend=counter)
    graphs = []
    for seed, tokens in enumerate((30, 3, 5, 4, 1, 2, 30, 6)):
        for each in (model, twin):
            each.zero_grad()
            each(draw(tokens, 6, seed=seed)).square().mean().backward()
        step()
        eager.step()
        torch.testing.assert_close(snapshot(model.parameters()), snapshot(twin.parameters()))
        graphs.append(counter.frame_count)
    assert graphs[1:] == graphs[:1] * 7
    torch._dynamo.reset()


@pytest.mark.parametrize("cls, rate", [(InputDeltaMomentum, "inner_lr"), (DGD, "rho")])
def test_a_rate_of_zero_costs_nothing(cls, rate):
    model = linear()
    flops = []
    for value in (0.0, 0.5):
        optimizer = cls(model.parameters(), output="identity", inputs=capture_inputs(model), **{rate: value})
        model(draw(99, 6)).square().mean().backward()
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        flops.append(counter.get_total_flops())
    assert flops == [0, 2 * 4 * 6 * 6]


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_refuses_an_inner_lr_at_which_the_memory_would_grow(momentum):
    """Σ has trace 1: along one direction the memory is multiplied by momentum − inner_lr, which must stay above −1."""
    params = copy_params([draw(2, 2)])
    InputDeltaMomentum(params, momentum=momentum, inner_lr=0.999 + momentum)
    with pytest.raises(ValueError, match="Invalid inner_lr value"):
        InputDeltaMomentum(params, momentum=momentum, inner_lr=1 + momentum)


@pytest.mark.parametrize("inner_lr", [0.5, 1.89])
def test_is_stable_on_inputs_made_to_break_it(inner_lr):
    """One direction, the worst: all of the trace in one eigenvalue, and gradients that change sign with it."""
    layer = linear()
    optimizer = InputDeltaMomentum([layer.weight], momentum=0.9, inner_lr=inner_lr, inputs=capture_inputs(layer))
    x = draw(1, 6).repeat(40, 1)
    for step in range(300):
        layer(x)
        layer.weight.grad = (-1.0) ** step * torch.ones(4, 6, dtype=torch.float64)
        optimizer.step()
    assert optimizer.state[layer.weight]["memory"].norm() < 24**0.5 / 0.01


def test_bfloat16_parameters_have_float32_keys():
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False, dtype=torch.bfloat16)
    optimizer = InputDeltaMomentum(model.parameters(), lr=0.25, inputs=capture_inputs(model))
    before = snapshot(model.parameters())
    set_grads([model.weight], 0)
    model(draw(9, 6).bfloat16())
    optimizer.step()
    assert optimizer.state[model.weight]["memory"].dtype == torch.float32
    assert model.weight.dtype == torch.bfloat16 and not torch.equal(model.weight, before[0])
