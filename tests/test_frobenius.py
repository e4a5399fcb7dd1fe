"""The Frobenius norm, by float64, for matrices of any size."""

import pytest
import torch

from deep_optim.ops.backend import HAS_TRITON
from deep_optim.ops.frobenius import frobenius_norm


def make(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("size", [1e-30, 1e-16, 1e-10, 1.0, 1e10, 1e16, 1e19, 1e30])
@pytest.mark.parametrize("shape", [(1000, 2000), (2, 3, 5, 4), (1, 1)], ids=str)
def test_is_right_for_any_size(shape, size):
    matrix = make(*shape) * size
    expected = torch.linalg.matrix_norm(matrix, keepdim=True)
    torch.testing.assert_close(frobenius_norm(matrix.float()), expected.float(), rtol=2e-6, atol=0)


def test_one_matrix_of_a_stack_may_be_tiny_and_another_huge():
    matrix = make(4, 6, 5) * torch.tensor([1e-30, 1.0, 0.0, 1e30], dtype=torch.float64)[:, None, None]
    norm = frobenius_norm(matrix.float())
    expected = torch.linalg.matrix_norm(matrix, keepdim=True).float()
    expected[2] = torch.finfo(torch.float32).tiny
    torch.testing.assert_close(norm, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_has_a_norm_that_can_divide(dtype):
    assert (torch.zeros(3, 2, dtype=dtype) / frobenius_norm(torch.zeros(3, 2, dtype=dtype)) == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_shows(bad):
    matrix = make(2, 3, 4).float()
    matrix[1, 0, 0] = bad
    norm = frobenius_norm(matrix)
    assert norm[0].isfinite() and not norm[1].isfinite()


def test_an_empty_stack_has_no_norms():
    assert frobenius_norm(torch.zeros(0, 3, 4)).shape == (0, 1, 1)
    assert frobenius_norm(torch.zeros(2, 0, 4)).shape == (2, 1, 1)


needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


@needs_triton
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(150, 120), (2, 3, 5, 4), (1, 1)], ids=str)
def test_the_kernel_is_right_for_any_size(shape, size, triton_device):
    """Of more tiles than one, and of a tail."""
    matrix = make(*shape) * size
    norm = frobenius_norm(matrix.float().to(triton_device), backend="triton").cpu()
    torch.testing.assert_close(norm, torch.linalg.matrix_norm(matrix, keepdim=True).float(), rtol=2e-6, atol=0)


@needs_triton
def test_the_kernel_keeps_matrices_apart_and_lets_bad_numbers_show(triton_device):
    matrix = make(4, 3, 4).float().to(triton_device)
    matrix[0], matrix[1, 2, 1], matrix[2, 0, 0] = 0, float("nan"), float("inf")
    norm = frobenius_norm(matrix, backend="triton").flatten().tolist()
    assert norm[0] == torch.finfo(torch.float32).tiny and norm[1] != norm[1] and norm[2] == float("inf")
    assert norm[3] == pytest.approx(torch.linalg.matrix_norm(matrix[3]).item())


@needs_triton
def test_an_explicit_request_never_falls_back(triton_device):
    with pytest.raises(RuntimeError, match="in_dtypes=False"):
        frobenius_norm(make(3, 4).to(triton_device), backend="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        frobenius_norm(make(3, 4).float().to("meta"), backend="cuda")
