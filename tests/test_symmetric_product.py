"""The product of a matrix with its transpose against float64, and what the compiler makes of its kernel."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deep_optim.ops import symmetric_product as module
from deep_optim.ops.backend import HAS_TRITON
from deep_optim.ops.newton_schulz import newton_schulz
from deep_optim.ops.symmetric_product import symmetric_product
from large_results import LargeResults

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
TIMES = Path(__file__).parents[1] / "benchmarks" / "results" / "kernels-cuda-symmetric.json"
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]

# ragged; one row, one column; several tiles each way; whole tiles; nothing in some dimension
SHAPES = [
    (5, 7),
    (1, 9),
    (9, 1),
    (1, 1),
    (2, 3, 6, 4),
    (150, 70),
    (3, 70, 150),
    (128, 64),
    (4, 3, 0),
    (0, 5, 3),
    (0, 4),
]


def make(shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def symmetric(shape, dtype=torch.float64, device="cpu"):
    add = make((*shape[:-1], shape[-2]), dtype, device, seed=1)
    return add + add.mT


def low_dtypes(device):
    """The interpreter has no bfloat16: https://github.com/triton-lang/triton/issues/11584"""
    return (torch.float16,) if device == "cpu" else (torch.bfloat16, torch.float16)


def assert_exact(out, x, add=None, alpha=1.0, beta=1.0):
    """Within the rounding of sums of n products in float32, and of the result to its dtype, of float64."""
    add = torch.zeros((), dtype=torch.float64, device=x.device) if add is None else add.double()
    expected = alpha * (x.double() @ x.double().mT) + beta * add
    terms = abs(alpha) * (x.double().abs() @ x.double().abs().mT) + abs(beta) * add.abs()
    bound = (
        torch.finfo(torch.float32).eps * (x.shape[-1] ** 0.5 + 2) * terms + torch.finfo(x.dtype).eps * expected.abs()
    )
    assert out.dtype == x.dtype and out.shape == expected.shape
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_product_with_the_transpose(shape, backend, triton_device):
    x = make(shape, torch.float32, triton_device)
    assert_exact(symmetric_product(x, backend=backend), x)
    assert_exact(symmetric_product(x, alpha=0.3, backend=backend), x, alpha=0.3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adds_a_symmetric_matrix(shape, backend, triton_device):
    x, add = make(shape, torch.float32, triton_device), symmetric(shape, torch.float32, triton_device)
    out = symmetric_product(x, add=add, alpha=-1.5, beta=0.3, backend=backend)
    assert_exact(out, x, add, alpha=-1.5, beta=0.3)


@needs_triton
@pytest.mark.parametrize("shape", [(5, 7), (150, 70), (2, 33, 20)], ids=str)
def test_is_symmetric_bit_for_bit(shape, triton_device):
    """Even where what is added is not: one triangle is mirrored, whatever the order of sums in the other."""
    for dtype in (torch.float32, *low_dtypes(triton_device)):
        x = make(shape, dtype, triton_device)
        crooked = make((*shape[:-1], shape[-2]), dtype, triton_device, seed=1)
        for add in (None, crooked):
            out = symmetric_product(x, add=add, alpha=0.7, backend="triton")
            assert torch.equal(out, out.mT)
        lower = crooked.tril() + crooked.tril(-1).mT
        assert torch.equal(out, symmetric_product(x, add=lower, alpha=0.7, backend="triton"))


@needs_triton
@pytest.mark.parametrize("shape", [(7, 5), (70, 150), (2, 130, 66)], ids=str)
def test_is_no_less_accurate_than_torch_in_low_precision(shape, triton_device):
    for dtype in low_dtypes(triton_device):
        x, add = make(shape, dtype, triton_device), symmetric(shape, dtype, triton_device)
        ours, theirs = (
            symmetric_product(x, add=add, alpha=0.5, backend=backend) for backend in ("triton", "reference")
        )
        exact = 0.5 * (x.double() @ x.double().mT) + add.double()
        errors = [torch.linalg.vector_norm(out.double() - exact) for out in (ours, theirs)]
        assert ours.dtype == dtype
        assert errors[0] <= 1.01 * errors[1]  # both round the same sums, which differ in order


VIEWS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: torch.stack([x, x], -1)[..., 0],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "rows of a wider matrix": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "broadcast": lambda x: x[:1].expand_as(x),
    "stack last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


@needs_triton
@pytest.mark.parametrize("shape", [(3, 20, 9), (2, 70, 40)], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_takes_any_strides(view, shape, triton_device):
    x, add = make(shape, torch.float32, triton_device), symmetric(shape, torch.float32, triton_device)
    x, add = VIEWS[view](x), VIEWS[view](add)
    before = x.clone(), add.clone()
    out = symmetric_product(x, add=add, beta=0.3, backend="triton")
    assert_exact(out, x, add, beta=0.3)
    assert torch.equal(out, symmetric_product(before[0], add=before[1], beta=0.3, backend="triton"))
    assert torch.equal(x, before[0]) and torch.equal(add, before[1])
    assert out.is_contiguous()


@needs_triton
def test_a_transposed_matrix_is_not_copied(triton_device):
    x = make((200, 12), torch.float32, triton_device)
    with LargeResults(x.numel()) as results:
        out = symmetric_product(x.mT, backend="triton")
    results.assert_only(made=0)  # the product is smaller
    assert_exact(out, x.mT)


@needs_triton
@pytest.mark.parametrize("size", ["_LARGE", "_SMALL", "_SINGLE", "tiny"])
def test_every_configuration_is_right(size, triton_device, monkeypatch):
    """Which one is taken depends on the size; tiny tiles make a triangle of ten rows of a small matrix."""
    tiny = {"BLOCK": 16, "BLOCK_K": 32, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(module, "_tiles", lambda *_: tiny if size == "tiny" else getattr(module, size))
    shape = (150, 20) if size == "tiny" else (2, 300, 70)
    for dtype in (torch.float32, *low_dtypes(triton_device)):
        if triton_device == "cpu" or size != "_LARGE" or dtype != torch.float32:  # which exceeds the shared memory
            x, add = make(shape, dtype, triton_device), symmetric(shape, dtype, triton_device)
            assert_exact(symmetric_product(x, add=add, backend="triton"), x, add)


def test_small_tiles_are_taken_where_large_ones_leave_multiprocessors_idle():
    assert module._tiles(1, 1024, torch.bfloat16) is module._SMALL  # 36 tiles
    assert module._tiles(4, 1024, torch.bfloat16) is module._LARGE
    assert module._tiles(1, 2048, torch.float16) is module._LARGE  # 136 tiles
    assert module._tiles(99, 2048, torch.float32) is module._SINGLE


def test_every_tile_finds_its_row_even_by_an_approximate_root():
    """The kernel's own formula in float32, with the root two units in the last place off either way."""
    side = 1000
    expected = np.repeat(np.arange(side), np.arange(1, side + 1))
    assert len(expected) == module._triangle(64 * side, 64) == module._triangle(64 * side - 63, 64)
    root = np.sqrt(np.float32(2) * np.arange(len(expected), dtype=np.float32) + np.float32(1))
    for ulps in (-2, 0, 2):
        assert ((root + ulps * np.spacing(root) - np.float32(0.5)).astype(np.int32) == expected).all()


@needs_triton
def test_gives_the_same_bits_twice_and_stacks_do_not_mix(triton_device):
    x = make((3, 70, 40), torch.float32, triton_device)
    out = symmetric_product(x, backend="triton")
    assert torch.equal(out, symmetric_product(x, backend="triton"))
    x[1, 3, 3] = float("nan")
    other = symmetric_product(x, backend="triton")
    assert torch.equal(out[::2], other[::2]) and other[1, 3].isnan().all() and other[1, :, 3].isnan().all()
    assert other[1].isfinite().sum() == 69 * 69


def test_gradients_flow_through_the_reference():
    x, add = make((2, 4, 3)).requires_grad_(), symmetric((2, 4, 3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, add: symmetric_product(x, add=add, alpha=0.5, beta=2.0), (x, add))


def test_auto_takes_the_reference_on_the_cpu(monkeypatch):
    monkeypatch.setattr(module, "_symmetric_product_triton", None)
    assert_exact(symmetric_product(x := make((1024, 1), torch.float32)), x)


@pytest.mark.parametrize(
    "shape, dtype, taken",
    [
        ((24, 2048, 4096), torch.bfloat16, True),
        ((4, 4096, 4096), torch.float16, True),
        ((4, 4096, 4096), torch.float32, False),  # was not timed
        ((48, 2047, 4096), torch.bfloat16, False),
        ((1, 2048, 4096), torch.bfloat16, False),
        ((4, 4096, 4096), torch.float64, False),
    ],
    ids=str,
)
def test_auto_takes_triton_for_large_matrices_on_cuda(shape, dtype, taken, monkeypatch):
    """What is asked of `use_triton` and what is made of its answer, on a machine without CUDA."""
    monkeypatch.setattr(module, "use_triton", lambda backend, *tensors, dtypes: tensors[0].dtype in dtypes)
    monkeypatch.setattr(module, "_symmetric_product_triton", lambda *_: True)
    monkeypatch.setattr(module, "symmetric_product_reference", lambda *_: False)
    assert symmetric_product(torch.empty(shape, dtype=dtype, device="meta")) is taken


@pytest.mark.parametrize("kernel, adding", [("gram", False), ("square", True)])
def test_the_rule_says_triton_where_the_committed_times_do(kernel, adding, monkeypatch):
    """And nowhere else, by medians; where it does by three rounds in four. "square" is of the smaller sides alone."""
    monkeypatch.setattr(module, "use_triton", lambda *_, **__: True)
    monkeypatch.setattr(module, "_symmetric_product_triton", lambda *_: True)
    monkeypatch.setattr(module, "symmetric_product_reference", lambda *_: False)
    results = json.loads(TIMES.read_text())["kernels"][kernel]
    assert len(results) == 7
    for shape, result in results.items():
        stack, m, n = map(int, shape.split(" x "))
        m, n = (min(m, n), min(m, n)) if adding else (m, n)
        x = torch.empty(stack, m, n, dtype=torch.float16, device="meta")
        add = torch.empty(stack, m, m, dtype=torch.float16, device="meta") if adding else None
        taken = symmetric_product(x, add=add)
        assert taken == (result["ratio"] < 1), (kernel, shape)
        assert not taken or result["ratio_q3"] < 1, (kernel, shape)


@pytest.mark.parametrize(
    "shape, taken",
    [((12, 768), True), ((11, 768), False), ((4, 2048), True), ((3, 4096), False), ((99, 512), False)],
    ids=str,
)
def test_no_further_than_was_timed_with_a_matrix_to_add(shape, taken):
    """Stacks of fewer than 4, matrices of fewer than 768 rows, and less work than twelve of these are."""
    stack, m = shape
    assert module._pays(torch.empty(stack, m, m, dtype=torch.float16, device="meta"), adding=True) is taken


@needs_triton
def test_an_explicit_request_never_falls_back(triton_device, monkeypatch):
    x = make((6, 4), torch.float32, triton_device)
    with pytest.raises(RuntimeError, match="in_dtypes=False"):
        symmetric_product(x.double(), backend="triton")
    with pytest.raises(RuntimeError, match="no backward"):
        symmetric_product(x, add=symmetric((6, 4), torch.float32, triton_device).requires_grad_(), backend="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        symmetric_product(x, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on_cuda=False"):
        symmetric_product(x.cpu(), backend="triton")


@needs_triton
@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (2, 70, 9)], ids=str)
def test_newton_schulz_is_the_same_by_either(shape, triton_device, monkeypatch):
    """Its two symmetric products are this operation."""
    matrix = make(shape, torch.float32, triton_device)
    expected = newton_schulz(matrix.double(), dtype=torch.float64)
    calls = []

    def by_triton(x, **options):
        calls.append(x.shape)
        return symmetric_product(x, backend="triton", **options)

    monkeypatch.setattr("deep_optim.ops.newton_schulz.symmetric_product", by_triton)
    out = newton_schulz(matrix, dtype=torch.float32)
    assert len(calls) == (3 + 5 if max(shape[-2:]) >= 2 * min(shape[-2:]) else 5 + 5)  # grams, and polynomials
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)
