"""What every model owes: causality, samples on their own, a state that splits anywhere, gradients for every parameter.

Each promise is one that a public implementation of these layers was seen to break.
"""

import contextlib
import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from deep_optim.models import Hope, SelfModifyingTitans, detach
from deep_optim.models.continuum_level import ContinuumLevel
from model_cases import VOCAB, ModelCase, every_model, leaves, make_tokens

CLOSE = dict(rtol=0, atol=1e-10)


def assert_same_state(one, other, **tolerance):
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@every_model()
@pytest.mark.parametrize("position", [0, 7, 8, 13, 20])
def test_a_token_does_not_reach_back(case: ModelCase, position: int):
    model, tokens = case.make(), make_tokens(2, 21)
    edited = tokens.clone()
    edited[:, position] = (edited[:, position] + 1) % VOCAB
    before, after = model(tokens)[0], model(edited)[0]
    torch.testing.assert_close(before[:, :position], after[:, :position], rtol=0, atol=1e-13)
    assert (before[:, position:] - after[:, position:]).abs().amax((0, 2)).min() > 1e-9  # and it does reach on


@every_model()
def test_samples_do_not_see_each_other(case: ModelCase):
    model, tokens = case.make(), make_tokens(3, 20)
    logits, state = model(tokens)
    logits, state = model(tokens, state)
    for row in range(3):
        alone, own = model(tokens[row : row + 1])
        alone, own = model(tokens[row : row + 1], own)
        torch.testing.assert_close(logits[row : row + 1], alone, **CLOSE)
        rows = {name: leaf[row : row + 1] if leaf.ndim else leaf for name, leaf in leaves(state).items()}
        torch.testing.assert_close(rows, leaves(own), **CLOSE)


@every_model()
@settings(max_examples=5)
@given(cuts=st.lists(st.integers(0, 27), max_size=5))
def test_any_split_equals_the_whole(case: ModelCase, cuts: list[int]):
    """In mid-chunk, pieces shorter than a chunk, and pieces of no token at all."""
    model, tokens = case.make(), make_tokens(2, 27)
    whole, last = model(tokens)
    bounds = [0, *sorted(cuts), 27]
    state, pieces = None, []
    for start, stop in itertools.pairwise(bounds):
        logits, state = model(tokens[:, start:stop], state)
        assert logits.shape == (2, stop - start, VOCAB)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **CLOSE)
    assert_same_state(state, last, **CLOSE)


@every_model()
def test_token_by_token_equals_the_whole(case: ModelCase):
    model, tokens = case.make(), make_tokens(2, 3 * case.period)
    whole, last = model(tokens)
    state, logits = None, []
    for token in tokens.split(1, 1):
        logit, state = model(token, state)
        logits.append(logit)
    torch.testing.assert_close(torch.cat(logits, 1), whole, **CLOSE)
    assert_same_state(state, last, **CLOSE)


@every_model()
def test_gradients_flow_through_the_state_unless_it_is_detached(case: ModelCase):
    model, tokens = case.make(), make_tokens(2, 21)

    def gradients(pieces, between):
        model.zero_grad()
        state, loss = None, 0.0
        for piece in pieces:
            logits, state = model(piece, between(state))
            loss = loss + logits.square().sum()
        loss.backward()
        return {name: param.grad.clone() for name, param in model.named_parameters()}

    whole = gradients([tokens], lambda state: state)
    torch.testing.assert_close(gradients(tokens.split([5, 0, 16], 1), lambda state: state), whole, **CLOSE)
    cut = gradients(tokens.split([5, 16], 1), lambda state: state and detach(state))
    assert any((cut[name] - whole[name]).abs().max() > 1e-6 for name in whole)


@every_model()
def test_every_parameter_has_a_gradient(case: ModelCase):
    model, tokens = case.make(), make_tokens(2, 4 * case.period)
    logits, _ = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: param.grad for name, param in model.named_parameters()}
    without = [name for name, grad in gradients.items() if grad is None or grad.abs().max() < 1e-9]  # less is rounding
    assert without == []


@every_model()
def test_evaluation_is_training_but_for_dropout(case: ModelCase):
    model, tokens = case.make(), make_tokens(2, 20)
    (trained, state), (evaluated, other) = model.train()(tokens), model.eval()(tokens)
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=0)
    assert_same_state(state, other, rtol=0, atol=0)
    for dropped, whole in (("mixer", "memory"), ("memory", "mixer")):  # each by itself
        model = case.make(dropout=0.5)
        torch.testing.assert_close(model.eval()(tokens)[0], evaluated, rtol=0, atol=0)
        for block in model.blocks:
            {"mixer": block, "memory": block.memory}[whole].dropout.p = 0.0
        assert not torch.equal(model.train()(tokens)[0], model(tokens)[0]), dropped


