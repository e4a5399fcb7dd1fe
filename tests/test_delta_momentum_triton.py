"""A whole step of delta momentum, in place: the reference against the optimizer, the kernels against the reference."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deep_optim import DeltaMomentum
from deep_optim.ops import addresses
from deep_optim.ops import delta_momentum_triton as passes
from deep_optim.ops.backend import HAS_TRITON
from deep_optim.ops.delta_momentum import DeltaRule, delta_momentum_read, delta_momentum_step
from large_results import LargeResults
from problem import copy_params, make_params, set_grads, train

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
needs_cuda = pytest.mark.skipif(not (HAS_TRITON and torch.cuda.is_available()), reason="needs Triton and CUDA")

# split, m, n: ragged; beyond one tile of every kernel in every dimension; each side longer
SHAPES = [
    (1, 6, 4),
    (1, 4, 6),
    (1, 5, 5),
    (1, 1, 7),
    (1, 7, 1),
    (1, 1, 1),
    (3, 9, 5),
    (2, 5, 9),
    (1, 70, 37),
    (1, 37, 70),
    (1, 290, 133),
    (1, 133, 290),
    (1, 64, 32),
]
OPTIONS = dict(
    lr=0.1,
    weight_decay=0.2,
    decay=0.9,
    right=0.4,
    left=0.3,
    inner_steps=1,
    gram_norm="eigenvalue",
    features="soft_rows",
    lookahead=2.5,
    maximize=False,
)


def make(shape, count=2, device="cpu", scale=1.0):
    """Parameters, gradients and memories, in float32 and of scale `scale`; the parameters of scale 1."""
    split, m, n = shape
    generator = torch.Generator().manual_seed(42)
    draw = lambda: torch.randn(split * m, n, generator=generator).to(device)  # noqa: E731
    params, grads, memories = ([draw() for _ in range(count)] for _ in range(3))
    return params, [scale * grad for grad in grads], [scale * memory for memory in memories]


def step(tensors, *, lr, weight_decay, backend, **rule):
    params, grads, memories = tensors
    delta_momentum_step(params, grads, memories, DeltaRule(**rule), lr=lr, weight_decay=weight_decay, backend=backend)


def doubles(tensors):
    return [[tensor.detach().double() for tensor in each] for each in tensors]


def assert_matches(tensors, shape, **options):
    """Against the reference in float64: within a few roundings of the products' precision, of what is erased."""
    options = {**OPTIONS, **options}
    exact, plain = doubles(tensors), doubles(tensors)
    start = [[tensor.clone() for tensor in each] for each in doubles(tensors)]
    step(exact, shape=shape, backend="reference", **options)
    step(plain, shape=shape, backend="reference", **{**options, "right": 0.0, "left": 0.0})
    step(tensors, shape=shape, backend="triton", **options)
    params, grads, memories = tensors
    coarse = torch.finfo(torch.bfloat16 if params[0].is_cuda else torch.float32).eps
    eps, lr = torch.finfo(torch.float32).eps, float(options["lr"])
    for i in range(len(params)):
        norm = lambda tensor: torch.linalg.vector_norm(tensor.reshape(shape), dim=(1, 2))  # noqa: E731
        assert torch.equal(grads[i].double(), start[1][i])
        error = 16 * coarse * norm(exact[2][i] - plain[2][i]) + 8 * eps * norm(start[1][i].abs() + start[2][i].abs())
        assert (norm(memories[i].double() - exact[2][i]) <= error).all()
        moved = lr * (options["lookahead"] or 0) * norm(exact[1][i])
        error = lr * error + 8 * eps * (norm(exact[0][i]) + norm(start[0][i]) + moved)
        assert (norm(params[i].double() - exact[0][i]) <= error).all()


