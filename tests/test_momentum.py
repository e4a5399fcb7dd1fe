"""Momentum in the limits where its answer is known: SGD, Muon, AdamW, and the objective it descends."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deep_optim import DeltaMomentum, Momentum, PreconditionedMomentum
from deep_optim.ops.feature_map import feature_map as phi
from problem import make_params, train, trained

SHAPES = [(4, 6), (4, 6), (6, 4), (5,), (), (2, 3, 2, 2), (1, 7), (3, 1)]
MATRICES = [(40, 60), (40, 60), (60, 40), (32, 32)]


@given(
    momentum=st.floats(0, 1),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    lr=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_identity_is_sgd_bit_for_bit(momentum, nesterov, maximize, lr, dtype):
    options = dict(lr=lr, momentum=momentum, maximize=maximize)
    ours = trained(Momentum, SHAPES, dtype, output="identity", weight_decay=0, nesterov=nesterov, **options)
    # torch refuses nesterov without momentum, where both are the plain gradient
    theirs = trained(torch.optim.SGD, SHAPES, dtype, nesterov=nesterov and momentum > 0, **options)
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
def test_newton_schulz_is_torch_muon_within_its_bfloat16(nesterov):
    options = dict(lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    ours = trained(Momentum, MATRICES, torch.float32, **options)
    theirs = trained(torch.optim.Muon, MATRICES, torch.float32, adjust_lr_fn="match_rms_adamw", **options)
    start = make_params(MATRICES, torch.float32)
    for our, their, before in zip(ours, theirs, start, strict=True):
        # torch rounds every product of the iteration to 8 bits; it moved sqrt(6) steps of RMS 0.02
        assert (our - their).norm() < 0.02 * (their - before).norm()


def test_newton_schulz_update_has_the_rms_of_adamw():
    """Orthogonal gradient, no decay: 0.2 √max(m, n) U Vᵀ has RMS 0.2 in units of lr, whatever the shape."""
    for m, n in [(30, 30), (10, 90), (90, 10)]:
        param, direction = make_params([(m, n), (m, n)], torch.float64)
        u, _, vh = torch.linalg.svd(direction.detach(), full_matrices=False)
        before, param.grad = param.detach().clone(), u @ vh
        Momentum([param], lr=1e-2, weight_decay=0).step()
        rms = (param - before).square().mean().sqrt()
        assert 0.65 * 2e-3 < rms < 1.25 * 2e-3  # the spread of Newton-Schulz's singular values


@pytest.mark.parametrize("maximize", [True, False], ids=["maximize", "minimize"])
def test_adam_output_is_adamw(maximize):
    options = dict(lr=0.1, weight_decay=0.1, maximize=maximize)
    ours = trained(Momentum, SHAPES, momentum=0.8, nesterov=False, output="adam", adamw_betas=(0.8, 0.9), **options)
    theirs = trained(torch.optim.AdamW, SHAPES, betas=(0.8, 0.9), **options)
    torch.testing.assert_close(ours, theirs)


def test_adam_output_with_nesterov_averages_with_weights_that_sum_to_one():
    """The average of a constant gradient is that gradient, so that each step is lr · sign(G)."""
    (param,) = make_params([(4, 6)], torch.float64)
    before = param.detach().clone()
    optimizer = Momentum([param], lr=0.1, weight_decay=0, output="adam", adamw_eps=0)
    for step in range(1, 4):
        param.grad = torch.full((4, 6), 7.0, dtype=torch.float64)
        optimizer.step()
        torch.testing.assert_close(before - param, torch.full((4, 6), 0.1 * step, dtype=torch.float64))


def test_vectors_are_adamw_except_under_identity():
    vectors = [(5,), (), (7,)]
    expected = trained(torch.optim.AdamW, vectors, lr=0.1, weight_decay=0.1, betas=(0.8, 0.9), eps=0.1)
    for output in ("newton_schulz", "adam"):
        ours = trained(
            Momentum, vectors, lr=0.1, weight_decay=0.1, output=output, adamw_betas=(0.8, 0.9), adamw_eps=0.1
        )
        assert all(map(torch.equal, ours, expected))


def test_weight_decay_is_decoupled():
    ours = trained(Momentum, [(4, 6)], steps=1, lr=0.1, weight_decay=0.5, output="identity")
    plain = trained(Momentum, [(4, 6)], steps=1, lr=0.1, weight_decay=0.0, output="identity")
    torch.testing.assert_close(ours[0], plain[0] - 0.1 * 0.5 * make_params([(4, 6)], torch.float64)[0])


@pytest.mark.parametrize("feature_map", ["identity", "soft_rows", "tanh", "sign"])
def test_memory_descends_the_stated_objective(feature_map):
    """With momentum = 1, one step changes the memory by minus the gradient of −⟨M φ(G)ᵀ, I⟩."""
    (param,) = make_params([(4, 6)], torch.float64)
    optimizer = Momentum([param], momentum=1.0, feature_map=feature_map, output="identity")
    for seed in range(2):
        before = optimizer.state[param].get("memory", torch.zeros(4, 6, dtype=torch.float64)).clone().requires_grad_()
        param.grad = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        (gradient,) = torch.autograd.grad(-(before @ phi(param.grad, feature_map).mT).trace(), before)
        optimizer.step()
        torch.testing.assert_close(optimizer.state[param]["memory"], before.detach() - gradient)


def test_equal_shapes_step_together_as_they_would_alone():
    together = trained(Momentum, [(8, 12)] * 5)
    assert not torch.equal(together[0], together[1])
    params = make_params([(8, 12)] * 5, torch.float64)
    train([Momentum([param]) for param in params], params, range(6))
    torch.testing.assert_close(together, params)


def test_a_large_stack_is_cut(monkeypatch):
    expected = trained(Momentum, [(8, 12)] * 5)
    monkeypatch.setattr("deep_optim.optimizers.stacks._CPU_STACK_NUMEL", 4 * 96)
    torch.testing.assert_close(trained(Momentum, [(8, 12)] * 5), expected)


@pytest.mark.parametrize(
    "cls, options",
    [
        (Momentum, {"output": "newton_schulz"}),
        (Momentum, {"output": "adam"}),
        (Momentum, {"output": "identity"}),
        (PreconditionedMomentum, {"preconditioner": "shampoo"}),
        (DeltaMomentum, {}),
    ],
    ids=str,
)
def test_split_blocks_are_matrices_of_their_own(cls, options):
    (fused,) = make_params([(12, 5)], torch.float64)
    blocks = [torch.nn.Parameter(block.clone()) for block in fused.detach().chunk(3)]
    ours = cls([{"params": [fused], "split": 3}], **options)
    theirs = cls(blocks, **options)
    for seed in range(3):
        fused.grad = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for block, grad in zip(blocks, fused.grad.chunk(3), strict=True):
            block.grad = grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(fused, torch.cat(blocks))
    assert ours.state[fused]["memory"].shape == fused.shape


def test_split_leaves_vectors_alone():
    params = make_params([(12, 5), (7,)], torch.float64)
    Momentum([{"params": params, "split": 3}], output="identity")


def test_counters_are_where_they_are_read():
    """On the device for torch's fused AdamW and for CUDA graphs; on the host where the host reads them."""
    param = torch.empty(4, 6, device="meta")
    for options, device in [({}, "meta"), ({"fused": False}, "cpu"), ({"foreach": True}, "cpu")]:
        optimizer = Momentum([param], **options)
        group = optimizer.param_groups[0]
        assert optimizer.new_state(param, {**group, "rule": "adamw"})["step"].device.type == device
        assert optimizer.new_state(param, {**group, "output": "adam"})["step"].device.type == "cpu"
        captured = {**group, "output": "adam", "capturable": True}
        assert optimizer.new_state(param, captured)["step"].device.type == "meta"