@every_model()
@pytest.mark.parametrize("vocab_size, dim", [(VOCAB, 16), (1000, 64)])
def test_the_first_loss_is_that_of_knowing_nothing(case: ModelCase, vocab_size: int, dim: int):
    torch.manual_seed(1)
    model = case.make(torch.float32, vocab_size=vocab_size, dim=dim)
    tokens = torch.randint(vocab_size, (4, 33))
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(vocab_size), rel=0.05)


def of_long_chunks(case: ModelCase, factor: int, heads: int):
    """A small model for many tokens: with short chunks or two blocks a test would take minutes."""
    options = {"chunk_sizes": [factor * size for size in case.kwargs.get("chunk_sizes", ())]}
    options |= {name: factor * size for name, size in case.kwargs.items() if name.endswith("_chunk_size")}
    options = {name: value for name, value in options.items() if value}
    return case.make(torch.float32, dim=8, heads=heads, num_layers=1, **options)


@every_model()
@torch.no_grad()
def test_sixteen_thousand_random_tokens_leave_everything_finite(case: ModelCase):
    logits, state = of_long_chunks(case, 128, heads=1)(make_tokens(1, 16_384))
    assert logits.isfinite().all()
    assert [name for name, leaf in leaves(state).items() if not leaf.isfinite().all()] == []


@torch.no_grad()
def test_sixteen_thousand_random_tokens_leave_everything_finite_in_chunks_of_the_default_sizes():
    logits, state = Hope(VOCAB, 8, 1, heads=1)(make_tokens(1, 16_384))
    assert all(leaf.isfinite().all() for leaf in (logits, *leaves(state).values()))


@every_model()
@torch.no_grad()
def test_remembers_for_a_thousand_tokens_in_which_nothing_is_written(case: ModelCase):
    model = of_long_chunks(case, 64, heads=2)
    _, state = model(make_tokens(1, 1000))
    for module in model.modules():
        if isinstance(module, SelfModifyingTitans):
            module.rates.bias[: module.heads] = -1e9  # b = 0
        if isinstance(module, ContinuumLevel):
            module.inner_lr *= 1e-12
    _, later = model(make_tokens(1, 1000, seed=2), state)
    levels = model.blocks[0].memory.levels
    before, after = leaves(state), leaves(later)
    for name in before:
        if name.endswith("/change"):
            assert 0.1 < after[name].norm() / before[name].norm() < 1, name
        if "/written/" in name:
            level = levels[int(name.split("/")[3])]
            chunks = 2000 // level.chunk_size - 1000 // level.chunk_size
            kept = 0.0 if level.restart else level.retention**chunks
            torch.testing.assert_close(after[name], kept * before[name], rtol=1e-4, atol=1e-7)
            assert before[name].any() and (kept > 0.1 or level.restart), name


@every_model()
def test_the_state_belongs_to_the_caller(case: ModelCase):
    """Nothing stays on the module, nothing is written into, and a state can be continued from twice."""
    model, tokens = case.make(), make_tokens(2, 13)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    logits, state = model(tokens)
    kept = copy.deepcopy(detach(state))
    first, _ = model(tokens, state)
    second, _ = model(tokens, state)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert_same_state(detach(state), kept, rtol=0, atol=0)
    torch.testing.assert_close(model(tokens)[0], logits, rtol=0, atol=0)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    torch.testing.assert_close(dict(model.state_dict()), dict(weights), rtol=0, atol=0)


@every_model()
def test_the_state_is_as_large_as_what_it_says(case: ModelCase):
    """No tensor of it is a view that holds on to the sequence it came from."""
    _, state = case.make()(make_tokens(2, 101))
    for name, leaf in leaves(detach(state)).items():
        assert leaf.untyped_storage().nbytes() == leaf.nbytes, name


@every_model()
def test_without_writing_memories_stand_still(case: ModelCase):
    model, tokens = case.make(), make_tokens(2, 13)
    _, state = model(tokens)
    frozen, after = model(tokens, state, write=False)
    assert frozen.shape == (2, 13, VOCAB)
    for name, leaf in leaves(state).items():
        if "memory" in name:
            torch.testing.assert_close(leaves(after)[name], leaf, rtol=0, atol=0)
    again, _ = model(tokens[:, :5], state, write=False)
    torch.testing.assert_close(again, frozen[:, :5], **CLOSE)


@every_model()
def test_a_saved_state_goes_on_where_it_was(case: ModelCase):
    model, tokens = case.make(), make_tokens(2, 21)
    whole, _ = model(tokens)
    _, state = model(tokens[:, :11])  # in the middle of a chunk
    file = io.BytesIO()
    torch.save(detach(state), file)
    file.seek(0)
    logits, _ = model(tokens[:, 11:], torch.load(file, weights_only=True))
    torch.testing.assert_close(logits, whole[:, 11:], **CLOSE)


@every_model()
def test_memories_are_kept_in_float32(case: ModelCase):
    for dtype in (torch.float32, torch.bfloat16):
        logits, state = case.make(dtype)(make_tokens(2, 9))
        assert logits.dtype == dtype and logits.isfinite().all()
        for name, leaf in leaves(state).items():
            is_cache = name.endswith(
                ("/mixer/key", "/mixer/value")
            )  # of attention: everything seen, as it was computed
            kept = torch.float32 if leaf.is_floating_point() else torch.int64
            assert leaf.dtype == (dtype if is_cache else kept), name


