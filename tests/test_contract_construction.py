"""What every optimizer owes whoever constructs it: torch's arguments, torch's words, nothing accepted by mistake."""

import inspect
import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import get_error_inputs_for_all_optims

from cases import LR, Case, every
from deep_optim import MultiFrequency
from problem import SHAPES, assert_same, copy_params, make_params, snapshot, train

TAIL = {"foreach": None, "maximize": False, "capturable": False, "differentiable": False, "fused": None}


@every()
@pytest.mark.parametrize(
    "error", get_error_inputs_for_all_optims("cpu", torch.float32), ids=lambda error: error.optimizer_error_input.desc
)
def test_refuses_what_torch_asks_every_optimizer_to_refuse(case: Case, error: Any) -> None:
    """PyTorch's own table of bad arguments, in its words."""
    bad = error.optimizer_error_input
    is_warning = issubclass(error.error_type, Warning)
    expect = pytest.warns if is_warning else pytest.raises
    params = bad.params  # the table is shared, and an optimizer completes the groups that it is given
    if isinstance(params, list):
        params = [dict(each) if isinstance(each, dict) else each for each in params]
    with expect(error.error_type, match=error.error_regex):
        case.make(params, **bad.kwargs)


@every()
@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ([], ValueError, "optimizer got an empty parameter list"),
        ([{"params": {torch.zeros(2, 2), torch.ones(2, 2)}}], TypeError, "need to be organized in ordered collections"),
        ([torch.zeros(2, 2, requires_grad=True) * 2], ValueError, "can't optimize a non-leaf Tensor"),
        ([3.0], TypeError, "optimizer can only optimize Tensors"),
    ],
    ids=["empty", "set", "non-leaf", "float"],
)
def test_refuses_what_are_no_parameters(case: Case, params: Any, error: type[Exception], words: str) -> None:
    """The base class answers for `params`."""
    with pytest.raises(error, match=words):
        case.make(params)


@every()
def test_takes_a_generator_and_leaves_the_callers_list_alone(case: Case) -> None:
    """`model.parameters()` is a generator; a list belongs to its owner."""
    params = make_params()
    given = list(params)
    assert case.make(given).param_groups[0]["params"] is not given
    assert len(given) == len(params)
    assert len(case.make(param for param in params).param_groups[0]["params"]) == len(params)


def bad_values(name: str, default: Any) -> list[tuple[Any, str]]:
    """Return values that no optimizer may accept for a keyword with this default, and torch's words for each."""
    if name == "lr":
        return [(lr, f"Invalid learning rate: {lr}") for x in (-1.0, math.nan) for lr in (x, torch.tensor(x))]
    if name in ("eps", "adamw_eps"):
        return [(value, f"Invalid epsilon value: {value}") for value in (-1.0, math.nan)]
    if name.endswith("betas"):
        bad = [((1.0, 0.9), 0), ((-0.1, 0.9), 0), ((math.nan, 0.9), 0), ((0.9, 1.0), 1), ((0.9, math.nan), 1)]
        return [(betas, f"Invalid beta parameter at index {index}: {betas[index]}") for betas, index in bad]
    if isinstance(default, str):
        return [("nonsense", "nonsense")]
    if isinstance(default, int | float) and not isinstance(default, bool):
        return [(value, f"Invalid {name} value: {value}") for value in (-1, math.nan)]
    return []


def offer(case: Case, place: str, **bad: Any) -> None:
    """Hand over bad values in one of the three ways a group can reach an optimizer."""
    first, second = make_params(((2, 3), (3, 2)))
    if place == "constructor":
        case.make(None, **bad)  # the value is judged before the parameters are looked at
    elif place == "group":
        case.make([{"params": [first]}, {"params": [second], **bad}])
    else:
        case.make([first]).add_param_group({"params": [second], **bad})


def refuses(case: Case, place: str) -> None:
    judged = 0
    for name, default in case.defaults().items():
        for value, words in bad_values(name, default):
            with pytest.raises(ValueError) as caught:
                offer(case, place, **{name: value})
            assert words in str(caught.value), f"{name}={value!r}: {caught.value}"
            judged += 1
    assert judged > 8, "no keyword was judged"


@every("class")
def test_constructor_refuses_bad_values_before_it_looks_at_the_parameters(case: Case) -> None:
    """Negative, NaN, out of range, or an unknown word, for every keyword there is."""
    refuses(case, "constructor")


@every("class", beyond_torch="checks the constructor's values alone")
@pytest.mark.parametrize("place", ["group", "late group"])
def test_groups_are_judged_like_the_constructor(case: Case, place: str) -> None:
    """A group passes the same checks, at construction and in a later add_param_group."""
    refuses(case, place)


@every(beyond_torch="accepts the bad group")
def test_a_group_with_a_bad_value_changes_nothing(case: Case) -> None:
    """Whoever catches the error goes on with the optimizer it had."""
    params = make_params()
    optimizer, twin = case.make(params[:-1]), case.make(copies := copy_params(params[:-1]))
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [params[-1]], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    assert_same(train(optimizer, params[:-1], range(3)), train(twin, copies, range(3)))
    optimizer.add_param_group({"params": [params[-1]]})  # the parameter was not claimed either


