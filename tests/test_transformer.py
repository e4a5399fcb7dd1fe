"""The baseline against a Transformer written with torch's own functions, and its attention against a sum."""

import math

import pytest
import torch
from torch.nn import functional as F

from deep_optim.models import HopeAttention, Transformer
from deep_optim.models.attention import Attention

SIZES = {"340m": 340e6, "760m": 760e6, "1.3b": 1.3e9}


def turned(x: torch.Tensor, base: float = 10_000.0) -> torch.Tensor:  # [T, d]
    """Return RoPE of every position, as multiplication of complex numbers."""
    length, size = x.shape
    angle = torch.arange(length)[:, None] * base ** (-2 * torch.arange(size // 2) / size).double()
    pairs = torch.complex(x[:, : size // 2], x[:, size // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag], -1)


def attention(layer: Attention, x: torch.Tensor) -> torch.Tensor:  # [T, D]
    """Return what attention should be, head by head and token by token."""
    width = x.shape[1] // layer.heads
    out = []
    for head in range(layer.heads):
        rows = slice(head * width, (head + 1) * width)
        query, key = (turned(x @ each.weight[rows].T) for each in (layer.query, layer.key))
        value = x @ layer.value.weight[rows].T
        answers = []
        for position in range(len(x)):
            scores = key[: position + 1] @ query[position] / math.sqrt(width)
            answers.append(scores.softmax(0) @ value[: position + 1])
        out.append(torch.stack(answers))
    return torch.cat(out, 1) @ layer.out.weight.T


def test_is_the_model_that_its_equations_say():
    torch.manual_seed(0)
    model = Transformer(13, 16, 2, heads=2).double()
    tokens = torch.randint(13, (9,))
    x = model.embedding.weight[tokens]
    for block in model.blocks:
        x = x + attention(block.mixer, F.rms_norm(x, (16,), block.norm.weight, 1e-6))
        (mlp,), (norm,) = block.memory.levels, block.memory.norms
        u, weights = F.rms_norm(x, (16,), norm.weight, 1e-6), mlp.block.weights()
        x = x + (F.silu(u @ weights["gate"].T) * (u @ weights["up"].T)) @ weights["down"].T
    logits = F.rms_norm(x, (16,), model.norm.weight, 1e-6) @ model.head.weight.T
    torch.testing.assert_close(model(tokens[None])[0][0], logits, rtol=0, atol=1e-10)


def test_is_hope_attention_whose_one_level_does_not_learn_in_context():
    torch.manual_seed(0)
    model, other = Transformer(13, 16, 2).double(), HopeAttention(13, 16, 2, chunk_sizes=(5,), inner_lr=0.0).double()
    other.load_state_dict(model.state_dict())
    tokens = torch.randint(13, (2, 9))
    torch.testing.assert_close(other(tokens)[0], model(tokens)[0], rtol=0, atol=0)


def test_scores_depend_on_distance_alone():
    """Nothing but rotary positions tells where a token is: the same tokens further on are answered alike."""
    torch.manual_seed(0)
    layer, x = Attention(8, 2).double(), torch.randn(1, 6, 8).double()
    far = layer._rotate(x[:, None], 1000)
    near = layer._rotate(x[:, None], 0)
    torch.testing.assert_close(far @ far.mT, near @ near.mT, rtol=0, atol=1e-10)
    assert (far - near).abs().max() > 0.1


def test_positions_are_exact_where_features_are_not():
    """In bfloat16 the angle of position 1,001 would be that of 1,000."""
    layer, x = Attention(8, 2), torch.randn(1, 2, 1, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotated, exact = layer._rotate(x, 1001), layer._rotate(x.double(), 1001)
    assert rotated.dtype == torch.bfloat16
    torch.testing.assert_close(rotated.double(), exact, rtol=2**-8, atol=1e-3)


def test_what_adds_to_the_residual_stream_starts_smaller_by_the_root_of_its_terms():
    """Two a block: as in GPT-2."""
    torch.manual_seed(0)
    shallow, deep = Transformer(13, 64, 1), Transformer(13, 64, 8)
    for name in ("mixer.out.weight", "memory.levels.0.block.down.weight"):
        one, many = (model.blocks[0].get_parameter(name).std().item() for model in (shallow, deep))
        assert one / many == pytest.approx(8**0.5, rel=0.05), name
    one, many = (model.blocks[0].mixer.query.weight.std().item() for model in (shallow, deep))
    assert one == pytest.approx(many, rel=0.05)


@pytest.mark.parametrize("size", SIZES)
def test_presets_have_the_papers_sizes(size):
    """Within a tenth: 340M counts 302M in the blocks, and twice 33M for 32,000 tokens."""
    with torch.device("meta"):
        model = Transformer.preset(size)
    assert sum(param.numel() for param in model.parameters()) == pytest.approx(SIZES[size], rel=0.1)


def test_presets_give_way_to_options_and_refuse_other_sizes():
    with torch.device("meta"):
        model = Transformer.preset("340m", num_layers=2, vocab_size=100)
    assert len(model.blocks) == 2 and model.embedding.weight.shape == (100, 1024)
    with pytest.raises(ValueError, match="Invalid size: '7b'"):
        Transformer.preset("7b")
