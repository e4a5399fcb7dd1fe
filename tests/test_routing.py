"""param_groups: every parameter once, and the right ones in the memory."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deep_optim.routing import param_groups
from routed_models import GPT, D, ResNet, ViT, assert_covers_once, matrices, memory, named


@pytest.mark.parametrize("make", [GPT, ViT, ResNet, lambda: GPT(tied=True)], ids=["gpt", "vit", "resnet", "tied"])
def test_every_parameter_is_in_one_group_under_its_own_name(make: Any) -> None:
    model = make()
    assert_covers_once(model, param_groups(model))


@pytest.mark.parametrize("tied", [False, True])
def test_gpt(tied: bool) -> None:
    """A tied weight is the embedding's: it is counted once, by the embedding's rule."""
    model = GPT(tied)
    assert memory(model) == {name for name in matrices(model) if name.startswith("blocks")}


def test_vit() -> None:
    """Only the last layer of a head is an output layer; the patch convolution is a matrix like any other."""
    model = ViT()
    assert memory(model) == matrices(model) - {"cls_token", "heads.3.weight"}


def test_resnet() -> None:
    model = ResNet()
    assert memory(model) == matrices(model) - {"fc.weight"}


def test_weight_decay_spares_vectors_and_norms_alone() -> None:
    model = nn.ModuleDict({"vit": ViT(), "image_norm": nn.LayerNorm([3, 4]), "scale": nn.PReLU(3)})
    model["vit"].register_parameter("table", nn.Parameter(torch.zeros(1, 5, D)))
    groups = param_groups(model, weight_decay=0.3)
    spared = {name for name, param in model.named_parameters() if param.ndim < 2}
    assert named(groups, weight_decay=0.0) == spared | {"vit.cls_token", "image_norm.weight", "image_norm.bias"}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    assert named(groups, rule="memory", weight_decay=0.0) == set()


def test_groups_with_equal_values_are_one() -> None:
    assert [group["rule"] for group in param_groups(GPT(), weight_decay=0.0)] == ["memory", "adamw"]


def test_order_is_the_models_and_the_same_for_a_copy() -> None:
    """A checkpoint addresses parameters by their position."""
    model = ViT()
    order = [[name for name, _ in group["params"]] for group in param_groups(model)]
    assert order == [[name for name, _ in group["params"]] for group in param_groups(copy.deepcopy(model))]
    position = list(dict(model.named_parameters()))
    assert all(names == sorted(names, key=position.index) for names in order)
    keys = [(group["rule"], group["split"], group["weight_decay"]) for group in param_groups(model)]
    assert keys == [("memory", 3, 0.01), ("memory", 1, 0.01), ("adamw", 1, 0.01), ("adamw", 1, 0.0)]


def test_names_reach_the_optimizer() -> None:
    optimizer = torch.optim.AdamW(param_groups(GPT()))
    assert all(isinstance(param, nn.Parameter) for group in optimizer.param_groups for param in group["params"])
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(dict(GPT().named_parameters()))


def test_frozen_parameters_are_left_out() -> None:
    model = GPT()
    model.blocks[0].requires_grad_(False)
    groups = param_groups(model, adamw=["blocks.0.mlp"], split={"blocks.0.attn.qkv": 3})
    assert_covers_once(model, groups)
    assert not any(name.startswith("blocks.0") for name in named(groups))


def test_lora_adapters_are_matrices_until_they_are_named() -> None:
    class LoRALinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(D, D).requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(D, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, D, bias=False)})

    model = nn.ModuleDict({"q": LoRALinear(), "v": LoRALinear(), "head": nn.Linear(D, 3)})
    assert memory(model) == matrices(model) - {"q.base.weight", "v.base.weight", "head.weight"}
    with pytest.warns(UserWarning, match="no parameter has a memory"):
        assert memory(model, adamw=["lora_A", "lora_B"]) == set()


class WithHooks(nn.Module):
    """A model whose head has a name that tells nothing and is not registered last."""

    def __init__(self, hook: str, answer: Any) -> None:
        super().__init__()
        self.out = nn.Linear(D, 20)
        self.aux = nn.Linear(D, 20)
        self.layers = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
        setattr(self, hook, lambda: answer(self))


@pytest.mark.parametrize("hook", ["get_output_embeddings", "get_classifier"])
@pytest.mark.parametrize(
    "answer, heads",
    [
        (lambda model: model.out, {"out.weight"}),
        (lambda model: (model.out, model.aux), {"out.weight", "aux.weight"}),
        (lambda model: None, {"layers.1.weight"}),  # no answer: the last layer
        (lambda model: nn.Sequential(nn.Dropout(), model.out), {"out.weight"}),
        (lambda model: "linear", {"layers.1.weight"}),  # a method of the same name that answers something else
        (lambda model: nn.Identity(), set()),  # a model that says that it has no head
    ],
    ids=["module", "tuple", "none", "nested", "string", "identity"],
)
def test_a_model_may_name_its_head(hook: str, answer: Any, heads: set[str]) -> None:
    for model in (WithHooks(hook, answer), nn.ModuleDict({"wrapped": WithHooks(hook, answer)})):
        assert {name.removeprefix("wrapped.") for name in matrices(model) - memory(model)} == heads


def test_a_tied_weight_keeps_the_strictest_rule() -> None:
    """It has a memory if that suits all its places, and decays if that suits them all."""
    model = nn.ModuleDict({"hidden": nn.Linear(D, D), "first": nn.Linear(4, 3), "norm": nn.LayerNorm([3, 4])})
    model["other"], model["head"] = nn.Linear(D, D), nn.Linear(D, D)
    model["head"].weight = model["hidden"].weight
    model["norm"].weight = model["first"].weight
    assert named(param_groups(model), rule="adamw", weight_decay=0.01) == {"hidden.weight"}
    assert "first.weight" in named(param_groups(model), weight_decay=0.0)


def test_a_tied_layer_is_the_head_and_the_last_layer_is_not() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(20, D), "out": nn.Linear(D, 20), "hidden": nn.Linear(D, D)})
    model["out"].weight = model["embed"].weight
    assert memory(model) == {"hidden.weight"}


@pytest.mark.parametrize("name", ["head", "heads", "lm_head", "value_head", "classifier", "to_logits"])
def test_head_by_name_wherever_it_is_registered(name: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(D, 3), "hidden": nn.Linear(D, D)})
    for wrapped in (model, nn.ModuleDict({"stage2": model})):
        assert {key.removeprefix("stage2.") for key in memory(wrapped)} == {"hidden.weight"}


@pytest.mark.parametrize("name", ["ahead", "header", "conv_head", "head_norm", "classifiers"])
def test_what_is_no_heads_name(name: str) -> None:
    assert f"{name}.weight" in memory(nn.ModuleDict({name: nn.Linear(D, D), "out": nn.Linear(D, 3)}))


def test_several_heads_side_by_side() -> None:
    model = nn.ModuleDict({"policy_head": nn.Linear(D, 3), "value_head": nn.Linear(D, 1), "body": nn.Linear(D, D)})
    assert memory(model) == {"body.weight"}


def test_heads_inside_blocks_are_hidden() -> None:
    """Numbered modules repeat, and of the others the outermost are meant."""
    block = nn.ModuleDict({"head": nn.Linear(D, D)})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block]), "block": copy.deepcopy(block), "head": nn.Linear(D, 3)})
    assert memory(model) == {"blocks.0.head.weight", "block.head.weight"}
    model = nn.ModuleDict({"blocks": nn.ModuleList([block]), "hidden": nn.Linear(D, D), "out": nn.Linear(D, 3)})
    assert memory(model) == {"blocks.0.head.weight", "hidden.weight"}


def test_a_head_without_layers_is_none() -> None:
    model = nn.ModuleDict({"head": nn.LayerNorm([3, D]), "hidden": nn.Linear(D, D), "out": nn.Linear(D, 3)})
    assert memory(model) == {"hidden.weight"}


def test_last_layer_may_be_a_convolution() -> None:
    model = nn.Sequential(
        nn.Linear(D, D), nn.ConvTranspose2d(D, D, 3), nn.Conv2d(D, 3, 1), nn.Embedding(3, 3), nn.PReLU()
    )
    assert memory(model) == {"0.weight", "1.weight"}


def test_kind_is_read_off_the_class_and_its_bases() -> None:
    class Table(nn.Embedding):
        pass

    class VocabParallelEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(9, D))

    class PatchEmbedding(nn.Conv2d):
        pass

    class WeightNorm(nn.Linear):
        pass

    class CubeNorm2d(VocabParallelEmbedding):
        pass

    class ColumnParallelLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(9, D))
            self.gate = nn.Parameter(torch.zeros(9, D))

    class EmbeddingMixer(ColumnParallelLinear):
        pass

    model = nn.ModuleDict(
        {
            "table": Table(9, D),
            "bag": nn.EmbeddingBag(9, D),
            "vocab": VocabParallelEmbedding(),
            "norm": CubeNorm2d(),
            "patch": PatchEmbedding(3, D, 2),
            "linear": WeightNorm(D, D),
            "column": ColumnParallelLinear(),
            "mixer": EmbeddingMixer(),
            "bilinear": nn.Bilinear(D, D, D),
            "head": ColumnParallelLinear(),
        }
    )
    assert memory(model) == {"patch.weight", "linear.weight", "column.weight", "mixer.weight", "bilinear.weight"}
    assert "norm.weight" in named(param_groups(model), weight_decay=0.0)


def test_parametrized_weights_are_free_until_they_are_named() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3))
    nn.utils.parametrizations.weight_norm(model[0])
    assert memory(model) == {"1.weight"}
    assert memory(model, memory=["original1"]) == {"1.weight", "0.parametrizations.weight.original1"}


def test_vectors_alone_are_worth_a_warning() -> None:
    with pytest.warns(UserWarning, match="no parameter has a memory"):
        param_groups(nn.LayerNorm(3))


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(64, 2), "head": nn.Linear(64, 100)})
    param_groups(model)
    assert capsys.readouterr().out == ""
    param_groups(model, weight_decay=0.1, verbose=True)
    assert capsys.readouterr().out == (
        "name                  shape      rule    weight_decay  split       parameters\n"
        "attn.in_proj_weight   [192, 64]  memory  0.1           3               12,288\n"
        "attn.out_proj.weight  [64, 64]   memory  0.1           1                4,096\n"
        "head.weight           [100, 64]  adamw   0.1           1                6,400\n"
        "attn.in_proj_bias     [192]      adamw   0             1                  192\n"
        "attn.out_proj.bias    [64]       adamw   0             1                   64\n"
        "head.bias             [100]      adamw   0             1                  100\n"
        "total of 2                       memory                                16,384\n"
        "total of 4                       adamw                                  6,756\n"
    )


LEAVES = st.sampled_from(
    [
        lambda: nn.Linear(D, D),
        lambda: nn.Conv1d(D, D, 3, groups=2),
        lambda: nn.Embedding(D, D),
        lambda: nn.LayerNorm(D),
        lambda: nn.MultiheadAttention(D, 2),
        lambda: nn.GRUCell(D, D),
        lambda: nn.ParameterList([torch.zeros(2, 3), torch.zeros(3), torch.zeros(())]),
        lambda: nn.Linear(D, D).requires_grad_(False),
        nn.Identity,
    ]
).map(lambda make: make())
NAMES = st.sampled_from(["head", "fc", "attn", "embed", "0", "classifier", "output"])
TREES = st.recursive(LEAVES, lambda children: st.dictionaries(NAMES, children, max_size=4).map(nn.ModuleDict))


@pytest.mark.filterwarnings("ignore:no parameter has a memory")
@given(TREES, st.data())
def test_any_tree_of_modules_is_covered_once(model: nn.Module, data: st.DataObject) -> None:
    """Whatever is nested, tied or frozen; what has no rank of a matrix never has a memory."""
    owners = [module for module in model.modules() if "weight" in module._parameters]
    square = [module for module in owners if module.weight is not None and module.weight.shape == (D, D)]
    if len(square) > 1:
        first, second = (data.draw(st.sampled_from(square)) for _ in range(2))
        first.weight = second.weight
    if not any(param.requires_grad for param in model.parameters()):
        with pytest.raises(ValueError, match="no trainable parameters"):
            param_groups(model)
        return
    groups = param_groups(model)
    assert_covers_once(model, groups)
    assert all(param.ndim > 1 or group["rule"] == "adamw" for group in groups for _, param in group["params"])
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    assert not embedded & {id(param) for group in groups if group["rule"] == "memory" for _, param in group["params"]}
