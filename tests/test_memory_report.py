"""The report against the objective in float64, and against the step it foretells."""

import math

import pytest
import torch

from deep_optim import DMGD
from deep_optim.ops.feature_map import feature_map
from deep_optim.ops.mlp_memory import sigmoid
from problem import make_params, set_grads, snapshot, train

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
    assert report.explained == pytest.approx((1 - report.loss_after) * 6 / 6 if 4 + 3 > 6 else 0)
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
