"""The continuum memory against its equations, token by token and by autograd; and who is stepped, when, on what."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deep_optim import Momentum, MultiFrequency, param_groups
from deep_optim.models import ContinuumMemory, HopeAttention, frequency_groups

DIM = 6
CLOSE = dict(rtol=0, atol=1e-10)


def make(chunk_sizes=(4, 2), **options) -> ContinuumMemory:
    """Return a memory in float64 that writes loudly enough for every term of its rule to matter."""
    torch.manual_seed(0)
    memory = ContinuumMemory(DIM, chunk_sizes, **{"hidden_dim": 5, "inner_lr": 3.0, **options}).double()
    with torch.no_grad():
        for level in memory.levels:
            if level.inner_lr:
                level.target.weight.normal_()
                level.gate.weight.normal_()
        for norm in memory.norms:
            norm.weight.uniform_(0.5, 2)
        if memory.arrangement == "independent":
            memory.mix.uniform_(0.5, 2)
    return memory


def make_inputs(batch=2, length=19, dim=DIM):
    return torch.randn(batch, length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def answer(weights, x):
    return F.linear(F.silu(F.linear(x, weights["gate"])) * F.linear(x, weights["up"]), weights["down"])


def by_the_equations(memory: ContinuumMemory, sample: torch.Tensor) -> torch.Tensor:
    """Return what the memory should answer one sample [T, D], with nothing but the equations and autograd."""
    levels = list(memory.levels)
    initial = [
        {name: getattr(level.block, name).weight.detach() for name in ("gate", "up", "down")} for level in levels
    ]
    weights, chunks, previous = (
        copy.deepcopy(initial),
        [[] for _ in levels],
        [torch.zeros(DIM).double() for _ in levels],
    )
    answers, independent = [], memory.arrangement == "independent"
    for count, token in enumerate(sample, start=1):
        y = token
        for index, level in enumerate(levels):
            x = F.rms_norm(token if independent else y, (DIM,), memory.norms[index].weight, 1e-6)
            scale = memory.mix[index] if independent else 1
            y = y + scale * answer(weights[index], x)
            chunks[index].append((previous[index], x))
            previous[index] = x
            if len(chunks[index]) < memory.chunk_sizes[index]:
                continue
            at = {name: weight.requires_grad_() for name, weight in weights[index].items()}
            loss = torch.zeros((), dtype=torch.float64)
            for key, new in chunks[index]:
                value = answer(initial[index], key) + level.target.weight @ new
                rate = level.inner_lr * 2 * torch.sigmoid(level.gate.weight[0] @ new)
                loss = loss + rate / (2 * len(chunks[index]) * DIM) * (answer(at, key) - value).square().sum()
            for name, gradient in zip(at, torch.autograd.grad(loss, list(at.values())), strict=True):
                start = initial[index][name]
                step = gradient / (1 + (gradient.norm() / (memory.levels[0].max_step * start.norm())) ** 2).sqrt()
                weights[index][name] = (start + level.retention * (at[name] - start) - step).detach()
            chunks[index] = []
        if memory.arrangement == "nested":
            for index, size in enumerate(memory.chunk_sizes):
                slower = min((other for other in memory.chunk_sizes if other > size), default=None)
                if slower and count % slower == 0:
                    weights[index] = copy.deepcopy(initial[index])
        answers.append(y)
    return torch.stack(answers).detach()


@pytest.mark.parametrize("arrangement", ["sequential", "independent", "nested"])
@pytest.mark.parametrize("chunk_sizes", [(4, 2), (1, 2, 6), (3,)], ids=str)
def test_equals_a_loop_over_tokens_written_from_the_equations(arrangement, chunk_sizes):
    memory, x = make(chunk_sizes, arrangement=arrangement, retention=0.8, max_step=0.3), make_inputs()
    expected = torch.stack([by_the_equations(memory, sample) for sample in x])
    torch.testing.assert_close(memory(x)[0], expected, **CLOSE)
    state, pieces = None, []
    for piece in x.split([5, 1, 0, 7, 6], 1):
        y, state = memory(piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, **CLOSE)
    assert (expected - memory(x, write=False)[0]).abs().max() > 0.1  # what was written counts


@pytest.mark.parametrize("chunk_sizes", [(2, 4, 8, 16), (16, 8, 4, 2)], ids=str)
@pytest.mark.parametrize("pieces", [(32,), (1,) * 32, (5, 11, 0, 3, 13)], ids=["whole", "tokens", "odd"])
def test_each_of_four_levels_learns_from_every_token_once_and_in_order(chunk_sizes, pieces, monkeypatch):
    memory = make(chunk_sizes)
    seen = [[] for _ in chunk_sizes]  # what each level was asked to answer, and what came to it
    asked = [[] for _ in chunk_sizes]
    for index, level in enumerate(memory.levels):

        def gradients(weights, key, value, rate, index=index, level=level, original=level.block.gradients):
            asked[index].append(key[:, :-1])
            assert key.shape[1] == level.chunk_size + 1 and not rate[:, -1].any()  # the last is only read
            return original(weights, key, value, rate)

        monkeypatch.setattr(level.block, "gradients", gradients)
        level.register_forward_pre_hook(lambda _, args, index=index: seen[index].append(args[0]))
    state = None
    for piece in make_inputs(length=32).split(pieces, 1):
        _, state = memory(piece, state)
    for index in range(4):
        tokens = torch.cat(seen[index], 1)
        keys = torch.cat(asked[index], 1)
        torch.testing.assert_close(keys, F.pad(tokens[:, :-1], (0, 0, 1, 0)), rtol=0, atol=0)
        assert len(asked[index]) == 32 // chunk_sizes[index]


def test_a_level_learns_what_follows_what():
    """Three tokens in a circle: the level's error on its own objective falls to a fraction of what it was."""
    level = make((3,), hidden_dim=32, retention=1.0, inner_lr=1.0).levels[0]
    nn.init.zeros_(level.gate.weight)
    circle = F.rms_norm(make_inputs(1, 3), (DIM,)).repeat(1, 200, 1)

    def error(x, state):
        key, new = x[:, :-1], x[:, 1:]
        value = level.block(key) + level.target(new)
        return (level(key, state, write=False)[0] - value).norm().item()

    _, state = level(circle)
    assert error(circle[:, :4], state) < 0.2 * error(circle[:, :4], None)