@every_model()
def test_generates_what_the_whole_sequence_would_say(case: ModelCase):
    model, prompt = case.make(), make_tokens(2, 6)
    new, state = model.generate(prompt, 9, temperature=0.0)
    assert new.shape == (2, 9)
    logits, _ = model(torch.cat([prompt, new], 1))
    torch.testing.assert_close(new, logits[:, 5:-1].argmax(-1))
    more, _ = model.generate(new[:, -1:], 4, temperature=0.0, state=state)  # goes on where it stopped
    torch.testing.assert_close(more, model.generate(prompt, 13, temperature=0.0)[0][:, 9:])
    assert not any(leaf.requires_grad for leaf in leaves(state).values())


@every_model()
def test_draws_come_from_the_generator_at_the_temperature(case: ModelCase):
    model, prompt = case.make(), make_tokens(1, 3).expand(2000, -1)
    torch.nn.init.normal_(model.head.weight, std=0.3)  # opinions, for the temperature to sharpen
    drawn = [model.generate(prompt, 1, temperature=0.5, generator=torch.Generator().manual_seed(s))[0] for s in (0, 0)]
    torch.testing.assert_close(*drawn)
    expected = (model(prompt[:1])[0][0, -1] / 0.5).softmax(-1)
    frequency = torch.bincount(drawn[0].flatten(), minlength=VOCAB) / 2000
    torch.testing.assert_close(frequency.double(), expected, rtol=0, atol=0.04)


@every_model()
def test_long_prompts_are_read_in_pieces(case: ModelCase, monkeypatch):
    model, prompt = case.make(), make_tokens(1, 14)
    whole, last = model.generate(prompt, 3, temperature=0.0)
    monkeypatch.setattr("deep_optim.models.language_model.PREFILL", 5)
    pieces, state = model.generate(prompt, 3, temperature=0.0)
    torch.testing.assert_close(pieces, whole)
    assert_same_state(state, last, **CLOSE)


@every_model()
def test_bad_tokens_and_arguments_are_refused_in_words(case: ModelCase):
    model, tokens = case.make(), make_tokens(2, 5)
    with pytest.raises(TypeError, match="tokens must be int64"):
        model(tokens.int())
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\]"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"T of at least 1"):
        model.generate(tokens[:, :0], 3)
    for options in ({"temperature": -1.0}, {"temperature": math.nan}):
        with pytest.raises(ValueError, match="Invalid temperature"):
            model.generate(tokens, 3, **options)
    with pytest.raises(ValueError, match="Invalid max_new_tokens"):
        model.generate(tokens, -1)
    for name in ("vocab_size", "dim", "num_layers"):
        with pytest.raises(ValueError, match="Invalid"):
            case.make(**{name: 0})
    with pytest.raises(ValueError, match="heads"):
        case.make(heads=3)


@every_model()
def test_a_foreign_state_is_refused_in_words(case: ModelCase):
    model, tokens = case.make(), make_tokens(2, 5)
    _, state = model(tokens)
    broken = copy.deepcopy(detach(state))
    del broken["1"]["mixer"]
    strangers = [{}, {"0": state["0"]}, broken, 3, case.make(num_layers=3)(tokens)[1], case.make(dim=32)(tokens)[1]]
    for stranger in strangers:
        with pytest.raises(ValueError, match="of another layer"):
            model(tokens, stranger)
    with pytest.raises(ValueError, match="samples"):
        model(make_tokens(3, 5), state)
    with pytest.raises(ValueError, match=r"float32|float64"):
        model(tokens, case.make(torch.float32)(tokens)[1])
    with pytest.raises(ValueError, match=r"on cpu, got torch\.float64 on meta"):
        model(tokens, on_meta(state))


@every_model()
def test_nothing_is_read_back_from_a_device(case: ModelCase, monkeypatch):
    """A tensor on the meta device has no value to read, so that whatever would wait for a device fails there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # which the meta device lacks
    model, tokens = case.make(num_layers=1).to("meta"), make_tokens(2, 10).to("meta")
    state = None
    for piece in tokens.split([9, 0, 1], 1):
        logits, state = model(piece, state)
        assert logits.is_meta
    model(tokens, state, write=False)
    for name, leaf in leaves(state).items():
        assert leaf.device.type == ("cpu" if name.endswith("/step") else "meta"), name


def on_meta(state):
    return {name: each.to("meta") if isinstance(each, torch.Tensor) else on_meta(each) for name, each in state.items()}


@every_model()
def test_trains_saves_loads_copies_and_pickles(case: ModelCase):
    """With several heads too, whose parameters must be neither expanded nor views."""
    model, tokens = case.make(), make_tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    expected, _ = model(tokens)
    other = case.make()
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(tokens)[0], expected, rtol=0, atol=0)
