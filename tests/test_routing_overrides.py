"""param_groups where the user decides: what is split, what is moved, and what is refused."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from deep_optim.routing import param_groups
from routed_models import GPT, D, ViT, memory, named


def test_fused_torch_modules_are_split_by_their_type() -> None:
    model = nn.ModuleDict(
        {
            "attn": nn.MultiheadAttention(D, 2, add_bias_kv=True),
            "cross": nn.MultiheadAttention(D, 2, kdim=5, vdim=6),
            "lstm": nn.LSTM(D, 4, proj_size=2),
            "gru": nn.GRU(D, 4),
            "rnn": nn.RNN(D, 4),
            "cell": nn.LSTMCell(D, 4),
            "head": nn.Linear(D, 3),
        }
    )
    groups = param_groups(model)
    assert named(groups, split=3) == {"attn.in_proj_weight", "gru.weight_ih_l0", "gru.weight_hh_l0"}
    assert named(groups, split=4) == {
        "lstm.weight_ih_l0", "lstm.weight_hh_l0", "cell.weight_ih", "cell.weight_hh",
    }  # fmt: skip
    assert named(groups, split=1, rule="memory") == {
        "attn.out_proj.weight", "cross.out_proj.weight", "lstm.weight_hr_l0", "rnn.weight_ih_l0", "rnn.weight_hh_l0",
        "cross.q_proj_weight", "cross.k_proj_weight", "cross.v_proj_weight",
    }  # fmt: skip


@pytest.mark.parametrize("key", ["qkv", "attn.qkv", "attn.qkv.weight", "attn"])
def test_split_matches_whole_parts_of_a_name(key: str) -> None:
    model = GPT()
    del model.blocks[1].attn["proj"], model.blocks[0].attn["proj"]
    groups = param_groups(model, split={key: 3})
    assert named(groups, split=3) == {"blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"}


def test_split_takes_several_keys_and_overrides_the_types() -> None:
    groups = param_groups(GPT(), split={"qkv": 3, "mlp.0": 4, "blocks.0.mlp.2": 2})
    assert {group["split"] for group in groups} == {1, 2, 3, 4}
    assert named(groups, split=2) == {"blocks.0.mlp.2.weight"}
    assert named(param_groups(ViT(), split={"in_proj_weight": 6}), split=3) == set()


def test_split_leaves_adamw_alone() -> None:
    groups = param_groups(GPT(), split={"lm_head": 3, "blocks.0.attn.qkv": 3}, adamw=["qkv"])
    assert {group["split"] for group in groups} == {1}


@pytest.mark.parametrize(
    "split, message",
    [
        ({"qvk": 3}, "no parameter's name contains 'qvk'; did you mean 'qkv'?"),
        ({"atn.qkv": 3}, "did you mean 'attn.qkv'"),
        ({"kv": 3}, "contains 'kv'"),
        ({"q": 3}, "contains 'q'"),
        ({"blocks.attn": 3}, "contains 'blocks.attn'"),
        ({"qkv": 5}, "'blocks.0.attn.qkv.weight' has 24 rows, which are not 5 equal blocks"),
        ({"qkv": 0}, "at least 1, got 0"),
        ({"qkv": 3.0}, "at least 1, got 3.0"),
        ({"qkv": 3, "attn.qkv": 6}, "'blocks.0.attn.qkv.weight' is asked for 3 and 6 blocks"),
    ],
    ids=str,
)
def test_split_errors(split: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        param_groups(GPT(), split=split)


def test_split_refuses_a_layer_stored_the_other_way_round() -> None:
    """Hugging Face's Conv1D keeps query, key and value in its columns; its rows would divide and train wrongly."""

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3 * D, 9 * D))

    model = nn.ModuleDict({"c_attn": Conv1D(), "head": nn.Linear(D, 3)})
    assert memory(model) == {"c_attn.weight"}
    with pytest.raises(ValueError, match="its blocks are columns"):
        param_groups(model, split={"c_attn": 3})


@pytest.mark.parametrize(
    "select",
    [
        lambda model: "blocks.0.mlp",
        lambda model: model.blocks[0].mlp,
        lambda model: nn.Sequential,
        lambda model: "mlp",
    ],
    ids=["path", "module", "type", "part"],
)
def test_adamw_takes_names_modules_and_types(select: Any) -> None:
    model = GPT()
    model.blocks[1].mlp = nn.Identity()
    moved = {"blocks.0.mlp.0.weight", "blocks.0.mlp.2.weight"}
    assert memory(model) - memory(model, adamw=[select(model)]) == moved


@pytest.mark.parametrize("select", [lambda model: "wpe", lambda model: model.wpe], ids=["name", "parameter"])
def test_memory_takes_a_free_parameter(select: Any) -> None:
    model = GPT()
    assert memory(model, memory=[select(model)]) == memory(model) | {"wpe"}


def test_memory_moves_matrices_only() -> None:
    model = ViT()
    before, after = param_groups(model), param_groups(model, memory=[model.encoder, "heads"])
    assert named(after, rule="memory") == named(before, rule="memory") | {"heads.3.weight"}


def test_an_alias_names_a_tied_parameter() -> None:
    assert "lm_head.weight" in memory(GPT(tied=True), memory=["wte"])
    block = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    model = nn.ModuleDict({"encoder": block, "decoder": block, "head": nn.Linear(D, 3)})
    assert memory(model, adamw=["decoder.0"]) == {"encoder.1.weight"}


@pytest.mark.parametrize("argument", ["adamw", "memory"])
@pytest.mark.parametrize(
    "selectors, error, message",
    [
        (["blcks"], ValueError, "no parameter's name contains 'blcks'; did you mean 'blocks'?"),
        ([""], ValueError, "contains ''"),
        ([nn.Linear(2, 2)], ValueError, "the model has no parameter in Linear"),
        ([nn.LSTM], ValueError, "the model has no parameter in <class"),
        ([nn.Parameter(torch.zeros(2, 2))], ValueError, "the model has no parameter in Parameter"),
        ([3], TypeError, "takes names, modules, module types or parameters, got 3"),
        ([int], TypeError, "takes names, modules, module types or parameters, got <class"),
        ("wpe", TypeError, "takes a list"),
        (nn.Sequential(nn.Linear(2, 2)), TypeError, "takes a list"),
        (nn.Linear, TypeError, "takes a list"),
        (nn.Parameter(torch.zeros(2, 2)), TypeError, "takes a list"),
    ],
    ids=str,
)
def test_override_errors(argument: str, selectors: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{argument}.*{re.escape(message)}"):
        param_groups(GPT(), **{argument: selectors})


def test_contradicting_overrides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"adamw and memory both claim 'blocks\.0\.attn\.proj\.weight'"):
        param_groups(GPT(), adamw=["blocks.0.attn.proj"], memory=["attn"])


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan")])
def test_weight_decay_is_checked(weight_decay: float) -> None:
    with pytest.raises(ValueError, match=f"Invalid weight_decay value: {weight_decay}"):
        param_groups(GPT(), weight_decay=weight_decay)


def test_what_cannot_be_routed_is_refused() -> None:
    class Hiding(nn.Linear):
        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
            return iter([self.weight])

    with pytest.raises(TypeError, match="takes a module, got generator"):
        param_groups(GPT().parameters())
    with pytest.raises(ValueError, match="no trainable parameters"):
        param_groups(GPT().requires_grad_(False))
    with pytest.raises(ValueError, match="not what the model's modules own"):
        param_groups(Hiding(3, 3))
    with pytest.raises(ValueError, match="uninitialized parameter"):
        param_groups(nn.LazyLinear(3))
