"""Preconditioned momentum against optimizers that it contains, and against the eigenvalue decomposition."""

import pytest
import torch

from deep_optim import Momentum, PreconditionedMomentum
from deep_optim.ops.newton_schulz import newton_schulz
from problem import SHAPES, make_params, trained

PLAIN = dict(output="identity", nesterov=False, weight_decay=0)


def gradient(seed, shape=(4, 6)):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def memory_after(grads, **options):
    (param,) = make_params([grads[0].shape], torch.float64)
    optimizer = PreconditionedMomentum([param], **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return optimizer.state[param]["memory"]


@pytest.mark.parametrize("output", ["identity", "adam", "newton_schulz"])
def test_identity_is_momentum_bit_for_bit(output):
    ours = trained(PreconditionedMomentum, SHAPES, preconditioner="identity", output=output)
    assert all(map(torch.equal, ours, trained(Momentum, SHAPES, output=output)))


def test_diagonal_without_momentum_is_rmsprop_with_bias_correction():
    """That is Adam with beta1 = 0."""
    ours = trained(PreconditionedMomentum, SHAPES, lr=0.1, momentum=0, precondition_beta=0.9, **PLAIN)
    theirs = trained(torch.optim.AdamW, SHAPES, lr=0.1, betas=(0.0, 0.9), weight_decay=0)
    torch.testing.assert_close(ours, theirs)


def test_shampoo_is_the_inverse_root_of_the_averaged_left_gram():
    grads = [gradient(seed) for seed in range(3)]
    memory = memory_after(grads, preconditioner="shampoo", momentum=1, precondition_beta=0.7, precondition_interval=1)
    gram, expected = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64)
    for t, grad in enumerate(grads, start=1):
        gram = 0.7 * gram + 0.3 * grad @ grad.mT
        average = gram / (1 - 0.7**t)
        values, vectors = torch.linalg.eigh(average + 1e-2 * average.diagonal().mean() * torch.eye(4).double())
        expected += (vectors * values.rsqrt()) @ vectors.mT @ grad
    torch.testing.assert_close(memory, expected)


def test_shampoo_of_one_gradient_is_its_orthogonal_factor_but_for_the_ridge():
    u, s, vh = torch.linalg.svd(gradient(0), full_matrices=False)
    memory = memory_after([gradient(0)], preconditioner="shampoo")
    damped = s / (s.square() + 1e-2 * s.square().mean()).sqrt()
    torch.testing.assert_close(memory, (u * damped) @ vh)


def test_shampoo_refreshes_its_root_every_few_steps():
    """Root of step 1 up to step 3, refreshed at step 4."""
    (param,) = make_params([(4, 6)], torch.float64)
    optimizer = PreconditionedMomentum([param], preconditioner="shampoo", precondition_interval=3)
    roots = []
    for seed in range(5):
        param.grad = gradient(seed)
        optimizer.step()
        roots.append(optimizer.state[param]["preconditioner.root"].clone())
    assert torch.equal(roots[0], roots[1]) and torch.equal(roots[1], roots[2])
    assert not torch.equal(roots[2], roots[3]) and torch.equal(roots[3], roots[4])


def test_shampoo_refreshes_each_parameter_by_its_own_count():
    """A parameter that joins later has its root at once, and does not disturb the one beside it."""
    early, late = make_params([(4, 6), (4, 6)], torch.float64)
    optimizer = PreconditionedMomentum([early, late], preconditioner="shampoo", precondition_interval=4)
    for seed in range(3):
        early.grad = gradient(seed)
        late.grad = gradient(seed + 9) if seed == 2 else None
        optimizer.step()
        if seed == 0:
            root = optimizer.state[early]["preconditioner.root"].clone()
    assert torch.equal(optimizer.state[early]["preconditioner.root"], root)
    assert optimizer.state[late]["preconditioner.root"].abs().sum() > 0


@pytest.mark.parametrize("capturable", [True, False])
def test_the_host_decides_nothing_that_changes_the_result(capturable):
    grads = [gradient(seed) for seed in range(5)]
    options = dict(preconditioner="shampoo", precondition_interval=3)
    torch.testing.assert_close(memory_after(grads, **options), memory_after(grads, capturable=capturable, **options))


def test_newton_schulz_writes_orthogonalised_gradients():
    grads = [gradient(seed) for seed in range(3)]
    memory = memory_after(grads, preconditioner="newton_schulz", momentum=1.0)
    torch.testing.assert_close(memory, sum(map(newton_schulz, grads)))


@pytest.mark.parametrize("preconditioner", ["diagonal", "shampoo", "newton_schulz"])
def test_what_is_written_does_not_depend_on_the_loss_scale(preconditioner):
    grads = [gradient(seed) for seed in range(3)]
    options = dict(preconditioner=preconditioner, adamw_eps=0.0)
    scaled = memory_after([grad * 1e-6 for grad in grads], **options)
    torch.testing.assert_close(scaled, memory_after(grads, **options))


def test_adam_output_divides_by_what_was_written_not_by_the_gradient():
    """P(G) has entries of about 1; divided by the second moment of a gradient of 1e-6 it would explode."""
    (param,) = make_params([(4, 6)], torch.float64)
    before = param.detach().clone()
    optimizer = PreconditionedMomentum([param], lr=0.1, output="adam", weight_decay=0)
    param.grad = gradient(0) * 1e-6
    optimizer.step()
    assert (param - before).abs().max() < 0.2