@pytest.mark.parametrize("inner_lr, recalls", [(1.0, True), (0.0, False)])
def test_levels_recall_what_they_have_read_without_any_help(inner_lr, recalls):
    """No attention, no recurrence: what follows what in a sequence is in the weights of the level alone."""
    torch.manual_seed(0)
    embedding, level, head = nn.Embedding(16, 32), ContinuumMemory(32, (4,), inner_lr=inner_lr), nn.Linear(32, 16)
    model = nn.ModuleList([embedding, level, head])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        tokens = torch.stack([torch.randperm(16)[:12] for _ in range(16)]).repeat(1, 2)
        logits = head(level(embedding(tokens[:, :-1]))[0])
        losses = F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none").mean(0)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    assert losses[:11].mean() > 2.5  # nobody can know: of 16 tokens each comes once
    assert (losses[12:].mean() < 1.0) == recalls


def test_stays_near_its_initial_weights_whatever_it_reads():
    memory = make((2,), retention=0.9, max_step=0.2)
    nn.init.constant_(memory.levels[0].target.weight, 1e6)
    _, state = memory(make_inputs(length=400))
    for name, written in state["0"]["written"].items():
        bound = 0.2 / (1 - 0.9) * memory.levels[0].block.weights()[name].norm()
        assert (0.1 * bound < written.flatten(1).norm(dim=1)).all() and (written.flatten(1).norm(dim=1) < bound).all()


def test_weights_that_are_zero_stay_finite_and_have_gradients():
    memory = make((2,))
    nn.init.zeros_(memory.levels[0].block.down.weight)
    y, _ = memory(make_inputs())
    y.sum().backward()
    assert all(param.grad.isfinite().all() for param in memory.parameters())


def test_what_was_written_fades_by_the_retention():
    memory = make((2,), retention=0.7)
    x = make_inputs(length=2)
    _, state = memory(x)
    nn.init.constant_(memory.levels[0].gate.weight, 0)
    memory.levels[0].inner_lr = 1e-12  # writes nothing more
    _, later = memory(x, state)
    for name, written in state["0"]["written"].items():
        torch.testing.assert_close(later["0"]["written"][name], 0.7 * written)


def test_between_two_updates_what_was_written_is_not_even_copied():
    memory, x = make((8,)).float(), make_inputs(length=100).float()
    _, state = memory(x)
    _, later = memory(x[:, :2], state)
    assert all(later["0"]["written"][name] is written for name, written in state["0"]["written"].items())


def test_a_rate_of_zero_is_a_plain_mlp_without_a_state():
    memory, x = make((4, 2), inner_lr=0.0), make_inputs()
    y, state = memory(x)
    expected = x
    for norm, level in zip(memory.norms, memory.levels, strict=True):
        expected = expected + answer(level.block.weights(), norm(expected))
    torch.testing.assert_close(y, expected)
    assert state == {"0": {}, "1": {}}
    torch.testing.assert_close(memory(x, state)[0], y)
    with pytest.raises(ValueError, match="of another layer"):
        memory(x, make((4, 2))(x)[1])


def test_keeps_float32_under_autocast():
    memory, x = make((4, 2)).float(), make_inputs().float()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = memory(x)
    torch.testing.assert_close(y, memory(x)[0], rtol=2e-2, atol=2e-2)
    assert state["0"]["written"]["up"].dtype == torch.float32


