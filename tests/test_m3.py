"""M3 in the limits where it is Muon, against closed forms over the whole history, and beside the printed algorithm."""

import io
import math

import pytest
import torch

from deep_optim import M3, Momentum
from deep_optim.ops.newton_schulz import newton_schulz
from problem import SHAPES, assert_same, copy_params, make_params, set_grads, snapshot, train, trained

MOMENTS = ["row", "elementwise", "gradient", "none"]
MIXES = ["post", "pre"]
SHORT = dict(chunk_size=3, alpha_warmup=2, alpha=0.5)


def gradients(count, shape=(4, 6)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def run(grads, **options):
    """Return the direction of every step, in units of lr, and the state after the last."""
    param = torch.nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = M3([param], lr=1.0, weight_decay=0.0, **options)
    directions = []
    for grad in grads:
        before, param.grad = param.detach().clone(), grad.clone()
        optimizer.step()
        directions.append(before - param.detach())
    return directions, optimizer.state[param]


def orthogonal(matrix):
    return 0.2 * max(matrix.shape) ** 0.5 * newton_schulz(matrix)


def fast(grads, momentum):
    """The memory: every gradient once, faded by the steps since."""
    return sum(momentum ** (len(grads) - 1 - i) * grad for i, grad in enumerate(grads))


def slow(grads, chunk_size, beta):
    """What may be read of the slow memory at the last of these: the means of the chunks that are complete before it."""
    chunks = (len(grads) - 1) // chunk_size
    means = [torch.stack(grads[k * chunk_size : (k + 1) * chunk_size]).mean(0) for k in range(chunks)]
    return sum(((1 - beta) * beta ** (chunks - 1 - k) * mean for k, mean in enumerate(means)), 0 * grads[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("mix", MIXES)
def test_without_slow_memory_and_second_moment_it_is_momentum_bit_for_bit(dtype, nesterov, mix):
    options = dict(shapes=SHAPES, dtype=dtype, nesterov=nesterov)
    ours = trained(M3, alpha=0.0, second_moment="none", mix=mix, **options)
    assert_same(ours, trained(Momentum, **options))


def test_without_slow_memory_the_state_is_momentums():
    optimizers = M3(make_params(), alpha=0.0, second_moment="none"), Momentum(make_params())
    for optimizer in optimizers:
        train(optimizer, optimizer.param_groups[0]["params"], range(2))
    assert_same(*(optimizer.state_dict()["state"] for optimizer in optimizers))


def test_the_first_chunk_is_momentum_bit_for_bit():
    """There is no slow memory yet to divide by 1 + alpha for."""
    ours = trained(M3, SHAPES, steps=3, second_moment="none", **SHORT)
    assert_same(ours, trained(Momentum, SHAPES, steps=3))
    assert not torch.equal(trained(M3, SHAPES, steps=4, second_moment="none", **SHORT)[0], ours[0])


@pytest.mark.parametrize("mix", MIXES)
def test_where_the_memories_agree_the_slow_one_changes_nothing(mix):
    """A constant gradient: lr keeps its meaning, whatever alpha is."""
    grads = gradients(1) * 8
    ours, _ = run(grads, mix=mix, second_moment="none", **SHORT | {"alpha": 3.0})
    plain, _ = run(grads, alpha=0.0, second_moment="none")
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_slow_memory_averages_whole_chunks_with_each_gradient_once(chunk_size, maximize):
    sign = -1 if maximize else 1
    grads = gradients(10)
    for count in range(1, 11):
        options = dict(chunk_size=chunk_size, slow_beta=0.7, maximize=maximize)
        expected = sign * slow(grads[:count], chunk_size, 0.7)
        _, state = run(grads[:count], mix="pre", **options)
        torch.testing.assert_close(state["slow.answer"], expected)
        _, state = run(grads[:count], mix="post", **options)
        torch.testing.assert_close(state["slow.answer"], orthogonal(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_every_direction_in_closed_form(mix, nesterov, warmup):
    """From the history of gradients alone; alpha rises from the first step after the first chunk."""
    grads, chunk_size, beta, momentum, alpha = gradients(9), 2, 0.6, 0.8, 0.5
    directions, _ = run(
        grads, mix=mix, nesterov=nesterov, momentum=momentum, alpha=alpha, alpha_warmup=warmup,
        chunk_size=chunk_size, slow_beta=beta, second_moment="none",
    )  # fmt: skip
    risen = {0: [0, 0, 1, 1, 1, 1, 1], 1: [0, 0, 1, 1, 1, 1, 1], 4: [0, 0, 0.25, 0.5, 0.75, 1, 1]}[warmup] + [1, 1]
    for t, direction in enumerate(directions, start=1):
        memory, remembered, a = fast(grads[:t], momentum), slow(grads[:t], chunk_size, beta), alpha * risen[t - 1]
        read = grads[t - 1] + momentum * memory if nesterov else memory
        if mix == "post":
            expected = (orthogonal(read) + a * orthogonal(remembered)) / (1 + a)
        else:
            expected = orthogonal((1 - momentum) * read + a * remembered)
        torch.testing.assert_close(direction, expected, rtol=1e-6, atol=1e-9)  # Newton-Schulz grows rounding


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("second_moment", MOMENTS[:-1])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_the_second_moment_in_closed_form(mix, second_moment, shape):
    """Of what is seen without it, by its definition as a weighted mean; the norm stays what it was."""
    grads, beta2, eps = gradients(7, shape), 0.9, 1e-3
    plain, _ = run(grads, mix=mix, second_moment="none", **SHORT)
    ours, _ = run(grads, mix=mix, second_moment=second_moment, beta2=beta2, eps=eps, **SHORT)
    seen = {
        "row": [direction.square().mean(1, keepdim=True) for direction in plain],
        "elementwise": [direction.square() for direction in plain],
        "gradient": [grad.square() for grad in grads],
    }[second_moment]
    for t in range(1, 8):
        weights = [beta2 ** (t - 1 - i) for i in range(t)]
        mean = sum(weight * square for weight, square in zip(weights, seen, strict=False)) / sum(weights)
        expected = plain[t - 1] / (mean.sqrt() + eps)
        expected *= plain[t - 1].norm() / expected.norm()
        torch.testing.assert_close(ours[t - 1], expected)


@pytest.mark.parametrize("second_moment", MOMENTS)
def test_a_small_update_is_not_blown_up(second_moment):
    """One direction of many: bringing the update to a fixed Frobenius norm would make it √m times as long."""
    (direction,), _ = run([torch.outer(*gradients(2, (6,)))], second_moment=second_moment)
    largest = 0.2 * 6**0.5 * 1.25  # Newton-Schulz's largest singular value
    assert 0.2 * 6**0.5 * 0.65 < direction.norm() < largest


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("second_moment", MOMENTS)
@pytest.mark.parametrize("power", [-24, 24])
def test_the_loss_scale_does_not_matter_except_beside_eps(mix, second_moment, power):
    """Bit for bit in powers of two. Under "gradient" eps stands beside the gradient, as in Adam."""
    grads = gradients(8)
    scaled = [grad * 2.0**power for grad in grads]
    options = dict(mix=mix, second_moment=second_moment, **SHORT)
    for eps in (0.0, 1e-2):
        same = all(map(torch.equal, run(grads, eps=eps, **options)[0], run(scaled, eps=eps, **options)[0]))
        assert same == (second_moment != "gradient" or eps == 0)


@pytest.mark.parametrize("second_moment", MOMENTS)
def test_an_eps_of_zero_divides_nothing_by_zero(second_moment):
    grads = gradients(4)
    grads[0].zero_()
    for grad in grads:
        grad[1].zero_()  # a dead row
    directions, _ = run(grads, second_moment=second_moment, eps=0.0, **SHORT)
    assert all(direction.isfinite().all() for direction in directions)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [False, True])
def test_resumes_bit_for_bit_in_the_middle_of_a_chunk(mix, dtype, spread):
    options = dict(chunk_size=5, alpha_warmup=3, mix=mix, spread=spread)
    params = make_params(dtype=dtype)
    train(optimizer := M3(params, **options), params, range(7))
    copies, file = copy_params(params), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = M3(copies)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same(train(resumed, copies, range(7, 18)), train(optimizer, params, range(7, 18)))
    assert_same(resumed.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("mix", MIXES)
def test_each_parameter_counts_its_own_gradients(mix):
    """In one stack, each with gradients of its own at steps of its own, as experts have: as each would alone."""
    params = make_params([(4, 6)] * 5, torch.float64)
    copies = copy_params(params)
    together, alone = M3(params, mix=mix, **SHORT), [M3([copy], mix=mix, **SHORT) for copy in copies]
    for step in range(12):
        for tensors in (params, copies):
            set_grads(tensors, step)
            for index, tensor in enumerate(tensors):
                if step % (index + 1):  # the first at every step, the second at every other, ...
                    tensor.grad = None
        together.step()
        for optimizer in alone:
            optimizer.step()
    assert [together.state[param]["step"].item() for param in params] == [12, 6, 4, 3, 3]
    torch.testing.assert_close(params, copies)
    for param, copy, optimizer in zip(params, copies, alone, strict=True):
        torch.testing.assert_close(together.state[param]["slow.answer"], optimizer.state[copy]["slow.answer"])


@pytest.mark.parametrize(
    "options, calls",
    [
        ({}, [4, 2, 2, 2, 4, 2, 2, 2, 4]),  # two memories of two shapes; and each slow one, at the start of a chunk
        ({"mix": "pre"}, [2] * 9),
        ({"alpha": 0.0}, [2] * 9),
        ({"capturable": True}, [4] * 9),
        ({"spread": True}, [3, 2, 3, 2, 3, 2, 3, 2, 3]),
        ({"spread": True, "chunk_size": 2}, [3] * 9),
        ({"spread": True, "mix": "pre"}, [2] * 9),
        ({"capturable": True, "mix": "pre"}, [2] * 9),
    ],
    ids=str,
)
def test_the_slow_memory_is_orthogonalised_once_a_chunk(options, calls, monkeypatch):
    from deep_optim.optimizers import m3

    count = 0

    def counted(*arguments):
        nonlocal count
        count += 1
        return original(*arguments)

    original = m3.orthogonalise
    monkeypatch.setattr(m3, "orthogonalise", counted)
    params = make_params([(4, 6), (6, 4)])
    optimizer, counts = M3(params, **{"chunk_size": 4} | options), []
    for step in range(9):
        count = 0
        train(optimizer, params, [step])
        counts.append(count)
    assert counts == calls


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
def test_spread_over_a_chunk_each_memory_is_read_at_its_own_step(capturable, absent):
    """The k-th of n is read k C / n steps into each chunk, as it is then, whether or not the others have gradients."""
    params, chunk_size, beta, count = make_params([(4, 6)] * 3, torch.float64), 6, 0.7, 11
    bias = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))  # has no memory and takes no turn
    options = dict(chunk_size=chunk_size, slow_beta=beta, capturable=capturable)
    optimizer, seen = M3([params[0], bias, *params[1:]], spread=True, **options), gradients(count)
    for grad in seen:
        for param in params:
            param.grad = None if absent and param is params[0] else grad.clone()
        optimizer.step()
    for param, late in list(zip(params, (0, 2, 4), strict=True))[absent:]:
        last = (count - 1 - late) // chunk_size * chunk_size + late  # gradients before the step at which it was read
        read = sum(
            beta ** ((last - 1) // chunk_size - i // chunk_size) * (1 - beta) / chunk_size * seen[i]
            for i in range(last)
        )
        expected = orthogonal(read) if last else torch.zeros(4, 6, dtype=torch.float64)
        torch.testing.assert_close(optimizer.state[param]["slow.answer"], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mix", MIXES)
def test_the_host_decides_nothing_that_changes_the_result(mix):
    grads = gradients(8)
    ours, _ = run(grads, mix=mix, capturable=True, **SHORT)
    assert_same(ours, run(grads, mix=mix, **SHORT)[0])


@pytest.mark.parametrize(
    "options, size",
    [
        ({}, 12 * 24 + 4 * 6),
        ({"mix": "pre"}, 12 * 24 + 4 * 6),
        ({"second_moment": "none"}, 12 * 24),
        ({"second_moment": "elementwise"}, 16 * 24),
        ({"second_moment": "gradient"}, 16 * 24),
        ({"alpha": 0.0}, 4 * 24 + 4 * 6),
        ({"alpha": 0.0, "second_moment": "none"}, 4 * 24),
    ],
    ids=str,
)
def test_state_is_as_small_as_promised(options, size):
    (param,) = make_params([(6, 4)])
    train(optimizer := M3([param], **options), [param], [0])
    state = {name: value for name, value in optimizer.state[param].items() if name != "step"}
    assert sum(value.numel() * value.element_size() for value in state.values()) == size


@pytest.mark.parametrize("second_moment", MOMENTS)
@pytest.mark.parametrize("mix", MIXES)
def test_split_blocks_are_matrices_of_their_own(mix, second_moment):
    options = dict(mix=mix, second_moment=second_moment, **SHORT)
    (fused,) = make_params([(12, 5)], torch.float64)
    blocks = [torch.nn.Parameter(block.clone()) for block in fused.detach().chunk(3)]
    ours, theirs = M3([{"params": [fused], "split": 3}], **options), M3(blocks, **options)
    for grad in gradients(8, (12, 5)):
        fused.grad = grad
        for block, part in zip(blocks, grad.chunk(3), strict=True):
            block.grad = part.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(fused, torch.cat(blocks))


def test_a_slow_memory_cannot_be_asked_for_later():
    """Said before anything is stepped, in any group; turning it off is allowed."""
    params = make_params([(4, 6), (6, 4), (5,)])
    optimizer = M3([{"params": params[:1]}, {"params": params[1:], "alpha": 0.0}])
    train(optimizer, params, range(2))
    before = snapshot(params)
    optimizer.param_groups[1]["alpha"] = 0.1
    with pytest.raises(RuntimeError, match=r"alpha was 0 and is 0.1 now, but a parameter of size \(6, 4\)"):
        train(optimizer, params, [2])
    assert_same(snapshot(params), before)
    optimizer.param_groups[1]["alpha"] = optimizer.param_groups[0]["alpha"] = 0.0
    assert not torch.equal(train(optimizer, params, [2])[0], before[0])


def test_alpha_can_be_turned_off_and_on_again():
    """What the slow memory is written with does not depend on whether it is read."""
    params, others = make_params(), make_params()
    optimizer, steady = M3(params, **SHORT), M3(others, **SHORT)
    train(optimizer, params, range(4))
    optimizer.param_groups[0]["alpha"] = 0.0
    train(optimizer, params, range(4, 8))
    train(steady, others, range(8))
    for param, other in zip(params, others, strict=True):
        for name in {"slow.memory", "slow.answer"} & optimizer.state[param].keys():
            assert_same(optimizer.state[param][name], steady.state[other][name])


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"momentum": 1.0, "mix": "pre"}, "Invalid momentum value: 1.0, mix='pre' needs less than 1"),
        ({"slow_beta": 1.0}, "Invalid slow_beta value: 1.0"),
        ({"beta2": 1.0}, "Invalid beta2 value: 1.0"),
        ({"chunk_size": 0}, "Invalid chunk_size value: 0"),
        ({"chunk_size": 2.5}, "Invalid chunk_size value: 2.5"),
        ({"alpha": math.inf}, "Invalid alpha value: inf"),
    ],
    ids=str,
)
def test_refuses_what_it_cannot_do(bad, words):
    with pytest.raises(ValueError, match=words):
        M3(make_params(), **bad)


def test_the_output_map_is_no_choice():
    with pytest.raises(ValueError, match="Invalid output: 'identity'"):
        M3([{"params": make_params(), "output": "identity"}])


# Algorithm 1 as it is printed, and what it does.


def algorithm_1(grads, beta1=0.9, beta2=0.9, beta3=0.9, alpha=0.5, frequency=3):
    """Return the direction of every step, in units of η, and M₁, M₂ before each; gradients are numbered from 1."""
    m1 = m2 = v = torch.zeros_like(grads[0])
    directions, memories = [], []
    for k in range(math.ceil(len(grads) / frequency)):
        printed = range((k - 1) * frequency, k * frequency + 1)  # both bounds belong to the sum
        m2 = m2 + beta3 * sum((grads[i - 1] for i in printed if i >= 1), torch.zeros_like(m2))
        o2 = newton_schulz(m2)
        for t in range(k * frequency + 1, min((k + 1) * frequency, len(grads)) + 1):
            memories.append((m1, m2))
            m1 = m1 + beta1 * grads[t - 1]
            v = v + beta2 * grads[t - 1] ** 2
            directions.append((newton_schulz(m1) + alpha * o2) / v.sqrt())
    return directions, memories


def assert_equal_directions(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # Newton-Schulz grows rounding


def test_printed_beta1_and_beta3_do_nothing():
    """Factors of a sum, which Newton-Schulz takes out again."""
    grads = gradients(9)
    assert_equal_directions(algorithm_1(grads, beta1=0.1, beta3=0.3)[0], algorithm_1(grads)[0])


def test_printed_beta2_is_part_of_the_learning_rate():
    grads = gradients(9)
    halved = [direction / 2 for direction in algorithm_1(grads, beta2=0.2)[0]]
    assert_equal_directions(algorithm_1(grads, beta2=0.8)[0], halved)


def test_printed_slow_memory_is_a_stale_copy_of_the_fast_one():
    """At the start of a chunk both hold all gradients so far, but for those on the bounds, which count twice."""
    grads, frequency = gradients(12), 3
    _, memories = algorithm_1(grads, beta1=1.0, beta3=1.0, frequency=frequency)
    for k in range(1, 4):
        fast, slow = memories[k * frequency]
        torch.testing.assert_close(fast, sum(grads[: k * frequency]))
        twice = sum((grads[j * frequency - 1] for j in range(1, k)), torch.zeros_like(fast))
        torch.testing.assert_close(slow, fast + twice)


def test_printed_steps_shrink_with_the_loss_and_with_time():
    """V is a sum of squares that never decays: AdaGrad's, under a numerator that has lost the gradient's scale."""
    grads = gradients(9)
    hundredth = [direction / 100 for direction in algorithm_1(grads)[0]]
    assert_equal_directions(algorithm_1([100 * grad for grad in grads])[0], hundredth)
    constant, _ = algorithm_1(gradients(1) * 16)
    torch.testing.assert_close(constant[15], constant[3] / 2, rtol=1e-6, atol=1e-9)
