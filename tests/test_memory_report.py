"""The report against the objective in float64, and against the step it foretells."""

import math
from functools import partial

import pytest
import torch

import deep_optim
from deep_optim.ops.feature_map import feature_map
from deep_optim.ops.mlp_memory import sigmoid
from problem import make_params, set_grads, snapshot, train

DMGD = partial(deep_optim.DMGD, hidden_dim=16)  # by default there are none
NAMES = ("memory.linear", "memory.w1", "memory.w2")


def objective(state, grad, inner_lr):
    """‖[M | W₁] Φᵀ − c I‖² / ‖c I‖², with the r × r identity spelt out."""
    wide = grad.shape[0] < grad.shape[1]
    linear, w1, w2 = ((state[name].mT if wide else state[name]).squeeze(0) for name in NAMES)
    keys = feature_map(grad, "soft_rows")
    keys = keys.mT if wide else keys
    r, p = keys.shape
    hidden = sigmoid(math.sqrt(r * p) * keys @ w2.mT / keys.norm()) * keys.norm() / math.sqrt(r * w2.shape[0])
    features = torch.cat([keys, hidden], 1)
    size = features.norm()
    bound = torch.linalg.svdvals(features / size).pow(8).sum() ** 0.25
    target = size * bound.sqrt() / inner_lr * torch.eye(r, dtype=keys.dtype)
    answers = torch.cat([linear, w1], 1) @ (features / size / bound.sqrt()).mT
    return ((answers - target).square().sum() / target.square().sum()).item()


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=["tall", "wide"])
@pytest.mark.parametrize("options", [{}, {"output": "adam"}, {"maximize": True}, {"hidden_lr": 0.1}], ids=str)
def test_foretells_the_step_and_changes_nothing(shape, options):
    (param,) = params = make_params([shape], torch.float64)
    optimizer = DMGD(params, hidden_dim=3, weight_decay=0.0, **options)
    train(optimizer, params, range(3))
    set_grads(params, 3)
    before = snapshot(params), {name: value.clone() for name, value in optimizer.state[param].items()}
    (report,) = optimizer.memory_report().values()
    assert torch.equal(param, before[0][0])
    assert all(torch.equal(optimizer.state[param][name], value) for name, value in before[1].items())
    ascent = -param.grad if options.get("maximize") else param.grad
    assert report.loss_before == pytest.approx(objective(optimizer.state[param], ascent, 0.5))
    norms = [before[1][name].norm().item() for name in NAMES] + [param.grad.norm().item()]
    assert norms == pytest.approx([report.linear_norm, report.w1_norm, report.w2_norm, report.gradient_norm])
    optimizer.step()
    assert report.loss_after == pytest.approx(objective(optimizer.state[param], ascent, 0.5))
    assert report.explained == pytest.approx(1 - report.loss_after)  # 7 features could answer for all 6 keys
    moved = before[0][0] - param.detach()
    cosine = (moved * param.grad).sum() / moved.norm() / param.grad.norm()
    assert (-cosine if options.get("maximize") else cosine).item() == pytest.approx(report.cosine, abs=1e-6)


def test_a_memory_that_sees_the_same_gradient_again_learns_it():
    """From the loss of an empty memory, 1, down at every step."""
    params = make_params([(32, 8)], torch.float64)
    optimizer = DMGD(params, hidden_dim=4, inner_steps=1)
    reports = []
    for _ in range(30):
        set_grads(params, 0)
        reports.append(optimizer.memory_report()["0"])
        optimizer.step()
    assert reports[0].loss_before == 1.0 and reports[0].linear_norm == 0.0
    assert all(report.loss_after < report.loss_before for report in reports)
    assert 0.4 < reports[-1].explained <= 1


def test_names_parameters_and_leaves_out_what_has_no_memory_or_no_gradient():
    weight, bias, idle = make_params([(4, 3), (4,), (2, 2)])
    optimizer = DMGD([("layer.weight", weight), ("layer.bias", bias), ("idle", idle)])
    set_grads([weight, bias], 0)
    assert set(optimizer.memory_report()) == {"layer.weight"}
    assert not optimizer.state  # asking creates no state
    unnamed = DMGD([bias, weight])
    assert set(unnamed.memory_report()) == {"1"}


def test_a_memory_without_inner_lr_has_no_target_to_miss():
    params = make_params([(4, 3)])
    optimizer = DMGD(params, inner_lr=0.0)
    set_grads(params, 0)
    assert optimizer.memory_report()["0"].loss_before == 1.0


def test_a_zero_gradient_has_no_keys_to_answer():
    params = make_params([(4, 3)])
    optimizer = DMGD(params)
    for grad in (torch.zeros(4, 3), torch.ones(4, 3), torch.zeros(4, 3)):
        params[0].grad = grad
        report = optimizer.memory_report()["0"]
        assert all(map(math.isfinite, report))
        optimizer.step()
    assert report.loss_before == report.loss_after == 1.0 and report.cosine == 0.0 and report.linear_norm > 0


