"""Newton-Schulz against the singular value decomposition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from deep_optim.ops import newton_schulz as module
from deep_optim.ops.newton_schulz import newton_schulz, working_dtype

SHAPES = [(8, 8), (3, 17), (17, 3), (1, 9), (9, 1), (1, 1), (2, 3, 20, 7), (4, 6, 30)]


def make(shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact(matrix, steps=5):
    """Muon's polynomial of each singular value, on the values of an SVD in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s[..., None, :]) @ vh


@pytest.mark.parametrize("steps", range(1, 8))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keeps_the_singular_vectors_and_maps_the_values(shape, steps):
    matrix = make(shape)
    torch.testing.assert_close(newton_schulz(matrix, steps=steps), exact(matrix, steps))


SPECTRA = {
    "gaussian": lambda shape: make(shape),
    "ill-conditioned": lambda shape: (
        (torch.linalg.qr(make((shape[0], shape[0]))).Q * torch.logspace(0, -4, shape[0]))
        @ torch.linalg.qr(make(shape).mT).Q.mT
    ),
    "low rank": lambda shape: make((shape[0], 3)) @ make((3, shape[1]), seed=1) + 1e-3 * make(shape, seed=2),
    "rank one": lambda shape: make((shape[0], 1)) @ make((1, shape[1]), seed=1),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_gram_form_is_about_as_accurate_as_multiplying_at_every_step(spectrum, monkeypatch):
    """In bfloat16, where small singular values are noise in the Gram: at most twice the error."""
    matrix = SPECTRA[spectrum]((32, 128))
    expected = exact(matrix)
    gathered = (newton_schulz(matrix, dtype=torch.bfloat16) - expected).norm()
    monkeypatch.setattr("deep_optim.ops.newton_schulz._LONG", float("inf"))
    assert gathered < 2 * (newton_schulz(matrix, dtype=torch.bfloat16) - expected).norm()


@pytest.mark.parametrize("shape", [(4, 12), (12, 4), (16, 48)], ids=str)
@pytest.mark.parametrize("coefficients", ["muon", "polar_express"])
def test_rounding_never_carries_a_singular_value_to_where_it_diverges(coefficients, shape):
    """In bfloat16, a few loud directions over quiet ones of any size: gathering three steps reaches thousands."""
    generator = torch.Generator().manual_seed(0)
    noise = 10.0 ** -torch.randint(1, 9, (400, 1, 1), generator=generator)
    loud = torch.randn(400, shape[0], 3, generator=generator) @ torch.randn(400, 3, shape[1], generator=generator)
    matrices = loud + noise * torch.randn(400, *shape, generator=generator)
    out = newton_schulz(matrices, steps=8, coefficients=coefficients, dtype=torch.bfloat16)
    assert torch.linalg.svdvals(out.double()).max() < 1.25


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("m, n, coefficients, large, small", [
    (16, 31, "muon", 10, 5), (16, 32, "muon", 6, 11), (16, 32, "polar_express", 10, 5),
])  # fmt: skip
def test_costs_the_flops_that_it_states(m, n, coefficients, large, small, tall):
    """Two large products per step or, for Muon's polynomial on a long matrix, for two steps."""
    with FlopCounterMode(display=False) as counter:
        newton_schulz(make((2, n, m) if tall else (2, m, n)), coefficients=coefficients)
    assert counter.get_total_flops() == 2 * (large * 2 * m * m * n + small * 2 * m**3)


def test_singular_values_of_a_gaussian_matrix_end_near_one():
    """The spread that Muon lives with, after five steps on a wide matrix."""
    values = torch.linalg.svdvals(newton_schulz(make((64, 256))))
    assert 0.65 < values.min() and values.max() < 1.25


def test_polar_express_converges_where_muon_does_not():
    """Singular values in [1e-3, 1], the interval its polynomials are made for."""
    q, r = (torch.linalg.qr(make((12, 12), seed=seed)).Q for seed in (1, 2))
    matrix = q @ torch.diag(torch.logspace(-3, 0, 12, dtype=torch.float64)) @ r
    torch.testing.assert_close(newton_schulz(matrix, steps=9, coefficients="polar_express"), q @ r, rtol=0, atol=1e-6)
    assert (torch.linalg.svdvals(newton_schulz(matrix, steps=9)) - 1).abs().max() > 0.1


def test_polar_express_starts_with_its_first_polynomial_damped():
    """p(σ / 1.01), by the coefficients as the paper rounds them."""
    q = torch.linalg.qr(make((6, 6))).Q
    values = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    values = values / values.norm()
    damped = values / 1.01
    expected = 8.28721 * damped - 23.59589 * damped**3 + 17.30039 * damped**5
    out = torch.linalg.svdvals(newton_schulz(q @ torch.diag(values), steps=1, coefficients="polar_express"))
    torch.testing.assert_close(out.sort().values, expected.sort().values, rtol=1e-5, atol=1e-5)


def test_the_papers_cubic_step_is_its_gradient_step_at_the_start():
    """Eq. 44 at O = G with step 1/4 is 1.5 O − 0.5 O Oᵀ O: one step of gradient descent on ‖OᵀO − I‖² / 2."""
    start = make((6, 4)) / 10
    o = start.clone().requires_grad_()
    (grad,) = torch.autograd.grad(0.5 * (o.mT @ o - torch.eye(4, dtype=o.dtype)).square().sum(), o)
    torch.testing.assert_close(start - 0.25 * grad, 1.5 * start - 0.5 * start @ start.mT @ start)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transposition_commutes(shape):
    matrix = make(shape)
    torch.testing.assert_close(newton_schulz(matrix.mT), newton_schulz(matrix).mT)


@pytest.mark.parametrize("shape", [(3, 4), (2, 7), (7, 2)], ids=str)
def test_can_be_differentiated(shape):
    """Unrolled training runs go through it, in either form."""
    assert torch.autograd.gradcheck(newton_schulz, make(shape).requires_grad_())


def test_a_stack_is_its_matrices():
    stack = make((3, 2, 5, 9))
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(newton_schulz(stack)[i, j], newton_schulz(stack[i, j]))


@given(st.integers(-40, 40), st.sampled_from([torch.float32, torch.float64]))
def test_is_scale_free(exponent, dtype):
    matrix = make((5, 8), dtype)
    assert torch.equal(newton_schulz(matrix * 2.0**exponent), newton_schulz(matrix))


def test_zero_gives_zero_and_leaves_its_neighbour_alone():
    stack = make((2, 4, 6))
    stack[0] = 0
    out = newton_schulz(stack)
    assert torch.equal(out[0], torch.zeros(4, 6, dtype=out.dtype))
    torch.testing.assert_close(out[1], newton_schulz(stack[1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_shows(bad):
    matrix = make((4, 6))
    matrix[1, 2] = bad
    assert newton_schulz(matrix).isnan().any()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 5)], ids=str)
def test_empty(shape):
    assert newton_schulz(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_result_has_the_dtype_of_the_matrix(dtype):
    out = newton_schulz(make((8, 6)).to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), newton_schulz(make((8, 6))), rtol=0, atol=0.05)  # bfloat16 keeps 8 bits


def test_scale_multiplies_the_result():
    matrix = make((5, 8))
    torch.testing.assert_close(newton_schulz(matrix, scale=3.0), 3.0 * newton_schulz(matrix))


@pytest.mark.parametrize("scale", [1e-7, 2e4, 1e5])
def test_a_scale_beyond_float16_is_no_loss(scale):
    matrix = make((8, 6)).float()
    expected = scale * newton_schulz(matrix, dtype=torch.float16)
    torch.testing.assert_close(newton_schulz(matrix, scale=scale, dtype=torch.float16), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 0.03), (torch.float16, 0.006)])
