"""The kernels of a deep memory of gradients against the reference in float64, and what the compiler makes of them."""

import pytest
import torch

from deep_optim.ops.backend import HAS_TRITON
from deep_optim.ops.deep_momentum import deep_momentum
from deep_optim.ops.mlp_memory import MLPMemory
from deep_optim.ops.two_sided_delta import two_sided_delta
from large_results import LargeResults

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

# ((..., m, n), h): ragged; beyond one tile of every kernel in every dimension; each side longer
SHAPES = [
    ((6, 4), 3),
    ((4, 6), 3),
    ((5, 5), 2),
    ((1, 7), 2),
    ((7, 1), 2),
    ((1, 1), 1),
    ((6, 4), 0),
    ((4, 6), 0),
    ((2, 3, 9, 5), 4),
    ((3, 5, 9), 4),
    ((70, 37), 17),
    ((37, 70), 17),
    ((2, 140, 133), 67),
    ((133, 140), 67),
    ((64, 32), 16),
]
OPTIONS = dict(decay=0.9, inner_lr=0.5, inner_steps=3, lookahead=2.5)


def make(shape, h, device="cpu"):
    *batch, m, n = shape
    rng = torch.Generator().manual_seed(42)
    w1, w2 = ((h, n), (m, h)) if m < n else ((m, h), (h, n))
    linear, w1, w2, written = (
        torch.randn(*batch, *size, generator=rng, dtype=torch.float64).to(device) for size in ((m, n), w1, w2, (m, n))
    )
    return MLPMemory(linear, w1, w2 / min(m, n) ** 0.5), written


def single(memory):
    return MLPMemory(*(weight.float() for weight in memory))


def assert_close(out, expected, erased):
    """Within a few roundings of the products' precision, of each memory's size of what is erased."""
    eps = torch.finfo(torch.bfloat16 if out.is_cuda else torch.float32).eps
    assert out.shape == expected.shape and out.dtype == torch.float32
    if out.numel():
        bound = 16 * eps * erased + 4 * torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(expected)
        assert (torch.linalg.matrix_norm(out.double() - expected) <= bound).all()


def assert_matches(memory, written, **options):
    """Against the reference in float64; returns what the kernels made."""
    exact = MLPMemory(*(weight.double() for weight in memory)), written.double()
    expected, expected_read = deep_momentum(*exact, backend="reference", **options)
    plain, _ = deep_momentum(*exact, backend="reference", **{**options, "inner_lr": 0.0})
    erased = [torch.linalg.matrix_norm(a - b) for a, b in zip(expected[:2], plain[:2], strict=True)]
    out, read = deep_momentum(memory, written, backend="triton", **options)
    size = erased[0].square().add(erased[1].square()).sqrt()  # W₁ and M are one matrix
    assert_close(out.linear, expected.linear, size)
    assert_close(out.w1, expected.w1, size)
    assert_close(read, expected_read, size)
    return out, read


@pytest.mark.parametrize("shape, h", SHAPES, ids=str)
def test_matches_the_reference(shape, h, triton_device):
    memory, written = make(shape, h, triton_device)
    assert_matches(single(memory), written.float(), **OPTIONS)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=["tall", "wide"])
@pytest.mark.parametrize("lookahead", [None, 0.0, 1.0])
@pytest.mark.parametrize("decay, inner_lr, inner_steps", [(0.5, 0.7, 1), (0.0, 0.3, 2), (1.0, 0.0, 1)])
def test_matches_the_reference_for_all_options(shape, decay, inner_lr, inner_steps, lookahead, triton_device):
    memory, written = make(shape, 3, triton_device)
    options = dict(decay=decay, inner_lr=inner_lr, inner_steps=inner_steps, lookahead=lookahead)
    out, read = assert_matches(single(memory), written.float(), **options)
    assert (read.data_ptr() == out.linear.data_ptr()) == (lookahead is None)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=["tall", "wide"])
@pytest.mark.parametrize("gram_norm", ["eigenvalue", "trace"])
@pytest.mark.parametrize("short, long", [(0.4, 0.4), (0.4, 0.3), (0.4, 0.0), (0.0, 0.3)])
def test_is_the_two_sided_delta_rule_without_hidden_features(shape, short, long, gram_norm, triton_device):
    memory, written = make((3, *shape), 0, triton_device)
    options = dict(decay=0.9, short=short, long=long, inner_steps=3, gram_norm=gram_norm)
    expected, expected_read = two_sided_delta(memory.linear, written, backend="reference", **options)
    out, read = two_sided_delta(memory.linear.float(), written.float(), backend="triton", **options)
    erased = torch.linalg.matrix_norm(expected - 0.9 * memory.linear - written)
    assert_close(out, expected, erased)
    assert_close(read, expected_read, erased)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)], ids=["tall", "wide"])
def test_takes_any_strides_and_leaves_arguments_alone(shape, triton_device):
    memory, written = make((2, *shape), 3, triton_device)
    tensors = [t.float().mT.contiguous().mT for t in (*memory, written)]
    tensors[0] = torch.stack([tensors[0], tensors[0]], -1)[..., 0]
    before = [t.clone() for t in tensors]
    out, read = assert_matches(MLPMemory(*tensors[:3]), tensors[3], **OPTIONS)
    assert all(map(torch.equal, tensors, before))
    assert all(t.is_contiguous() for t in (*out[:2], read))