@pytest.mark.parametrize("chunk_sizes", [(1,), (64, 16), (8, 4, 2, 1)], ids=str)
def test_is_as_large_as_a_feed_forward_layer_by_default(chunk_sizes):
    for inner_lr in (0.0, 1.0):
        memory = ContinuumMemory(96, chunk_sizes, inner_lr=inner_lr)
        assert sum(param.numel() for param in memory.parameters()) == pytest.approx(8 * 96**2, rel=0.03)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chunk_sizes": ()}, "chunk_sizes"),
        ({"chunk_sizes": 16}, "chunk_sizes"),
        ({"chunk_sizes": (0,)}, "Invalid chunk_sizes: 0"),
        ({"chunk_sizes": (2.0,)}, "Invalid chunk_sizes: 2.0"),
        ({"chunk_sizes": (True,)}, "Invalid chunk_sizes: True"),
        ({"chunk_sizes": (6, 4)}, "4 does not divide 6"),
        ({"chunk_sizes": (4, 2), "inner_lr": (1.0,)}, "1 inner learning rates for 2 levels"),
        ({"inner_lr": -1.0}, "Invalid inner_lr"),
        ({"inner_lr": float("nan")}, "Invalid inner_lr"),
        ({"inner_lr": float("inf")}, "Invalid inner_lr"),
        ({"retention": 1.1}, "Invalid retention"),
        ({"retention": -0.1}, "Invalid retention"),
        ({"max_step": 0.0}, "Invalid max_step"),
        ({"max_step": float("nan")}, "Invalid max_step"),
        ({"arrangement": "tree"}, "Invalid arrangement"),
        ({"arrangement": "nested", "chunk_sizes": (4, 4)}, "different chunk sizes"),
        ({"arrangement": "nested", "inner_lr": (1.0, 0.0)}, "inner_lr above 0"),
        ({"hidden_dim": 0}, "Invalid hidden_dim"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        ContinuumMemory(DIM, **options)


@pytest.mark.parametrize("inner_lr", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(3, DIM), (2, 3, DIM + 1), (2, 2, 3, DIM)])
def test_inputs_of_another_shape_are_refused_in_words(shape, inner_lr):
    with pytest.raises(ValueError, match=r"expected x of shape \[B, T, 6\], got"):
        make(inner_lr=inner_lr)(torch.zeros(shape).double())


def test_a_state_with_more_tokens_than_a_chunk_is_refused():
    memory, x = make((4, 2)), make_inputs()
    _, state = memory(x)
    _, other = make((8, 4))(x[:, :7])
    assert other["0"]["inputs"].shape[1] == 8
    with pytest.raises(ValueError, match="of another layer"):
        memory(x, {"0": other["0"], "1": state["1"]})


def test_every_level_has_its_period_and_its_group():
    model = HopeAttention(11, 16, 2, chunk_sizes=(4, 2), inner_lr=0.0)
    groups = frequency_groups(model)
    assert [group["period"] for group in groups] == [1, 2, 4]
    grouped = [param for group in groups for param in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    levels = [block.memory.levels for block in model.blocks]
    assert set(groups[2]["params"]) == {param for each in levels for param in each[0].parameters()}
    assert set(groups[1]["params"]) == {param for each in levels for param in each[1].parameters()}
    options = {"lr": 0.5, "weight_decay": 0.25, "rule": "memory"}
    for group in frequency_groups(model, [{"params": list(model.parameters()), **options}]):
        assert {name: group[name] for name in options} == options


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, Momentum])
def test_levels_are_stepped_from_outside_at_their_own_periods(optimizer):
    torch.manual_seed(0)
    model = HopeAttention(11, 16, 1, chunk_sizes=(4, 2), inner_lr=0.0)
    groups = param_groups(model) if optimizer is Momentum else None
    optimizer = MultiFrequency(optimizer(frequency_groups(model, groups), lr=0.1))
    slow, fast = (level.block.up.weight for level in model.blocks[0].memory.levels)
    moved = {"slow": [], "fast": [], "rest": []}
    tokens = torch.randint(11, (2, 9))
    for step in range(1, 9):
        before = [param.detach().clone() for param in (slow, fast, model.blocks[0].mixer.query.weight)]
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        after = (slow, fast, model.blocks[0].mixer.query.weight)
        for name, old, new in zip(moved, before, after, strict=True):
            if not torch.equal(old, new):
                moved[name].append(step)
    assert moved == {"slow": [4, 8], "fast": [2, 4, 6, 8], "rest": list(range(1, 9))}


@pytest.mark.parametrize("arrangement", ["sequential", "independent", "nested"])
def test_gradients_through_its_own_writes_are_those_of_finite_differences(arrangement):
    """Of tokens and of every weight, over two chunks of the slow level and a rest that is not full."""
    torch.manual_seed(0)
    memory = ContinuumMemory(2, (2, 4), hidden_dim=2, arrangement=arrangement, inner_lr=0.5, max_step=0.5).double()
    names, weights = zip(*memory.named_parameters(), strict=True)
    inputs = [torch.randn(1, 9, 2), *(weight.detach() + 0.3 * torch.randn_like(weight) for weight in weights)]
    inputs = [each.double().requires_grad_() for each in inputs]

    def read(x, *weights):
        return torch.func.functional_call(memory, dict(zip(names, weights, strict=True)), (x,))[0]

    silent = read(inputs[0], *(0 * w if "target" in name else w for name, w in zip(names, inputs[1:], strict=True)))
    assert not torch.allclose(read(*inputs), silent)  # what is learned shows
    assert torch.autograd.gradcheck(read, inputs)