@pytest.mark.parametrize("shape", [(12, 4), (4, 12)], ids=["tall", "wide"])
def test_blocks_of_rows_are_reported_together(shape):
    """Losses are the mean over the blocks, norms those of all; the cosine is that of the whole matrix."""
    (param,) = params = make_params([shape], torch.float64)
    optimizer = DMGD([{"params": params, "split": 2}], hidden_dim=3, weight_decay=0.0)
    blocks = [torch.nn.Parameter(block.clone()) for block in param.detach().chunk(2)]
    apart = DMGD(blocks, hidden_dim=3)
    for step in range(3):
        set_grads(params, step)
        for block, grad in zip(blocks, param.grad.chunk(2), strict=True):
            grad /= grad.norm()  # of one size, in the parameter's gradient too
            block.grad = grad.clone()
        report, reports = optimizer.memory_report()["0"], list(apart.memory_report().values())
        before = param.detach().clone()
        optimizer.step()
        apart.step()
    for name in ("loss_before", "loss_after", "explained"):
        assert getattr(report, name) == pytest.approx(sum(getattr(each, name) for each in reports) / 2)
    for name in ("linear_norm", "w1_norm", "w2_norm", "gradient_norm"):
        assert getattr(report, name) == pytest.approx(math.hypot(*(getattr(each, name) for each in reports)))
    moved = before - param.detach()
    assert report.cosine == pytest.approx(((moved * param.grad).sum() / moved.norm() / param.grad.norm()).item())


@pytest.mark.parametrize("shape, hidden_dim, answerable", [((32, 4), 3, 7), ((4, 32), 3, 7), ((6, 4), 16, 6)], ids=str)
def test_explained_is_the_share_of_what_the_features_could_answer(shape, hidden_dim, answerable):
    params = make_params([shape], torch.float64)
    optimizer = DMGD(params, hidden_dim=hidden_dim)
    for step in range(3):
        set_grads(params, step)
        report = optimizer.memory_report()["0"]
        optimizer.step()
    assert report.explained == pytest.approx((1 - report.loss_after) * max(shape) / answerable)
    assert 0 < report.explained < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_gradients_are_reported_in_float32(dtype):
    """What is reported is what a float32 parameter with these gradients would report, to the last digit."""
    params = make_params([(6, 4)], dtype)
    twins = [torch.nn.Parameter(param.detach().float()) for param in params]
    optimizers = DMGD(params), DMGD(twins)
    for step in range(2):
        set_grads(params, step)
        twins[0].grad = params[0].grad.float()
        reports = [optimizer.memory_report()["0"] for optimizer in optimizers]
        for optimizer in optimizers:
            optimizer.step()
        assert reports[0] == reports[1]


def test_foretells_the_first_step_of_adam():
    """Its second moment starts at zero, and is corrected for the step that is foretold."""
    (param,) = params = make_params([(6, 4)], torch.float64)
    optimizer = DMGD(params, output="adam", weight_decay=0.0)
    set_grads(params, 0)
    before = param.detach().clone()
    report = optimizer.memory_report()["0"]
    optimizer.step()
    moved = before - param.detach()
    cosine = (moved * param.grad).sum() / moved.norm() / param.grad.norm()
    assert report.cosine == pytest.approx(cosine.item(), abs=1e-6)


def test_counts_positions_and_names_over_all_groups():
    params = make_params([(4,), (4, 3), (3,), (5, 2), (2, 3)])
    groups = [{"params": params[:2]}, {"params": params[2:4]}, {"params": params[4:], "rule": "adamw"}]
    set_grads(params, 0)
    assert list(DMGD(groups).memory_report()) == ["1", "3"]
    names = [f"layer.{index}" for index in range(5)]
    named = [group | {"params": []} for group in groups]
    for index, param in enumerate(params):
        named[(0, 0, 1, 1, 2)[index]]["params"].append((names[index], param))
    assert list(DMGD(named).memory_report()) == ["layer.1", "layer.3"]


def test_each_group_is_reported_with_its_own_values():
    params, copies = make_params([(6, 4), (6, 4)], torch.float64), make_params([(6, 4), (6, 4)], torch.float64)
    values = [{"inner_lr": 0.1, "hidden_dim": 2}, {"inner_lr": 0.4, "nesterov": False, "output": "identity"}]
    together = DMGD([{"params": [param], **value} for param, value in zip(params, values, strict=True)])
    apart = [DMGD([param], **value) for param, value in zip(copies, values, strict=True)]
    for step in range(2):
        set_grads(params, step)
        set_grads(copies, step)
        reports = together.memory_report()
        assert list(reports.values()) == [optimizer.memory_report()["0"] for optimizer in apart]
        for optimizer in (together, *apart):
            optimizer.step()


def test_blocks_of_unequal_size_share_one_angle():
    """The angle is that of the whole parameter, however its norm is spread over the blocks."""
    (param,) = params = make_params([(8, 3)], torch.float64)
    optimizer = DMGD([{"params": params, "split": 2}], hidden_dim=2, weight_decay=0.0)
    set_grads(params, 0)
    param.grad[:4] *= 100
    before = param.detach().clone()
    report = optimizer.memory_report()["0"]
    optimizer.step()
    moved = before - param.detach()
    expected = (moved * param.grad).sum() / moved.norm() / param.grad.norm()
    assert report.cosine == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_of_any_size_are_told(scale):
    params = make_params([(6, 4)])
    optimizer = DMGD(params)
    for step in range(2):
        set_grads(params, step)
        params[0].grad *= scale
        report = optimizer.memory_report()["0"]
        optimizer.step()
    assert 0 < report.linear_norm < math.inf and 0 < report.w1_norm < math.inf
    assert report.gradient_norm == pytest.approx(params[0].grad.double().norm().item())


def test_a_nan_in_the_gradient_shows_in_the_report():
    params = make_params([(4, 3)])
    params[0].grad = torch.full((4, 3), math.nan)
    assert math.isnan(DMGD(params).memory_report()["0"].loss_before)


def test_refuses_a_sparse_gradient_in_the_optimizers_words():
    params = make_params([(4, 3)])
    params[0].grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(RuntimeError, match="DMGD does not support sparse gradients"):
        DMGD(params).memory_report()