@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (96, 64)], ids=str)
def test_half_precision_is_off_by_no_more_than_it_was(shape, dtype, most):
    """Muon's own loop in bfloat16 is off by 0.03 on such matrices."""
    matrix = make(shape)
    error = newton_schulz(matrix, dtype=dtype) - exact(matrix)
    assert error.norm() < most * exact(matrix).norm()


def test_without_a_cast_the_result_stays_in_the_working_precision():
    matrix = make((8, 6)).float()
    out = newton_schulz(matrix, dtype=torch.bfloat16, cast=False)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.float(), newton_schulz(matrix, dtype=torch.bfloat16))
    assert newton_schulz(torch.zeros(0, 3), dtype=torch.bfloat16, cast=False).dtype == torch.bfloat16


def test_working_precision_can_be_chosen():
    """float32 is exact to float32; bfloat16 is not, so that the choice is seen to have an effect."""
    matrix = make((16, 24))
    exact, single, half = (newton_schulz(matrix, dtype=d) for d in (torch.float64, torch.float32, torch.bfloat16))
    assert (single - exact).abs().max() < 1e-5 < (half - exact).abs().max()
    assert working_dtype(matrix) == torch.float64


@pytest.mark.parametrize("avx, amx", [(True, False), (False, True), (False, False), (None, True), (None, None)])
def test_a_cpu_is_asked_for_bfloat16_where_torch_can_say(avx, amx, monkeypatch):
    """By names that are torch's own and may go: None is a torch without one."""
    for name, answer in (("_is_avx512_bf16_supported", avx), ("_is_amx_tile_supported", amx)):
        monkeypatch.delattr(torch.cpu, name, raising=False)
        if answer is not None:
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
    assert module._cpu_has_bfloat16() is bool(avx or amx)


def test_the_matrix_is_not_written():
    matrix = make((5, 5), torch.float32)
    before = matrix.clone()
    newton_schulz(matrix)
    assert torch.equal(matrix, before)


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="matrices"):
        newton_schulz(torch.zeros(3))
    with pytest.raises(ValueError, match="ns_steps value: 0"):
        newton_schulz(torch.zeros(3, 3), steps=0)
    with pytest.raises(ValueError, match="ns_coefficients: 'cubic'"):
        newton_schulz(torch.zeros(3, 3), coefficients="cubic")
