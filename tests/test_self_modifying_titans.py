"""Self-modifying Titans against a token loop written apart, and what a recurrent layer owes those who use it."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deep_optim.models import SelfModifyingTitans
from titans_token_loop import token_loop

DIM, HEADS = 12, 3
EVERY = ("key", "value", "query", "lr", "retention")
OPTIONS = {
    "linear": {},
    "every projection": {"adapt": EVERY},
    "no projection": {"adapt": ()},
    "two projections": {"adapt": ("lr", "key")},
    "momentum": {"momentum": 0.6, "adapt": EVERY},
    "mlp": {"memory": "mlp"},
    "mlp, chunks that do not divide": {"memory": "mlp", "chunk_size": 5, "adapt": EVERY},
    "mlp, chunks longer than the projections'": {"memory": "mlp", "chunk_size": 11},
    "mlp, no projection, momentum": {"memory": "mlp", "adapt": (), "momentum": 0.6},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(options, *, dtype=torch.float64, far=0.4, seed=0, **sizes):
    """A layer of small chunks whose parameters are far from a fresh one's, so that every memory matters."""
    torch.manual_seed(seed)
    sizes = {"chunk_size": 4, "projection_chunk_size": 8, **sizes}
    layer = SelfModifyingTitans(DIM, HEADS, **{**sizes, **options}).to(dtype)
    with torch.no_grad():
        for param in layer.parameters():
            param.add_(far * torch.randn_like(param))
    return layer


def tokens(batch=2, length=21, dtype=torch.float64):
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def leaves(state):
    """The tensors of a nested dict, by path."""
    for name, value in sorted(state.items()):
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in leaves(value))
        else:
            yield name, value


def assert_states_equal(state, expected, atol=1e-10):
    for (name, tensor), (expected_name, expected_tensor) in zip(leaves(state), leaves(expected), strict=True):
        assert name == expected_name
        torch.testing.assert_close(tensor, expected_tensor, rtol=0, atol=atol)


@each_option
@torch.no_grad()
def test_chunks_are_the_token_loop(options):
    layer = make(options)
    torch.testing.assert_close(layer(tokens())[0], token_loop(layer, tokens()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 100])
@torch.no_grad()
def test_the_chunk_of_a_linear_memory_is_a_matter_of_cost(chunk_size):
    whole = make({}, chunk_size=4)(tokens())
    other = make({}, chunk_size=chunk_size)(tokens())
    torch.testing.assert_close(other[0], whole[0], rtol=0, atol=1e-10)
    assert_states_equal(other[1], whole[1])


# A sequence may be cut anywhere.


@each_option
@torch.no_grad()
def test_one_token_at_a_time_is_the_whole(options):
    layer, x = make(options), tokens()
    y, end = layer(x)
    state, parts = None, []
    for t in range(x.shape[1]):
        part, state = layer(x[:, t : t + 1], state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y, rtol=0, atol=1e-10)
    assert_states_equal(state, end)


@settings(max_examples=15)
@given(options=st.sampled_from(list(OPTIONS)), lengths=st.lists(st.integers(0, 13), max_size=6))
@torch.no_grad()
def test_any_cut_is_the_whole(options, lengths):
    layer, x = make(OPTIONS[options]), tokens(1, sum(lengths))
    y, end = layer(x)
    state, parts = layer.initial_state(1), [x[:, :0]]
    for piece in x.split(lengths, 1) if lengths else ():
        part, state = layer(piece, state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y, rtol=0, atol=1e-10)
    assert_states_equal(state, end)


@each_option
def test_a_state_survives_a_file(options):
    layer, x = make(options), tokens()
    y, _ = layer(x)
    _, state = layer(x[:, :10])
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    torch.testing.assert_close(layer(x[:, 10:], torch.load(file, weights_only=True))[0], y[:, 10:])


@each_option
def test_a_state_is_neither_changed_nor_kept(options):
    layer, x = make(options), tokens()
    _, state = layer(x[:, :10])
    before = copy.deepcopy({name: tensor.detach() for name, tensor in leaves(state)})
    first, second = layer(x[:, 10:], state)[0], layer(x[:, 10:], state)[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in leaves(state))
    assert torch.equal(first, second)
    assert not list(layer.buffers())


@each_option
@torch.no_grad()
def test_no_token_leaves_the_state_as_it_is(options):
    layer = make(options)
    _, state = layer(tokens())
    y, after = layer(tokens(2, 0), state)
    assert y.shape == (2, 0, DIM)
    assert_states_equal(after, state, atol=0)


# Nobody sees what is not theirs.


