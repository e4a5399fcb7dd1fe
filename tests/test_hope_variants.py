"""Each variant of Hope lacks what its name says, and nothing else."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks.hope_variants import ADAPT, VARIANTS, Adding, Approaching, Keeping
from benchmarks.sequence_models import MODELS
from deep_optim.models import SelfModifyingTitans


def size(model):
    return sum(param.numel() for param in model.parameters())


def test_the_whole_is_hope():
    whole, model = VARIANTS["hope (whole)"](11, 32, 2), MODELS["hope (short chunks)"](11, 32, 2)
    whole.load_state_dict(model.state_dict())
    tokens = torch.randint(11, (2, 50), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole(tokens)[0], model(tokens)[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_have_the_size_of_the_whole(name):
    sizes = [size(build(256, 64, 2)) for build in (VARIANTS[name], VARIANTS["hope (whole)"])]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.015)


def test_projections_are_static_where_they_have_no_memory():
    boxes = {"memory", "key", "value", "lr", "retention"}
    changed = {
        "- inner k": {"key"},
        "- inner v": {"value"},
        "- inner rates": {"lr", "retention"},
        "- inner projections": boxes - {"memory"},
        "+ inner q": {"query"},
    }
    for name, build in VARIANTS.items():
        found = set(build(11, 16, 1).blocks[0].mixer.initial)
        assert found == boxes ^ changed.get(name.removeprefix("hope "), set())


def test_with_a_gain_of_one_projections_start_with_all_that_their_memories_hold():
    params = dict(VARIANTS["hope + gain of 1"](11, 16, 1).named_parameters())
    assert {name.rpartition(".")[2] for name in params if ".gain." in name} == {"memory", *ADAPT}
    assert all((param == 1).all() for name, param in params.items() if ".gain." in name)


def test_adding_is_the_hebbian_sum():
    torch.manual_seed(0)
    layer, width = Adding(8, 2, adapt=(), chunk_size=4).double(), 4
    with torch.no_grad():
        layer.rates.weight.normal_()
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    mixed = torch.cat([layer.query(x), layer.key(x), layer.value(x)], -1)[0]  # [T, 3 D]
    padded = F.pad(mixed, (0, 0, 3, 0))
    mixed = F.silu(sum(padded[i : i + 30] * layer.conv[:, i] for i in range(4)))
    _, key, value = mixed.unflatten(-1, (3, 2, width)).unbind(1)  # [T, H, d]
    key = F.normalize(key, dim=-1)
    value = torch.einsum("thd,hrd->thr", value, torch.eye(width) + layer.initial["memory"])
    value = value / (1 + value.square().sum(-1, keepdim=True)).sqrt()
    lr, retention = layer.rates(x)[0].unflatten(-1, (2, 2)).unbind(1)  # [T, H]
    memory = torch.zeros(2, width, width, dtype=torch.float64)
    for t in range(30):
        write = torch.einsum("hr,hd->hrd", value[t], key[t])
        memory = retention[t].sigmoid()[:, None, None] * memory + 2 * lr[t].sigmoid()[:, None, None] * write
    change = layer(x)[1]["stack"]["change"][0]
    torch.testing.assert_close(change, memory, rtol=1e-3, atol=1e-4)
    assert memory.norm() > 2  # so much that erasing would show


@pytest.mark.parametrize(("layer", "kept"), [(Keeping, True), (SelfModifyingTitans, False)])
def test_keeping_loses_nothing_that_is_not_overwritten(layer, kept):
    torch.manual_seed(0)
    layer = layer(8, 2)
    state = layer(torch.randn(1, 20, 8))[1]
    with torch.no_grad():
        layer.rates.bias[:2] = -1e4  # b = 0: nothing is written, nothing erased
    after = layer(torch.randn(1, 40, 8), state)[1]["stack"]["change"]
    assert torch.allclose(after, state["stack"]["change"], rtol=1e-5) == kept


@pytest.mark.parametrize(("layer", "most"), [(Approaching, 1.0), (SelfModifyingTitans, 2.0)])
def test_the_strongest_write_is_1_without_reflections_and_2_with(layer, most):
    """One token, written into an empty memory, changes what is read at its key by b (v̂ − M₀ k)."""
    torch.manual_seed(0)
    layer = layer(4, 1, adapt=()).double()
    changes = []
    with torch.no_grad():
        layer.rates.weight.zero_()
        for rate in (0.0, 1e4):  # σ of it is 1/2, and 1
            layer.rates.bias[0] = rate
            changes.append(layer(torch.ones(1, 1, 4).double())[1]["stack"]["change"])
    half, full = changes
    torch.testing.assert_close(full, 2 * half)
    key = F.normalize(F.silu(layer.key(torch.ones(4).double()) * layer.conv[4:8, -1]), dim=0)
    value = F.silu(layer.value(torch.ones(4).double()) * layer.conv[8:, -1])
    initial = layer._initial()[0]
    error = initial @ value / (1 + (initial @ value).square().sum()).sqrt() - initial @ key
    torch.testing.assert_close(full[0, 0] @ key, most * error, rtol=1e-4, atol=1e-5)


def test_without_levels_nothing_but_the_titans_learns_in_context():
    model = VARIANTS["hope - CMS"](11, 16, 1)
    before, after = (model(torch.randint(11, (1, length)))[1]["0"] for length in (20, 60))
    assert before["memory"].keys() == after["memory"].keys()
    for level in after["memory"].values():
        assert not any(weights.any() for weights in level.get("written", {}).values())
    assert before["mixer"]["stack"]["change"].any()
    levels = VARIANTS["hope (whole)"](11, 16, 1)(torch.randint(11, (1, 60)))[1]["0"]["memory"]
    assert all(any(weights.any() for weights in level["written"].values()) for level in levels.values())