def test_split_must_divide_the_rows():
    with pytest.raises(ValueError, match="split=5 does not divide"):
        Momentum([{"params": make_params([(12, 5)], torch.float64), "split": 5}])


def test_rule_adamw_is_torch_adamw_for_matrices_too():
    params, others = make_params(SHAPES, torch.float64), make_params(SHAPES, torch.float64)
    ours = Momentum([{"params": params, "rule": "adamw", "lr": 0.1}])
    theirs = torch.optim.AdamW(others, lr=0.1, weight_decay=1e-2)
    for seed in range(3):
        for param, other in zip(params, others, strict=True):
            rng = torch.Generator().manual_seed(seed)
            param.grad = torch.randn(param.shape, dtype=torch.float64, generator=rng)
            other.grad = param.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(params, others)
    assert ours.state[params[0]].keys() == theirs.state[others[0]].keys()


def test_state_of_another_size_is_refused_and_nothing_is_replaced():
    (saved,), (param,) = make_params([(4, 6)], torch.float64), make_params([(6, 4)], torch.float64)
    train(before := Momentum([saved]), [saved], range(2))
    train(optimizer := Momentum([param]), [param], range(2))
    memory = optimizer.state[param]["memory"].clone()
    with pytest.raises(ValueError, match=r"memory of size \(4, 6\) for a parameter of size \(6, 4\)"):
        optimizer.load_state_dict(before.state_dict())
    assert torch.equal(optimizer.state[param]["memory"], memory)