@each_option
def test_no_token_sees_the_future_and_no_sample_another(options):
    layer, x = make(options), tokens().requires_grad_()
    y, _ = layer(x)
    for t in (0, 6, 7, 8, 15):
        (grad,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
        assert (grad[0, t + 1 :] == 0).all()
        assert (grad[1] == 0).all()
        assert (grad[0, : t + 1] != 0).any(-1).all()


@each_option
@torch.no_grad()
def test_rows_of_a_batch_may_be_taken_apart(options):
    layer, x = make(options), tokens(3)
    y, state = layer(x)
    for b in range(3):
        alone, single = layer(x[b : b + 1])
        torch.testing.assert_close(alone, y[b : b + 1], rtol=0, atol=1e-10)
        for (_, tensor), (_, one) in zip(leaves(state), leaves(single), strict=True):
            torch.testing.assert_close(tensor[b : b + 1] if tensor.ndim else tensor, one, rtol=0, atol=1e-10)


@each_option
@torch.no_grad()
def test_training_is_evaluation(options):
    layer = make(options)
    assert torch.equal(layer.train()(tokens())[0], layer.eval()(tokens())[0])


# write=False reads.


@each_option
@torch.no_grad()
def test_reading_leaves_the_memories(options):
    layer, x = make(options), tokens()
    _, state = layer(x[:, :10])
    y, after = layer(x[:, 10:], state, write=False)
    assert_states_equal({**after, "tail": state["tail"]}, state, atol=0)
    parts = []
    for t in range(10, x.shape[1]):  # the convolution moves on, so that a query of several tokens may be cut
        part, state = layer(x[:, t : t + 1], state, write=False)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), y, rtol=0, atol=1e-10)


@each_option
@pytest.mark.parametrize("length", [6, 8])
@torch.no_grad()
def test_a_reading_answers_what_a_write_of_strength_zero_would(options, length):
    """And without a decay; the first token after a chunk's end sees what the chunk has written."""
    layer, x = (
        make({**options, "adapt": [name for name in options.get("adapt", EVERY) if name not in ("lr", "retention")]}),
        tokens(),
    )
    _, state = layer(x[:, :length])
    read, _ = layer(x[:, length : length + 1], state, write=False)
    if not layer.momentum:
        layer.rates.weight.zero_()
        layer.rates.bias.copy_(torch.tensor([-1e9] * HEADS + [1e9] * HEADS))
        torch.testing.assert_close(read, layer(x[:, length : length + 1], state)[0])


# Gradients.


@each_option
def test_gradients_reach_every_parameter_of_a_fresh_layer(options):
    """After two chunks, those of the initial memories and of the gains included."""
    layer = make(options, far=0.0)
    y, _ = layer(tokens())
    y.square().sum().backward()
    assert [name for name, param in layer.named_parameters() if param.grad is None or not param.grad.any()] == []


