"""Delta gradient descent: its step against the argmin, its layer against the penalty, its optimizer against both."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deep_optim import DGD, Momentum, capture_inputs
from deep_optim.ops.dgd import dgd_step
from deep_optim.ops.dgd_linear import dgd_linear
from problem import SHAPES, make_params, snapshot, trained


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 100.0])
@pytest.mark.parametrize("length", [0.1, 1.0, 5.0])
def test_step_is_where_the_gradient_of_the_objective_vanishes(eta, length):
    """Eq. 56 by autograd, times eta so that its proximal term survives eta = 0."""
    weight, grad = draw(4, 3), draw(4, seed=1)
    key = length * F.normalize(draw(3, seed=2), dim=0)
    after = dgd_step(weight, key, grad, eta=eta).requires_grad_()
    objective = eta * 0.5 * (after @ key + grad).square().sum() + 0.5 * (after - weight).square().sum()
    (slope,) = torch.autograd.grad(objective, after)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12 * (1 + eta * length**2))


def test_the_printed_rate_holds_for_keys_of_length_one_only():
    weight, grad, key = draw(4, 3), draw(4, seed=1), F.normalize(draw(3, seed=2), dim=0)
    printed = lambda x, eta: weight - eta / (1 + eta) * torch.outer(weight @ x + grad, x)  # noqa: E731
    torch.testing.assert_close(dgd_step(weight, key, grad, eta=0.5), printed(key, 0.5))
    assert not torch.allclose(dgd_step(weight, 2 * key, grad, eta=0.5), printed(2 * key, 0.5), rtol=0.05)


def test_a_large_step_answers_the_key_with_its_target():
    weight, grad, key = draw(2, 4, 3), draw(2, 4, seed=1), draw(2, 3, seed=2)
    after = dgd_step(weight, key, grad, eta=1e12)
    torch.testing.assert_close((after @ key[..., None]).squeeze(-1), -grad)


def test_layers_are_stacked_and_each_may_have_its_step():
    weight, grad, key, eta = draw(2, 5, 4, 3), draw(2, 5, 4, seed=1), draw(2, 5, 3, seed=2), draw(2, 5, seed=3).abs()
    after = dgd_step(weight, key, grad, eta=eta)
    for i in range(2):
        for j in range(5):
            one = dgd_step(weight[i, j], key[i, j], grad[i, j], eta=eta[i, j].item())
            torch.testing.assert_close(after[i, j], one)
    torch.testing.assert_close(dgd_step(weight, 0 * key, grad), weight)


def test_models_differentiate_through_the_step():
    tensors = [draw(2, 4, 3), draw(2, 3), draw(2, 4, seed=1), draw(2).abs()]
    assert torch.autograd.gradcheck(
        lambda weight, key, grad, eta: dgd_step(weight, key, grad, eta=eta), [each.requires_grad_() for each in tensors]
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(7,), (2, 5), ()], ids=str)
def test_the_layer_adds_its_decay_to_the_gradient_of_the_weight_alone(bias, leading):
    """The penalty ½ rho · mean ‖W x̂‖² differentiated with respect to W; everything else is the ordinary layer's."""
    rho, x, weight = 0.3, draw(*leading, 4), draw(3, 4, seed=1)
    bias = draw(3, seed=2) if bias else None
    upstream = draw(*leading, 3, seed=3)
    got, expected = [], []
    for linear, grads in ((lambda *a: dgd_linear(*a, rho=rho), got), (F.linear, expected)):
        leaves = [each.clone().requires_grad_() for each in (x, weight, bias) if each is not None]
        out = linear(*leaves)
        grads += [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
    leaf, unit = weight.clone().requires_grad_(), F.normalize(x.reshape(-1, 4), dim=1)
    penalty = 0.5 * rho * (unit @ leaf.mT).square().sum(1).mean()
    expected[2] += torch.autograd.grad(penalty, leaf)[0]
    torch.testing.assert_close(got, expected)


def test_the_layer_makes_no_product_that_the_ordinary_layer_does_not():
    flops = []
    for linear in (F.linear, dgd_linear):
        x, weight = draw(9, 4).requires_grad_(), draw(3, 4).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            linear(x, weight).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]


def test_the_layer_skips_what_nobody_asked_for_and_rows_without_a_direction():
    x, weight = draw(5, 4), draw(3, 4, seed=1).requires_grad_()
    padded = torch.cat([x, torch.zeros(4, 4, dtype=torch.float64)])
    grads = [torch.autograd.grad(dgd_linear(each, weight).sum(), weight)[0] for each in (x, padded)]
    torch.testing.assert_close(*grads)
    frozen, x = weight.detach(), x.requires_grad_()
    dgd_linear(x, frozen, rho=0.5).sum().backward()
    torch.testing.assert_close(x.grad, frozen.sum(0).expand(5, 4))
    for nothing in (x[:0], torch.zeros_like(x)):
        assert not torch.autograd.grad(dgd_linear(nothing, weight).sum(), weight)[0].any()


def test_the_layer_works_under_autocast():
    x, weight = draw(5, 4).float().requires_grad_(), draw(3, 4).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dgd_linear(x, weight)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and weight.grad.dtype == x.grad.dtype == torch.float32


def regression(m=3, n=4, rows=50):
    """Inputs of length 1, so that Σ is their second moment, and answers that a linear map gives exactly."""
    x, solution = F.normalize(draw(rows, n), dim=1), draw(m, n, seed=1)
    torch.manual_seed(0)
    return nn.Linear(n, m, bias=False, dtype=torch.float64), x, solution