def test_a_broadcast_memory_is_as_good_as_its_copy(triton_device):
    memory, written = make((6, 4), 3, triton_device)
    memory, written = MLPMemory(*(w.float().expand(2, *w.shape) for w in memory)), written.float().expand(2, 6, 4)
    assert_matches(memory, written, **OPTIONS)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3, 4), (2, 0, 3), (3, 0)], ids=str)
def test_takes_an_empty_stack(shape, triton_device):
    memory, written = make(shape, 2, triton_device)
    out, read = deep_momentum(single(memory), written.float(), backend="triton", **OPTIONS)
    assert out.linear.shape == read.shape == shape
    torch.testing.assert_close(out.w1.double(), 0.9 * memory.w1)


@pytest.mark.parametrize("shape", [(70, 37), (37, 70)], ids=["tall", "wide"])
def test_gives_the_same_bits_twice(shape, triton_device):
    memory, written = make(shape, 17, triton_device)
    first, second = (deep_momentum(single(memory), written.float(), backend="triton", **OPTIONS) for _ in range(2))
    assert all(map(torch.equal, (*first[0], first[1]), (*second[0], second[1])))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=["tall", "wide"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_size_of_gradient_is_right(shape, scale, triton_device):
    memory, written = make(shape, 3, triton_device)
    scaled = MLPMemory(scale * memory.linear, scale * memory.w1, memory.w2)
    assert_matches(single(scaled), (scale * written).float(), **OPTIONS)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=["tall", "wide"])
def test_a_zero_gradient_only_decays(shape, triton_device):
    memory, written = make(shape, 3, triton_device)
    memory = single(memory)
    out, read = deep_momentum(memory, torch.zeros_like(written).float(), backend="triton", **OPTIONS)
    torch.testing.assert_close(out.linear, 0.9 * memory.linear)
    torch.testing.assert_close(out.w1, 0.9 * memory.w1)
    torch.testing.assert_close(read, 0.81 * memory.linear)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad, triton_device):
    memory, written = make((2, 6, 4), 3, triton_device)
    memory, written = single(memory), written.float()
    expected, _ = deep_momentum(memory, written, backend="triton", **OPTIONS)
    written[0, 0, 0] = bad
    out, read = deep_momentum(memory, written, backend="triton", **OPTIONS)
    for tensor in (out.linear, out.w1, read):
        assert not tensor[0].isfinite().all()
    assert torch.equal(out.linear[1], expected.linear[1])  # the other memory of the stack does not notice


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=["tall", "wide"])
def test_hidden_features_saturate_without_overflow(shape, triton_device):
    memory, written = make(shape, 3, triton_device)
    memory = memory._replace(w2=1e25 * memory.w2)
    out, _ = assert_matches(single(memory), written.float(), **OPTIONS)
    assert out.w1.isfinite().all()


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=["tall", "wide"])
def test_the_hidden_weights_are_trained_as_by_the_reference(shape, triton_device):
    memory, written = make(shape, 3, triton_device)
    memory, written = single(memory), written.float()
    expected, _ = deep_momentum(memory, written, hidden_lr=0.1, backend="reference", **OPTIONS)
    out, _ = deep_momentum(memory, written, hidden_lr=0.1, backend="triton", **OPTIONS)
    assert torch.equal(out.w2, expected.w2) and not torch.equal(out.w2, memory.w2)


@pytest.mark.parametrize("shape", [(200, 12), (12, 200)], ids=["tall", "wide"])
def test_nothing_of_the_memory_s_size_is_written_but_operands_and_results(shape, triton_device):
    memory, written = make(shape, 4, triton_device)
    memory, written = single(memory), written.float()
    with LargeResults(written.numel()) as results:
        deep_momentum(memory, written, backend="triton", **OPTIONS)
    results.assert_only(made=3)  # [A | Φ], M′ and D


def test_auto_takes_the_reference_on_the_cpu(monkeypatch):
    memory, written = make((6, 4), 3)
    memory, written = single(memory), written.float()
    monkeypatch.setattr("deep_optim.ops.two_sided_delta.write_operands", None)  # the kernels' way
    expected, expected_read = deep_momentum(memory, written, backend="reference", **OPTIONS)
    out, read = deep_momentum(memory, written, **OPTIONS)
    assert torch.equal(out.linear, expected.linear) and torch.equal(read, expected_read)


def both(memory, written, **options):
    yield lambda: deep_momentum(memory, written, decay=0.9, inner_lr=0.5, **options)
    yield lambda: two_sided_delta(memory.linear, written, decay=0.9, short=0.5, long=0.0, **options)


def test_an_explicit_request_never_falls_back(triton_device, monkeypatch):
    memory, written = make((6, 4), 3, triton_device)
    for step in both(memory, written, backend="triton"):
        with pytest.raises(RuntimeError, match="in_dtypes=False"):
            step()
    memory, written = single(memory), written.float()
    for step in both(memory, written.clone().requires_grad_(), backend="triton"):
        with pytest.raises(RuntimeError, match="no backward"):
            step()
    for step in both(memory, written, backend="cuda"):
        with pytest.raises(ValueError, match="'cuda'"):
            step()
    monkeypatch.setattr("deep_optim.ops.two_sided_delta.write_operands", None)
    for step in both(memory, written, backend="triton"):
        with pytest.raises(TypeError, match="not callable"):
            step()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for step in both(MLPMemory(*(weight.cpu() for weight in memory)), written.cpu(), backend="triton"):
        with pytest.raises(RuntimeError, match="on_cuda=False"):
            step()