@pytest.mark.parametrize("features", ["identity", "soft_rows", "tanh"])
@pytest.mark.parametrize(
    "split, shape", [(1, (6, 4)), (2, (6, 5)), (1, (4, 4)), (1, (4, 3, 2)), (1, (3,)), (1, ())], ids=str
)
def test_the_reference_is_a_step_of_the_optimizer(split, shape, features):
    """Three of them, in float64, at options of which no two have the same value."""
    params = make_params([shape, shape], torch.float64)
    options = dict(lr=0.1, weight_decay=0.2, nesterov=True, lookahead=2.5, inner_steps=2, maximize=True)
    optimizer = DeltaMomentum(
        [{"params": params, "split": split}], momentum=0.8, side="right", inner_lr=0.6, gram_norm="trace",
        feature_map=features, output="identity", backend="reference", **options,
    )  # fmt: skip
    ours, memories = copy_params(params), [torch.zeros_like(param) for param in params]
    rows = shape[0] // split if len(shape) > 1 else 1
    for index in range(3):
        train(optimizer, params, [index])
        set_grads(ours, index)
        with torch.no_grad():
            step(
                (ours, [param.grad for param in ours], memories), backend="auto",
                shape=(split, rows, params[0].numel() // split // rows), lr=0.1, weight_decay=0.2, decay=0.8, right=0.6,
                left=0.0, inner_steps=2, gram_norm="trace", features=features, lookahead=2.5, maximize=True,
            )  # fmt: skip
    for param, our, memory in zip(params, ours, memories, strict=True):
        torch.testing.assert_close(our, param)
        torch.testing.assert_close(memory, optimizer.state[param]["memory"])


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, triton_device):
    """Several rows and columns of tiles, of which each is written before the next one reads what it needs."""
    assert_matches(make(shape, device=triton_device), shape)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 9, 6), (2, 6, 9)], ids=["tall", "wide"])
@pytest.mark.parametrize("gram_norm, inner_steps", [("trace", 1), ("trace", 2), ("eigenvalue", 1), ("eigenvalue", 3)])
@pytest.mark.parametrize("right, left", [(0.5, 0.0), (0.0, 0.5), (0.4, 0.4), (0.4, 0.3)])
def test_matches_the_reference_on_every_side(shape, gram_norm, inner_steps, right, left, triton_device):
    options = dict(right=right, left=left, gram_norm=gram_norm, inner_steps=inner_steps, features="identity")
    assert_matches(make(shape, 1, triton_device), shape, **options)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 6, 4), (2, 4, 6)], ids=["tall", "wide"])
@pytest.mark.parametrize(
    "options",
    [
        dict(lookahead=None),
        dict(lookahead=None, maximize=True, features="identity"),
        dict(lookahead=1.0, maximize=True),
        dict(lr=0.0, decay=0.0),
        dict(weight_decay=0.0, decay=1.0),
        dict(right=0.0, left=0.0),
        dict(lr=torch.tensor(0.3)),
        dict(lr=torch.ones(1), weight_decay=0.5),
    ],
    ids=str,
)
def test_matches_the_reference_for_all_options(shape, options, triton_device):
    if isinstance(lr := options.get("lr"), torch.Tensor):
        options = {**options, "lr": lr.to(triton_device)}
    assert_matches(make(shape, 1, triton_device), shape, **options)


@needs_triton
def test_the_rate_is_read_where_it_is(triton_device, monkeypatch):
    """From a tensor of the device in the kernel; the interpreter's device is the CPU, whose tensors are read before."""
    lr = torch.tensor(0.3, device=triton_device)
    monkeypatch.setattr(passes, "on_device", lambda lr, device: lr)
    assert_matches(make((1, 6, 4), device=triton_device), (1, 6, 4), lr=lr)


def unaligned(tensor):
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 64, 48), (1, 48, 64)], ids=["tall", "wide"])
@pytest.mark.parametrize("which", range(3))
def test_takes_addresses_that_are_not_aligned(shape, which, triton_device):
    tensors = make(shape, device=triton_device)
    tensors[which][1] = unaligned(tensors[which][1])
    assert tensors[which][1].data_ptr() % 16
    assert_matches(tensors, shape)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 6, 4), (1, 4, 6)], ids=["tall", "wide"])
