"""Levels made of a trained model's MLPs: the model to begin with, and a continuum memory from there on."""

import copy

import pytest
import torch
from torch import nn

from deep_optim.models import ContinuumMemory
from deep_optim.models.mlp import MLP
from deep_optim.models.pretrained import ModuleBlock, PretrainedContinuum

CLOSE = dict(rtol=0, atol=1e-10)


class Decoder(nn.Module):
    """A stand-in for a trained model, its MLPs called `ff` and with biases; it mixes tokens by their running mean."""

    def __init__(self, layers=3) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            layer.ff = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
            self.layers.append(layer)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer.ff(nn.functional.layer_norm(x, (8,)))
        return x


def make_decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder().double()


def make_inputs(length=13):
    return torch.randn(2, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def make_continuum(model, **options) -> PretrainedContinuum:
    """Return levels that write loudly."""
    continuum = ContinuumMemory.from_pretrained_mlps(model, (4, 2), **options)
    for name, param in continuum.named_parameters():
        if ".target." in name or name.endswith("level.gate.weight"):
            nn.init.normal_(param)
    return continuum


def make_llama():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double().eval()


def test_any_modules_gradients_are_those_of_the_closed_form():
    torch.manual_seed(0)
    block = MLP(6, 5).double()
    weights = {name: torch.randn(3, *weight.shape).double() for name, weight in block.weights().items()}
    key, value, rate = torch.randn(3, 4, 6).double(), torch.randn(3, 4, 6).double(), torch.rand(3, 4).double()
    general = {f"{name}.weight": weight for name, weight in weights.items()}
    torch.testing.assert_close(ModuleBlock(block).read(general, key), block.read(weights, key))
    answer, gradients = ModuleBlock(block).gradients(general, key, value, rate)
    closed_answer, closed = block.gradients(weights, key, value, rate)
    torch.testing.assert_close(answer, closed_answer)
    for name, gradient in closed.items():
        torch.testing.assert_close(gradients[f"{name}.weight"], gradient)


def test_at_a_rate_of_zero_llamas_logits_are_its_own_bit_for_bit():
    model, tokens = make_llama(), torch.randint(23, (2, 13))
    expected = model(tokens).logits
    continuum = ContinuumMemory.from_pretrained_mlps(model, (4, 2), inner_lr=0.0)
    output, state = continuum(tokens)
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=0)
    assert list(state) == [f"model.layers.{layer}.mlp" for layer in range(3)]


def test_at_any_rate_llama_begins_as_it_was():
    model, tokens = make_llama(), torch.randint(23, (2, 13))
    expected = model(tokens).logits
    output, _ = ContinuumMemory.from_pretrained_mlps(model, (4, 2))(tokens)
    torch.testing.assert_close(output.logits, expected, **CLOSE)


def test_llama_in_pieces_with_its_cache_equals_the_whole():
    model, tokens = make_llama(), torch.randint(23, (2, 13))
    plain = model(tokens).logits
    continuum = make_continuum(model)
    whole, _ = continuum(tokens)
    assert (whole.logits - plain).abs().max() > 1e-3  # levels write
    state, cache, logits = None, None, []
    for piece in tokens.split([3, 1, 6, 3], 1):
        output, state = continuum(piece, state=state, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, **CLOSE)


def test_llama_called_by_itself_begins_anew():
    model, tokens = make_llama(), torch.randint(23, (2, 13))
    continuum = make_continuum(model)
    whole, _ = continuum(tokens)
    for _ in range(2):
        torch.testing.assert_close(model(tokens).logits, whole.logits, rtol=0, atol=0)


def test_any_mlps_stream_and_stop_writing_and_stay_apart():
    continuum, x = make_continuum(make_decoder(), name="ff"), make_inputs()
    whole, last = continuum(x)
    first, state = continuum(x[:, :5])
    second, end = continuum(x[:, 5:], state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, **CLOSE)
    torch.testing.assert_close(end, last, **CLOSE)
    frozen, same = continuum(x[:, 5:], state=state, write=False)
    torch.testing.assert_close(same, state, rtol=0, atol=0)
    assert (frozen - second).abs().max() > 1e-4
    torch.testing.assert_close(continuum(x[1:])[0], whole[1:], **CLOSE)
    continuum(x, state=state)
    torch.testing.assert_close(continuum.model(x), whole, rtol=0, atol=0)  # by itself it knows of no call before


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_levels_learn_where_no_gradient_is_recorded(mode):
    continuum, x = make_continuum(make_decoder(), name="ff"), make_inputs()
    expected, _ = continuum(x)
    with mode():
        y, state = continuum(x)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert not state["layers.0.ff"]["written"]["0.weight"].requires_grad


def test_every_parameter_has_a_gradient_through_the_writes():
    continuum, x = make_continuum(make_decoder(), name="ff"), make_inputs(17)
    continuum(x)[0].square().sum().backward()
    assert [name for name, param in continuum.named_parameters() if param.grad is None or not param.grad.any()] == []