@pytest.mark.parametrize("rho", [0.01, 0.1, 1.0])
def test_the_printed_form_finds_a_shrunken_solution(rho):
    """Least squares W* comes out at W* / (1 + rho): half of it for the paper's rho = 1."""
    layer, x, solution = regression()
    plain = dict(output="identity", nesterov=False, momentum=0.0, weight_decay=0.0)
    optimizer = DGD(layer.parameters(), lr=2.0, rho=rho, inputs=capture_inputs(layer, every=1), **plain)
    for _ in range(400):
        optimizer.zero_grad()
        (0.5 * (layer(x) - x @ solution.mT).square().sum(1).mean()).backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), solution / (1 + rho), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tokens", [3, 50], ids=["rows", "gram"])
@pytest.mark.parametrize("output", ["identity", "adam", "newton_schulz"])
def test_the_decay_acts_on_the_old_weights_outside_memory_and_output_map(tokens, output):
    """One step beside Momentum's from the same state: minus lr · rho · W Σ, and the same memory."""
    moved, states, rho, lr = [], [], 0.7, 0.1
    for cls, options in ((DGD, {"rho": rho}), (Momentum, {})):
        layer, _, _ = regression()
        before, x = layer.weight.detach().clone(), draw(tokens, 4)
        if cls is DGD:
            options["inputs"] = capture_inputs(layer, every=1)
        optimizer = cls(layer.parameters(), lr=lr, output=output, weight_decay=0.3, **options)
        layer(x).square().sum().backward()
        optimizer.step()
        moved.append(layer.weight.detach())
        states.append(optimizer.state_dict()["state"])
    unit = F.normalize(x, dim=1)
    torch.testing.assert_close(moved[0], moved[1] - lr * rho * before @ (unit.mT @ unit / tokens))
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_directions_that_no_input_has_do_not_decay():
    layer, _, _ = regression()
    before = layer.weight.detach().clone()
    optimizer = DGD(layer.parameters(), lr=0.1, rho=0.5, weight_decay=0.0, inputs=capture_inputs(layer, every=1))
    seen = torch.tensor([[1.0, -2.0, 0.0, 0.0]], dtype=torch.float64)
    for _ in range(20):
        layer(seen)
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    along, across = seen[0] / seen.norm(), torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64) / 5**0.5
    for direction, factor in ((along, (1 - 0.1 * 0.5) ** 20), (across, 1.0), (torch.eye(4)[3].double(), 1.0)):
        torch.testing.assert_close(layer.weight.detach() @ direction, factor * before @ direction)


@pytest.mark.parametrize("output", ["identity", "adam", "newton_schulz"])
def test_no_decay_is_momentum_bit_for_bit(output):
    options = dict(lr=0.1, output=output)
    ours = trained(DGD, SHAPES, rho=0.0, missing="gradient", **options)
    assert all(map(torch.equal, ours, trained(Momentum, SHAPES, **options)))


def test_without_inputs_it_decays_along_the_gradient():
    (param,) = make_params([(3, 4)], torch.float64)
    (twin,) = make_params([(3, 4)], torch.float64)
    grad, before = draw(3, 4), param.detach().clone()
    for each, optimizer in (
        (param, DGD([param], lr=0.1, rho=0.5, missing="gradient")),
        (twin, Momentum([twin], lr=0.1)),
    ):
        each.grad = grad.clone()
        optimizer.step()
    key = grad / grad.norm()
    torch.testing.assert_close(param.detach(), twin.detach() - 0.1 * 0.5 * before @ key.mT @ key)


@pytest.mark.parametrize("maximize", [False, True])
def test_maximize_does_not_turn_the_decay_around(maximize):
    layer, _, _ = regression()
    before = layer.weight.detach().clone()
    optimizer = DGD(layer.parameters(), lr=0.1, rho=0.5, maximize=maximize, inputs=capture_inputs(layer, every=1))
    layer(torch.eye(4, dtype=torch.float64))
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.1 * 0.01 - 0.1 * 0.5 / 4))


def test_with_plain_sgd_the_layer_and_the_optimizer_are_one_step():
    """The layer's gradient is G + rho · W Σ, so that SGD on it is the optimizer without momentum."""
    rho, lr, x = 0.4, 0.1, draw(30, 4)
    layer, _, _ = regression()
    weight = layer.weight.detach().clone().requires_grad_()
    plain = dict(output="identity", nesterov=False, momentum=0.0, weight_decay=0.0)
    optimizer = DGD(layer.parameters(), lr=lr, rho=rho, inputs=capture_inputs(layer, every=1), **plain)
    layer(x).square().mean().backward()
    optimizer.step()
    dgd_linear(x, weight, rho=rho).square().mean().backward()
    torch.testing.assert_close(layer.weight.detach(), weight.detach() - lr * weight.grad)


def test_a_matrix_without_inputs_is_refused_before_anything_is_written():
    named = [("first", nn.Parameter(torch.ones(2, 3))), ("bias", nn.Parameter(torch.ones(3)))]
    optimizer = DGD(named)
    for _, param in named:
        param.grad = torch.ones_like(param)
    before = snapshot(param for _, param in named)
    with pytest.raises(RuntimeError, match="no inputs of these parameters' layers: first; pass inputs="):
        optimizer.step()
    assert all(map(torch.equal, before, (param for _, param in named))) and not optimizer.state


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_refuses_a_decay_that_is_none(rho):
    with pytest.raises(ValueError, match="Invalid rho value"):
        DGD(make_params([(2, 2)]), rho=rho)