@every()
def test_a_group_with_a_taken_parameter_changes_nothing(case: Case) -> None:
    """The same holds when it is torch's base class that refuses."""
    params = make_params()
    optimizer = case.make(params)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [params[0]]})
    assert len(optimizer.param_groups) == 1


@every("class")
def test_refuses_fused_together_with_foreach(case: Case) -> None:
    """Two implementations cannot both be chosen."""
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        case.make(make_params(), fused=True, foreach=True)


@every("class")
def test_refuses_a_tensor_lr_with_plain_foreach(case: Case) -> None:
    """Torch's foreach kernels read the rate on the host."""
    with pytest.raises(ValueError, match="lr as a Tensor is not supported for capturable=False and foreach=True"):
        case.make(make_params(), lr=torch.tensor(LR), foreach=True)


@every("class", beyond_torch="is differentiable")
def test_refuses_differentiable_in_words(case: Case) -> None:
    """A step that autograd cannot follow says so, instead of returning wrong gradients."""
    with pytest.raises(RuntimeError, match="differentiable"):
        case.make(make_params(), differentiable=True)


@every("class")
def test_signature_ends_like_torchs(case: Case) -> None:
    """Trainers pass these five by keyword."""
    parameters = inspect.signature(case.cls).parameters
    assert {name: parameters[name].default for name in TAIL} == TAIL
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in TAIL)
    assert next(iter(parameters)) == "params" and parameters["lr"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert issubclass(case.cls, Optimizer)


@every("class")
def test_every_keyword_is_a_group_default(case: Case) -> None:
    """A knob outside `defaults` could not be set per group and would be lost by pickle."""
    group = case.make(make_params()).param_groups[0]
    assert set(case.defaults()) <= set(group)


@every(beyond_torch="its defaults hold decoupled_weight_decay, which its constructor does not take", raises=TypeError)
def test_defaults_build_the_same_optimizer(case: Case) -> None:
    """ZeroRedundancyOptimizer and Lightning call cls(params, **defaults)."""
    params = make_params()
    optimizer = case.make(params)
    twin = case.cls(case.groups(copies := copy_params(params)), **optimizer.defaults)
    assert_same(train(optimizer, params, range(3)), train(twin, copies, range(3)))


@every()
def test_keeps_nothing_of_its_own_on_the_instance(case: Case) -> None:
    """Pickle and deepcopy carry `defaults`, `state` and `param_groups` and nothing else."""
    optimizer = case.make(params := make_params())
    train(optimizer, params, range(2))
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    wraps = isinstance(optimizer, MultiFrequency)  # and carries what it wraps
    kept = {"optimizer", "reduction"} if wraps else {"defaults", "state", "param_groups"}
    assert public == kept == {n for n in vars(deepcopy(optimizer)) if n[0] != "_"}


@every()
def test_repr_names_the_class_and_its_values(case: Case) -> None:
    """What a log shows."""
    text = repr(case.make(make_params()))
    assert text.startswith(case.cls.__name__) and f"lr: {LR}" in text


@every()
def test_unknown_keys_of_a_group_are_kept(case: Case) -> None:
    """Trainers mark their groups ("name", "initial_lr") and read the marks back."""
    optimizer = case.make([{"params": make_params(), "name": "decay"}])
    assert optimizer.param_groups[0]["name"] == "decay"


@every()
def test_named_parameters_keep_their_names(case: Case) -> None:
    """Names reach the groups and the state dict; without names there is no such key."""
    params = make_params()
    names = [f"layer.{index}" for index in range(len(params))]
    named, unnamed = case.make(zip(names, params, strict=True)), case.make(copies := copy_params(params))
    assert named.param_groups[0]["param_names"] == names == named.state_dict()["param_groups"][0]["param_names"]
    assert "param_names" not in unnamed.state_dict()["param_groups"][0]
    assert_same(train(named, params, range(2)), train(unnamed, copies, range(2)))


@every()
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=["0-d", "1-d", "2-d"])
def test_a_tensor_lr_means_what_the_float_means(case: Case, shape: tuple[int, ...]) -> None:
    """One element of any rank; float64, so that no rounding stands between the two."""
    params = make_params(dtype=torch.float64)
    lr = torch.full(shape, LR, dtype=torch.float64)
    ours, theirs = case.make(copies := copy_params(params), lr=lr), case.make(params)
    assert_same(train(ours, copies, range(3)), train(theirs, params, range(3)))


@every()
def test_a_tensor_lr_stays_the_users_tensor(case: Case) -> None:
    """Schedulers fill it in place, and the next step must see it."""
    params = make_params()
    lr = torch.tensor(LR)
    optimizer = case.make(params, lr=lr)
    train(optimizer, params, range(1))
    assert optimizer.param_groups[0]["lr"] is lr and lr.item() == LR
    lr.fill_(0.0)
    before = snapshot(params)
    assert_same(train(optimizer, params, range(1, 2)), before)


@every("class")
def test_capturable_on_the_cpu_works_or_is_refused_in_words(case: Case) -> None:
    """Torch asserts; an optimizer that can run must then run the same."""
    params = make_params(SHAPES)
    try:
        stepped = train(case.make(copies := copy_params(params), capturable=True), copies, range(2))
    except (AssertionError, RuntimeError) as refusal:
        assert "capturable" in str(refusal)
    else:
        torch.testing.assert_close(stepped, train(case.make(params), params, range(2)))