@pytest.mark.parametrize("features", ["identity", "soft_rows"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_size_of_gradient_is_right(shape, features, scale, triton_device):
    """With a step of the weights' own size, so that what they see is measured too."""
    assert_matches(
        make(shape, device=triton_device, scale=scale), shape, features=features, lr=0.1 / scale, weight_decay=0
    )


@needs_triton
@pytest.mark.parametrize("shape", [(1, 6, 4), (2, 4, 6)], ids=["tall", "wide"])
def test_gradients_of_rank_one_are_right(shape, triton_device):
    params, grads, memories = make(shape, device=triton_device)
    grads = [torch.outer(grad[:, 0], grad[0]) for grad in grads]
    grads[0][1:] = 0  # one row is all there is
    for features in ("identity", "soft_rows"):
        assert_matches(copy.deepcopy((params, grads, memories)), shape, features=features)


@needs_triton
@pytest.mark.parametrize("features", ["identity", "soft_rows"])
@pytest.mark.parametrize("shape", [(1, 6, 4), (1, 4, 6)], ids=["tall", "wide"])
def test_a_zero_gradient_only_decays(shape, features, triton_device):
    params, grads, memories = tensors = make(shape, device=triton_device)
    for grad in grads:
        grad.zero_()
    before = copy.deepcopy(tensors)
    step(tensors, shape=shape, backend="triton", **{**OPTIONS, "features": features})
    for i, (param, _, memory) in enumerate(zip(*before, strict=True)):
        torch.testing.assert_close(memories[i], 0.9 * memory)
        torch.testing.assert_close(params[i], 0.98 * param - 0.1 * 0.81 * memory)


@needs_triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_where_it_is(bad, triton_device):
    tensors = make((2, 6, 4), device=triton_device)
    other = copy.deepcopy(tensors)
    tensors[1][0][0, 0] = bad
    for each in (tensors, other):
        step(each, shape=(2, 6, 4), backend="triton", **OPTIONS)
    for ours, theirs in ((tensors[0], other[0]), (tensors[2], other[2])):
        assert not ours[0][:6].isfinite().all()
        assert torch.equal(ours[0][6:], theirs[0][6:]) and torch.equal(ours[1], theirs[1])


@needs_triton
@pytest.mark.parametrize("shape", [(1, 70, 37), (2, 37, 70)], ids=["tall", "wide"])
def test_gives_the_same_bits_twice(shape, triton_device):
    first, second = (make(shape, device=triton_device) for _ in range(2))
    for tensors in (first, second):
        step(tensors, shape=shape, backend="triton", **OPTIONS)
    assert all(map(torch.equal, first[0] + first[2], second[0] + second[2]))


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter, which runs one program after another")
@pytest.mark.parametrize("shape", [(1, 150, 133), (1, 133, 150)], ids=["tall", "wide"])
def test_in_place_is_safe_whatever_program_runs_first(shape, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as interpreter

    first, second = make(shape, 1), make(shape, 1)
    step(first, shape=shape, backend="triton", **OPTIONS)
    in_order = interpreter.set_grid_idx
    backwards = lambda x, y, z: in_order(interpreter.grid_dim[0] - 1 - x, y, z)  # noqa: E731
    monkeypatch.setattr(interpreter, "set_grid_idx", backwards)
    step(second, shape=shape, backend="triton", **OPTIONS)
    assert all(map(torch.equal, first[0] + first[2], second[0] + second[2]))


@needs_triton
@pytest.mark.parametrize("shape", [(1, 200, 12), (1, 12, 200)], ids=["tall", "wide"])
def test_nothing_of_the_weights_size_is_made_but_the_operands(shape, triton_device):
    tensors = make(shape, device=triton_device)
    with LargeResults(tensors[0][0].numel()) as results:
        step(tensors, shape=shape, backend="triton", **OPTIONS)
    results.assert_only(made=1)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 70, 37), (2, 37, 70), (1, 5, 5)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("lookahead", [None, 2.5])
def test_what_is_read_for_an_output_map_is_what_the_weights_descend_along(shape, lookahead, triton_device):
    """From zero by −1 times D, and with the same memory after it, bit for bit; by the reference too."""
    rule = {name: each for name, each in OPTIONS.items() if name not in ("lr", "weight_decay")}
    rule |= {"shape": shape, "lookahead": lookahead}
    for backend in ("triton", "reference"):
        tensors, (_, grads, memories) = make(shape, device=triton_device), make(shape, device=triton_device)
        for param in tensors[0]:
            param.zero_()
        step(tensors, lr=-1.0, weight_decay=0.5, backend=backend, **rule)
        versions = [memory._version for memory in memories]
        direction = delta_momentum_read(grads, memories, DeltaRule(**rule), backend=backend)
        assert direction.shape == (2 * shape[0], *shape[1:])
        assert torch.equal(direction.flatten(), torch.cat([param.flatten() for param in tensors[0]]))
        assert all(map(torch.equal, memories, tensors[2]))
        assert all(memory._version > version for memory, version in zip(memories, versions, strict=True))
        assert all(memory.data_ptr() != direction.data_ptr() for memory in memories)


@needs_triton
@pytest.mark.parametrize("gram_norm, inner_steps, small", [("trace", 1, 0), ("eigenvalue", 1, 1), ("trace", 3, 2)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_costs_what_the_rule_needs(side, gram_norm, inner_steps, small, triton_device):
    """One product of 2 r p² before the kernel's own, another where the left side needs T, and what T takes of 2 p³."""
    tensors = make((1, 32, 8), 1, triton_device)
    options = {**OPTIONS, "right": 0.0, "left": 0.0, side: 0.5, "gram_norm": gram_norm, "inner_steps": inner_steps}
    with FlopCounterMode(display=False) as counter:
        step(tensors, shape=(1, 32, 8), backend="triton", **options)
    large = 2 if side == "left" and small else 1
    assert counter.get_total_flops() == large * 2 * 32 * 8**2 + small * 2 * 8**3


@needs_triton
def test_autograd_hears_of_what_was_written(triton_device):
    params, grads, memories = tensors = make((1, 6, 4), device=triton_device)
    versions = [[tensor._version for tensor in each] for each in tensors]
    step(tensors, shape=(1, 6, 4), backend="triton", **OPTIONS)
    for tensor, version in zip(params + memories, versions[0] + versions[2], strict=True):
        assert tensor._version > version
    assert [grad._version for grad in grads] == versions[1]


def test_a_table_holds_the_addresses_of_all_blocks():
    tensors = [torch.zeros(6, 4), torch.zeros(6, 4)]
    table, aligned = addresses.addresses(tensors, split=3)
    expected = [tensor[2 * block].data_ptr() for tensor in tensors for block in range(3)]
    assert table.tolist() == expected and table.dtype == torch.int64
    assert aligned == all(address % 16 == 0 for address in expected)
    assert not addresses.addresses([unaligned(tensors[0])], split=1)[1]


def test_a_table_is_kept_for_its_addresses_and_its_stream():
    large = (2**62 + 1, 2**53 + 1, 7)  # exact in int64 alone
    device = torch.device("cpu")
    addresses._kept_table.cache_clear()
    table = addresses._kept_table(large, device, 1)
    assert table.tolist() == list(large)
    assert addresses._kept_table(tuple(list(large)), device, 1) is table
    assert addresses._kept_table(large[::-1], device, 1).tolist() == list(large[::-1])
    assert addresses._kept_table(large, device, 2) is not table


@needs_triton
def test_an_explicit_request_never_falls_back(triton_device, monkeypatch):
    params, grads, memories = tensors = make((1, 6, 4), device=triton_device)
    run = lambda tensors, **options: step(  # noqa: E731
        tensors, shape=(1, 6, 4), **{**OPTIONS, "backend": "triton", **options}
    )
    before = copy.deepcopy(tensors)
    with pytest.raises(RuntimeError, match="contiguous float32"):
        run(doubles(tensors))
    with pytest.raises(RuntimeError, match="contiguous float32"):
        run([params, grads, [memory.double() for memory in memories]])
    with pytest.raises(RuntimeError, match="contiguous"):
        run([[torch.cat([t, t], 1)[:, :4] for t in params], grads, memories])
    with pytest.raises(RuntimeError, match="apart in memory"):
        run([params, grads, params])
    with pytest.raises(RuntimeError, match="'tanh'"):
        run(tensors, features="tanh")
    with pytest.raises(ValueError, match="'cuda'"):
        run(tensors, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on_cuda=False"):
        run([[t.cpu() for t in each] for each in tensors])
    for after, kept in zip(tensors, before, strict=True):
        assert all(map(torch.equal, after, kept))


MODEL = ((6, 4), (6, 4), (4, 6), (7,), (7,), (), (4, 3, 2, 2))


@needs_triton
@pytest.mark.parametrize(
    "options",
    [
        {"output": "identity"},
        {"output": "identity", "side": "right", "gram_norm": "trace", "feature_map": "identity", "split": 2},
        {"ns_coefficients": "polar_express", "ns_steps": 9},  # converges, so that roundings do not grow
        {"ns_coefficients": "polar_express", "ns_steps": 9, "nesterov": False, "side": "left", "maximize": True},
    ],
    ids=str,
)
def test_the_optimizer_takes_the_kernels_and_the_same_steps(options, triton_device, monkeypatch):
    options, calls = dict(options), []
    monkeypatch.setattr("deep_optim.ops.newton_schulz.working_dtype", lambda matrix: matrix.dtype)
    monkeypatch.setattr(
        "deep_optim.optimizers.delta_momentum.delta_momentum_triton",
        lambda *args, **kwargs: (calls.append(len(args[1])), passes.delta_momentum_triton(*args, **kwargs))[1],
    )
    start = make_params(MODEL, torch.float64)
    exact, ours = copy_params(start), [torch.nn.Parameter(p.detach().to(triton_device, torch.float32)) for p in start]
    group = {"split": options.pop("split", 1)}
    for params, backend in ((exact, "reference"), (ours, "triton")):
        optimizer = DeltaMomentum([{"params": params, **group}], lr=0.1, backend=backend, **options)
        train(optimizer, params, range(3))
    stepped = [param for param in ours if param.ndim > 1 or options.get("output")]
    assert sum(calls) == 3 * len(stepped) and len(calls) < sum(calls)
    for our, their, before in zip(ours, exact, start, strict=True):
        assert_moved_alike(our, their, before)


def assert_moved_alike(ours, exact, start):
    """What is erased is of the size of what is moved, and multiplied in bfloat16 on a GPU."""
    single = torch.finfo(torch.float32).eps
    coarse = torch.finfo(torch.bfloat16).eps if ours.is_cuda else single
    moved = torch.linalg.vector_norm(exact - start)
    error = torch.linalg.vector_norm(ours.double().cpu() - exact)
    assert error <= 8 * coarse * moved + 8 * single * torch.linalg.vector_norm(start)


@needs_triton
@pytest.mark.parametrize(
    "options",
    [{"output": "adam"}, {"feature_map": "tanh"}, {"inner_lr": 0.0}, {"backend": "reference"}],
    ids=str,
)
def test_the_optimizer_goes_the_other_way_for_what_the_kernels_have_not(options, triton_device, monkeypatch):
    monkeypatch.setattr("deep_optim.optimizers.delta_momentum.delta_momentum_triton", None)
    params = [torch.nn.Parameter(p.detach().to(triton_device)) for p in make_params([(6, 4)])]
    before = [param.detach().clone() for param in params]
    optimizer = DeltaMomentum(params, **{"backend": "triton", "lr": 0.1, **options})
    train(optimizer, params, range(2))
    assert not torch.equal(params[0], before[0])


@needs_triton
def test_the_optimizer_goes_the_other_way_for_parameters_in_another_order(triton_device, monkeypatch):
    monkeypatch.setattr("deep_optim.optimizers.delta_momentum.delta_momentum_triton", None)
    values = make_params([(6, 4)])[0].detach().to(triton_device)
    ours, theirs = torch.nn.Parameter(values.mT.contiguous().mT), torch.nn.Parameter(values.clone())
    for param, backend in ((ours, "triton"), (theirs, "reference")):
        optimizer = DeltaMomentum([param], output="identity", backend=backend, lr=0.1)
        train(optimizer, [param], range(2))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@needs_cuda
@pytest.mark.parametrize("shape", [(256, 192), (192, 256), (1000, 300)], ids=str)
@pytest.mark.parametrize("feature_map", ["identity", "soft_rows"])
def test_five_steps_on_the_gpu_are_those_of_the_cpu(shape, feature_map):
    start = make_params([shape] * 5, torch.float64)
    exact, ours = copy_params(start), [torch.nn.Parameter(param.detach().float().cuda()) for param in start]
    for params in (exact, ours):
        optimizer = DeltaMomentum(params, lr=0.1, side="right", output="identity", feature_map=feature_map)
        train(optimizer, params, range(5))
    for our, their, before in zip(ours, exact, start, strict=True):
        assert_moved_alike(our, their, before)


@needs_cuda
def test_tables_of_a_graph_are_its_own():
    """A table that is made while a graph records is filled when it is replayed: no later step may find it."""
    addresses._kept_table.cache_clear()
    tensors = make((1, 64, 32), device="cuda")
    expected = copy.deepcopy(tensors)
    step(expected, shape=(1, 64, 32), backend="triton", **OPTIONS)
    kept = addresses._kept_table.cache_info().currsize
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(tensors, shape=(1, 64, 32), backend="triton", **OPTIONS)
    assert addresses._kept_table.cache_info().currsize == kept
    graph.replay()
    assert all(map(torch.equal, tensors[0] + tensors[2], expected[0] + expected[2]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_the_parameters_are():
    with torch.cuda.device(0):
        assert_matches(make((1, 64, 32), device="cuda:1"), (1, 64, 32))