@each_option
def test_gradients_are_those_of_the_function(options):
    """Through writes, chunks of both kinds, and a state that is handed on."""
    layer = make({**options}, chunk_size=2, projection_chunk_size=3)
    x = tokens(1, 7).requires_grad_()

    def function(x, *params):
        first, state = torch.func.functional_call(layer, dict(zip(names, params, strict=True)), (x[:, :4],))
        second, state = torch.func.functional_call(layer, dict(zip(names, params, strict=True)), (x[:, 4:], state))
        return torch.cat([first, second], 1)

    names, params = zip(*layer.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(function, (x, *params), fast_mode=True)


@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_it_trains_and_reloads(memory):
    layer, x = make({"memory": memory}, far=0.0, dtype=torch.float32), tokens(dtype=torch.float32)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = (layer(x)[0] - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    other = make({"memory": memory}, dtype=torch.float32, seed=1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x)[0], layer(x)[0])


# What is kept, and for how long.


@torch.no_grad()
def test_a_fresh_layer_keeps_what_it_was_told():
    """Without further writes the change of every head halves within 89 to 710 tokens, and no faster."""
    layer = SelfModifyingTitans(DIM, HEADS).double()
    _, state = layer(tokens())
    layer.rates.bias[:HEADS] = -1e9
    _, later = layer(tokens(2, 1000), state)
    kept = later["stack"]["change"].norm(dim=(2, 3)) / state["stack"]["change"].norm(dim=(2, 3))
    expected = (1 - 2 ** torch.linspace(-7, -10, HEADS, dtype=torch.float64)) ** 1000
    torch.testing.assert_close(kept.log(), expected.log().expand(2, HEADS), rtol=0.05, atol=0)


@pytest.mark.parametrize("memory", ["linear", "mlp"])
@torch.no_grad()
def test_a_thousand_tokens_neither_empty_nor_fill_the_memory(memory):
    torch.manual_seed(0)
    layer = SelfModifyingTitans(32, 4, memory=memory)
    _, early = layer(torch.randn(2, 100, 32))
    _, late = layer(torch.randn(2, 1000, 32), early)
    name = "stack" if memory == "linear" else "w1"
    ratio = late[name]["change"].norm() / early[name]["change"].norm()
    assert 0.5 < ratio < 3


@pytest.mark.parametrize(
    "options, common",
    [({}, 0.0), ({}, 0.7), ({"memory": "mlp"}, 0.7), ({"momentum": 0.9}, 0.7)],
    ids=["linear, no two alike", "linear", "mlp", "momentum"],
)
@torch.no_grad()
def test_sixteen_thousand_tokens_stay_finite(options, common):
    """In float32, fresh and far from fresh, also where all tokens share a component."""
    rng = torch.Generator().manual_seed(0)
    x = (1 - common**2) ** 0.5 * torch.randn(1, 16384, DIM, generator=rng) + common * torch.randn(DIM, generator=rng)
    for far in (0.0, 0.4):
        layer = make(options, far=far, dtype=torch.float32, chunk_size=64, projection_chunk_size=64)
        y, state = layer(x)
        assert y.isfinite().all()
        assert all(tensor.abs().max() < 1e3 for name, tensor in leaves(state) if name != "step")


@torch.no_grad()
def test_self_modification_starts_with_the_second_chunk():
    """A gain of zero is a layer without memories of projections; any other differs once a chunk has been read."""
    layer, x = make({}, far=0.0), tokens()
    y, _ = layer(x)
    for gain in layer.gain.values():
        gain.zero_()
    still, _ = layer(x)
    torch.testing.assert_close(still[:, :8], y[:, :8])
    assert ((still - y)[:, 8:].abs().amax(-1) > 1e-6).all()


# Dtypes.


@torch.no_grad()
def test_half_precision_parameters_keep_a_float32_recurrence():
    layer, x = make({}, dtype=torch.float32), tokens(dtype=torch.float32)
    exact, _ = layer(x)
    y, state = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert {tensor.dtype for name, tensor in leaves(state) if name != "step"} == {torch.float32}
    assert (y - exact).norm() < 0.1 * exact.norm()


@torch.no_grad()
def test_autocast_keeps_a_float32_recurrence():
    layer, x = make({}, dtype=torch.float32), tokens(dtype=torch.float32)
    exact, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
    assert {tensor.dtype for name, tensor in leaves(state) if name != "step"} == {torch.float32}
    assert (y - exact).norm() < 0.1 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        change = layer(x[:, :4])[1]["stack"]["change"]  # one chunk's product, nothing added
    assert not torch.equal(change, change.bfloat16().float())


# Bad input.


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 5}, "dim must be a multiple of heads, got dim=12 and heads=5"),
        ({"heads": 0}, "Invalid heads: 0, expected a whole number of at least 1"),
        ({"chunk_size": 4.5}, "Invalid chunk_size: 4.5, expected a whole number"),
        ({"projection_chunk_size": -1}, "Invalid projection_chunk_size: -1, expected"),
        ({"hidden": 0, "memory": "mlp"}, "Invalid hidden: 0, expected"),
        ({"memory": "attention"}, "memory must be 'linear' or 'mlp', got 'attention'"),
        ({"adapt": ("key", "eta")}, "adapt takes names out of .*, got 'eta'"),
        ({"adapt": "keys"}, "adapt takes names out of .*, got 'keys'"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": float("nan")}, r"momentum must be in \[0, 1\), got nan"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelfModifyingTitans(DIM, **options)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 11), (1, 2, 3, 12)], ids=str)
def test_a_wrong_width_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected x of shape \[B, T, 12\], got"):
        make({})(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: make({"memory": "mlp"}).initial_state(2), "state is of another layer: expected a dict of"),
        (lambda s: make({"adapt": ()}).initial_state(2), r"state\['stack'\]\['change'\] is of another layer"),
        (lambda s: SelfModifyingTitans(24, 6).double().initial_state(2), "is of another layer: expected shape"),
        (lambda s: make({}).initial_state(3), r"is of 3 samples, the input of 2"),
        (lambda s: make({}, dtype=torch.float32).initial_state(2), "must be torch.float64 on cpu, got torch.float32"),
        (lambda s: (s, s), "expected a dict of .*, got tuple"),
        (lambda s: {**s, "tail": None}, r"state\['tail'\] is of another layer: .* got NoneType"),
    ],
    ids=["memory", "boxes", "dim", "batch", "dtype", "tuple", "none"],
)
def test_a_state_that_is_not_the_layers_is_refused(spoil, message):
    layer = make({})
    with pytest.raises(ValueError, match=message):
        layer(tokens(), spoil(layer.initial_state(2)))