def test_the_gradient_through_the_writes_is_that_of_differences():
    continuum, x = make_continuum(make_decoder(), name="ff", max_step=1.0), make_inputs(9)
    param = continuum.model.layers[0].ff.level.block.module[2].weight

    def loss():
        return continuum(x)[0].square().sum()

    loss().backward()
    with torch.no_grad():
        param[1, 2] += 1e-5
        above = loss()
        param[1, 2] -= 2e-5
        slope = (above - loss()) / 2e-5
    torch.testing.assert_close(param.grad[1, 2], slope, rtol=1e-5, atol=1e-7)


def test_the_chunk_sizes_repeat_over_the_layers():
    continuum = ContinuumMemory.from_pretrained_mlps(make_decoder(), (4, 2), name="ff", inner_lr=(1.0, 0.5))
    levels = [layer.ff.level for layer in continuum.model.layers]
    assert [(level.chunk_size, level.inner_lr) for level in levels] == [(4, 1.0), (2, 0.5), (4, 1.0)]


def test_options_reach_the_levels():
    continuum = ContinuumMemory.from_pretrained_mlps(make_decoder(), (4,), name="ff", retention=0.5, max_step=0.3)
    assert {(layer.ff.level.retention, layer.ff.level.max_step) for layer in continuum.model.layers} == {(0.5, 0.3)}


def test_new_layers_are_where_the_old_ones_are():
    model = make_decoder().to(torch.bfloat16)
    continuum = ContinuumMemory.from_pretrained_mlps(model, (4,), name="ff")
    assert {param.dtype for param in continuum.parameters()} == {torch.bfloat16}
    y, state = continuum(make_inputs().bfloat16())
    assert y.dtype == torch.bfloat16
    assert state["layers.0.ff"]["written"]["0.weight"].dtype == torch.float32


def test_a_copy_goes_its_own_way():
    continuum, x = make_continuum(make_decoder(), name="ff"), make_inputs()
    torch.testing.assert_close(copy.deepcopy(continuum)(x)[0], continuum(x)[0], rtol=0, atol=0)


def test_what_cannot_be_done_is_refused_in_words_and_leaves_the_model_alone():
    model, x = make_decoder(), make_inputs()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="no module called 'mlp'"):
        ContinuumMemory.from_pretrained_mlps(model, (4,))
    with pytest.raises(ValueError, match="does not divide"):
        ContinuumMemory.from_pretrained_mlps(model, (4, 3), name="ff")
    with pytest.raises(ValueError, match="Invalid inner_lr"):
        ContinuumMemory.from_pretrained_mlps(model, (4,), name="ff", inner_lr=-1.0)
    blind = nn.Module()
    blind.mlp = nn.Sequential(nn.Conv1d(4, 4, 1))
    with pytest.raises(ValueError, match="pass it as dim="):
        ContinuumMemory.from_pretrained_mlps(blind, (4,))
    assert [name for name, _ in model.named_modules()] == names
    continuum = ContinuumMemory.from_pretrained_mlps(model, (4,), name="ff")
    _, state = continuum(x)
    with pytest.raises(ValueError, match="levels already"):
        ContinuumMemory.from_pretrained_mlps(model, (4,), name="ff")
    with pytest.raises(ValueError, match="of another layer"):
        continuum(x, state={})
    with pytest.raises(ValueError, match="samples"):
        continuum(x[:1], state=state)


@pytest.mark.parametrize(
    "layer, message",
    [
        (nn.Identity(), r"layers\.1\.ff has no parameters"),
        (nn.ModuleDict({"ff": nn.Linear(8, 8)}), r"layers\.1\.ff\.ff is a part of layers\.1\.ff"),
        (None, r"layers\.0\.ff and layers\.1\.ff are one module"),
    ],
)
def test_places_that_can_hold_no_level_are_refused_before_any_is_made(layer, message):
    model = make_decoder()
    model.layers[1].ff = model.layers[0].ff if layer is None else layer
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        ContinuumMemory.from_pretrained_mlps(model, (4,), name="ff")
    assert dict(model.named_modules()) == before


def test_an_mlp_that_is_called_twice_or_not_at_all_would_break_the_stream_and_is_refused():
    model, x = make_decoder(), make_inputs()
    continuum = make_continuum(model, name="ff")
    expected, state = continuum(x)
    layers = model.layers
    for broken, message in (
        ([layers[0], *layers], r"layers\.0\.ff was called twice"),
        (layers[:2], r"did not call layers\.2\.ff"),
    ):
        model.layers = broken if isinstance(broken, nn.ModuleList) else nn.ModuleList(broken)
        with pytest.raises(RuntimeError, match=message):
            continuum(x, state=state)
    model.layers = layers
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)  # nothing is left of the calls that failed


def test_inputs_that_are_no_sequences_are_refused_in_words():
    model = make_decoder()
    continuum = ContinuumMemory.from_pretrained_mlps(model, (4,), name="ff")
    with pytest.raises(ValueError, match=r"expected x of shape \[B, T, 8\], got \[26, 8\]"):
        continuum(make_inputs().flatten(0, 1))
