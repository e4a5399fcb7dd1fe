"""create_optimizer: what a name and a model become, and what is refused in words."""

import inspect

import pytest
import torch
from torch import nn

import deep_optim
from deep_optim import MultiFrequency, create_optimizer, list_optimizers, param_groups
from problem import make_model, model_loss


def classes() -> dict[str, type[torch.optim.Optimizer]]:
    """Every public optimizer but MultiFrequency, which wraps one."""
    public = {name: getattr(deep_optim, name) for name in deep_optim.__all__}
    return {
        name: cls
        for name, cls in public.items()
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not MultiFrequency
    }


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_the_names_are_those_of_the_public_classes() -> None:
    assert list_optimizers() == sorted(classes())


@pytest.mark.parametrize("name", sorted(classes()))
def test_it_is_the_class_with_the_routing_and_the_inputs(name: str) -> None:
    """The same groups as by hand; a step works without any other call; detaching leaves a bare model."""
    model = make_model()
    optimizer = create_optimizer(name, model, lr=0.25, adamw=[nn.Conv2d], weight_decay=0.5)
    assert type(optimizer) is classes()[name]
    expected = param_groups(model, adamw=[nn.Conv2d], weight_decay=0.5)
    for group, wanted in zip(optimizer.param_groups, expected, strict=True):
        assert [*zip(group["param_names"], group["params"], strict=True)] == wanted["params"]
        assert {key: group[key] for key in ("rule", "weight_decay", "split")} == {
            key: wanted[key] for key in ("rule", "weight_decay", "split")
        }
        assert group["lr"] == 0.25
    before = model[2].weight.detach().clone()
    model_loss(model, 0).backward()
    optimizer.step()
    assert not torch.equal(model[2].weight, before)
    if hasattr(optimizer, "inputs"):
        optimizer.inputs.remove()
    assert hooks(model) == 0


def test_the_class_decides_what_is_not_said() -> None:
    optimizer = create_optimizer("Momentum", make_model())
    defaults = {name: each.default for name, each in inspect.signature(deep_optim.Momentum).parameters.items()}
    del defaults["params"]
    assert optimizer.defaults == defaults
    assert optimizer.param_groups[0]["weight_decay"] == defaults["weight_decay"]


def test_hyper_parameters_reach_the_class_and_the_capture() -> None:
    optimizer = create_optimizer("delta_momentum", make_model(), inner_lr=0.125, side="left", split={"2": 5})
    assert (optimizer.param_groups[0]["inner_lr"], optimizer.param_groups[0]["side"]) == (0.125, "left")
    assert optimizer.param_groups[0]["split"] == 5
    optimizer = create_optimizer("dgd", make_model(), every=3)
    assert optimizer.inputs._every == 3


def test_only_what_has_a_memory_is_watched() -> None:
    """The head, AdamW's, costs no Gram."""
    model = make_model()
    create_optimizer("DGD", model)
    assert [layer for layer in model if layer._forward_hooks] == [model[0], model[2]]


@pytest.mark.parametrize("name", ["dmgd", "DELTA-MOMENTUM", "delta_momentum", "m3"])
def test_case_and_joints_do_not_matter(name: str) -> None:
    assert type(create_optimizer(name, make_model())).__name__ in ("DMGD", "DeltaMomentum", "M3")


def test_an_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(
        ValueError, match=r"no optimizer called 'Momentun'; did you mean Momentum\b.*there are DGD, DMGD"
    ):
        create_optimizer("Momentun", make_model())
    with pytest.raises(ValueError, match="no optimizer called 'xyz'; there are DGD"):
        create_optimizer("xyz", make_model())


def test_an_unknown_option_lists_the_valid_ones() -> None:
    words = r"Momentum has no option 'momentun' \(did you mean 'momentum'\?\) or 'zzz'; valid are .*momentum, .*adamw"
    with pytest.raises(TypeError, match=words):
        create_optimizer("Momentum", make_model(), momentun=0.9, zzz=1)
    with pytest.raises(TypeError, match="no option 'every'"):
        create_optimizer("Momentum", make_model(), every=4)  # which takes no inputs
    with pytest.raises(TypeError, match="no option 'params'"):
        create_optimizer("Momentum", make_model(), params=[])


def test_what_the_class_refuses_leaves_no_hook() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="Invalid rho"):
        create_optimizer("DGD", model, rho=-1.0)
    assert hooks(model) == 0
