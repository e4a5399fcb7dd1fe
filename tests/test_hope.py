"""Hope and Hope-Attention: what they are made of, how large they are, and that they learn in context."""

import pytest
import torch
from torch.nn import functional as F

from deep_optim.models import ContinuumMemory, Hope, HopeAttention, SelfModifyingTitans, Transformer
from model_cases import leaves
from test_transformer import SIZES


def test_is_its_two_layers_in_a_row():
    torch.manual_seed(0)
    model = Hope(13, 16, 1, chunk_sizes=(4, 2), memory_chunk_size=4, projection_chunk_size=8).double()
    tokens = torch.randint(13, (2, 19))
    (block,) = model.blocks
    assert isinstance(block.mixer, SelfModifyingTitans) and isinstance(block.memory, ContinuumMemory)
    x = model.embedding(tokens)
    x = x + block.mixer(F.rms_norm(x, (16,), block.norm.weight, 1e-6))[0]
    x = block.memory(x)[0]
    logits = F.linear(F.rms_norm(x, (16,), model.norm.weight, 1e-6), model.head.weight)
    torch.testing.assert_close(model(tokens)[0], logits, rtol=0, atol=1e-12)


def test_options_reach_the_layers():
    titans = dict(heads=2, memory="mlp", memory_chunk_size=3, memory_hidden_dim=11, projection_chunk_size=5)
    titans |= dict(adapt=iter(("query", "lr")), momentum=0.7)
    levels = dict(chunk_sizes=(6, 3), hidden_dim=7, arrangement="nested", retention=0.9, max_step=0.3)
    model = Hope(13, 16, 2, **titans, **levels, inner_lr=(0.5, 2.0), dropout=0.1)
    for block in model.blocks:
        mixer, memory = block.mixer, block.memory
        assert (mixer.heads, mixer.memory, mixer.chunk_size, mixer.projection_chunk_size) == (2, "mlp", 3, 5)
        assert set(mixer.adapt) == {"query", "lr"} and mixer.momentum == 0.7 and mixer.initial["w2"].shape == (2, 11, 8)
        assert memory.arrangement == "nested" and [level.restart for level in memory.levels] == [None, 6]
        assert [(lv.chunk_size, lv.inner_lr, lv.retention, lv.max_step) for lv in memory.levels] == [
            (6, 0.5, 0.9, 0.3),
            (3, 2.0, 0.9, 0.3),
        ]
        assert memory.levels[0].block.up.weight.shape == (7, 16)
        assert block.dropout.p == memory.dropout.p == 0.1


def test_the_state_does_not_grow():
    model = Hope(13, 16, 1, chunk_sizes=(8, 4)).eval()
    tokens = torch.randint(13, (1, 8))
    state, sizes = None, set()
    for _ in range(20):
        _, state = model(tokens, state)
        sizes.add(sum(leaf.numel() for leaf in leaves(state).values()))
    assert len(sizes) == 1


def test_options_reach_the_layers_of_hope_attention():
    levels = dict(chunk_sizes=(6, 3), hidden_dim=7, arrangement="nested", retention=0.9, max_step=0.3)
    model = HopeAttention(13, 16, 2, heads=2, **levels, inner_lr=(0.5, 2.0), dropout=0.1)
    for block in model.blocks:
        memory = block.memory
        assert block.mixer.heads == 2
        assert memory.arrangement == "nested" and memory.levels[0].block.up.weight.shape == (7, 16)
        assert [(lv.chunk_size, lv.inner_lr, lv.retention, lv.max_step) for lv in memory.levels] == [
            (6, 0.5, 0.9, 0.3),
            (3, 2.0, 0.9, 0.3),
        ]
        assert block.dropout.p == memory.dropout.p == 0.1


@pytest.mark.parametrize("cls", [Hope, HopeAttention])
@pytest.mark.parametrize("size", SIZES)
def test_presets_have_the_papers_sizes_and_the_transformers(cls, size):
    with torch.device("meta"):
        model, baseline = cls.preset(size), Transformer.preset(size)
    count, expected = (sum(param.numel() for param in each.parameters()) for each in (model, baseline))
    assert count == pytest.approx(SIZES[size], rel=0.1)
    assert count == pytest.approx(expected, rel=0.01)
