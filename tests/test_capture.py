"""The captured Grams against the inputs themselves, in every way in which a model can be run."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from deep_optim import capture_inputs, param_groups
from deep_optim.capture import InputCapture
from deep_optim.layer_inputs import spread_places


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mean_gram(rows):
    """By the definition: the mean of x̂ x̂ᵀ over the rows that are not zero."""
    rows = rows.reshape(-1, rows.shape[-1]).double()
    rows = rows[rows.norm(dim=1) > 0]
    return sum(torch.outer(row, row) / row.dot(row) for row in rows) / len(rows)


def net(width=4, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def backward(model, x):
    model(x).square().sum().backward()


@pytest.mark.parametrize("tokens", [3, 6, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_is_the_mean_over_the_inputs_in_full_precision(tokens, dtype):
    """No more tokens than features are kept as rows, more as their Gram, either way at least in float32."""
    layer, x = nn.Linear(6, 2, dtype=dtype), draw(tokens, 6, dtype=dtype)
    capture = capture_inputs(layer, every=1)
    backward(layer, x)
    gram = capture.gram(layer.weight)
    rows, folded = capture.keys(layer.weight)
    assert (folded is None, rows is None) == (tokens <= 6, tokens > 6)
    assert gram.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(gram.double(), mean_gram(x), rtol=0, atol=1e-15 if dtype == torch.float64 else 2e-7)


@pytest.mark.parametrize("parts", [2, 3])
def test_gradient_accumulation_is_the_batch(parts):
    """Micro-batches of unequal size, among them rows, Grams and both."""
    model, x = net(), draw(29, 4)
    capture = capture_inputs(model, every=1)
    for part in x.split([1, 28] if parts == 2 else [2, 1, 26]):
        backward(model, part)
    torch.testing.assert_close(capture.gram(model[0].weight), mean_gram(x))
    torch.testing.assert_close(capture.gram(model[2].weight), mean_gram(model[:2](x).detach()))


def test_collecting_between_micro_batches_loses_nothing():
    model, x = net(), draw(9, 4)
    capture = capture_inputs(model, every=1)
    for part in x.split([1, 1, 3, 4]):
        backward(model, part)
        capture.collect()
    torch.testing.assert_close(capture.gram(model[0].weight), mean_gram(x))


def test_a_question_in_between_changes_no_later_answer():
    model, x = net(), draw(3, 4)
    capture = capture_inputs(model, every=1)
    for end in (1, 2, 3):
        backward(model, x[end - 1 : end])
        torch.testing.assert_close(capture.gram(model[0].weight), mean_gram(x[:end]))


def test_forgets_what_was_used_and_keeps_the_rest():
    model, x = net(), draw(7, 4)
    capture = capture_inputs(model, every=1)
    backward(model, x)
    capture.collect()
    capture.discard(model[0].weight)
    assert model[0].weight not in capture and model[2].weight in capture
    backward(model, x[:2])
    torch.testing.assert_close(capture.gram(model[0].weight), mean_gram(x[:2]))
    torch.testing.assert_close(capture.gram(model[2].weight), mean_gram(model[:2](torch.cat([x, x[:2]])).detach()))
    backward(model, x)
    capture.clear()
    with pytest.raises(KeyError):
        capture.gram(model[0].weight)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("tokens", [2, 20], ids=["rows", "gram"])
def test_activation_checkpointing_counts_once(reentrant, tokens):
    """The second pass, inside backward, repeats one that had gradients. A plain pass counts as much."""
    model, first, second = net(), draw(tokens, 4), draw(tokens, 4, seed=1)
    capture = capture_inputs(model, every=1)
    model[2](checkpoint(model[:2], first.clone().requires_grad_(), use_reentrant=reentrant)).sum().backward()
    backward(model, second)
    torch.testing.assert_close(capture.gram(model[0].weight), mean_gram(torch.cat([first, second])))


def test_a_checkpoint_inside_the_second_micro_batch_counts_once():
    model, first, second = net(), draw(3, 4), draw(3, 4, seed=1)
    capture = capture_inputs(model, every=1)
    backward(model, first)
    capture.collect()
    checkpoint(model, second, use_reentrant=False).sum().backward()
    torch.testing.assert_close(capture.gram(model[0].weight), mean_gram(torch.cat([first, second])))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpoint_counts_once_where_the_optimizer_steps_inside_backward(reentrant):
    """The last layer is stepped, and all that was seen collected, before the first layer's second pass."""
    model, batches = net(), [draw(3, 4), draw(9, 4, seed=1)]
    capture, seen = capture_inputs(model, every=1), []

    def step(weight):
        gram = capture.gram(weight)
        capture.discard(weight)
        if weight is model[0].weight:
            seen.append(gram)

    for layer in (model[0], model[2]):
        layer.weight.register_post_accumulate_grad_hook(step)
    for batch in batches:
        hidden = checkpoint(model[:2], batch.clone().requires_grad_(), use_reentrant=reentrant)
        model[2](hidden).sum().backward()
    torch.testing.assert_close(seen, [mean_gram(batch) for batch in batches])


@pytest.mark.parametrize("device_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_reach_the_gram(device_dtype):
    model, x = net(dtype=torch.float32), draw(30, 4, dtype=torch.float32)
    capture = capture_inputs(model, every=1)
    with torch.autocast("cpu", dtype=device_dtype):
        model(x).float().sum().backward()
    gram = capture.gram(model[0].weight)
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram.double(), mean_gram(x), rtol=0, atol=2e-7)


def test_a_compiled_model_is_one_graph_and_is_not_compiled_again():
    model = net()
    capture = capture_inputs(model, every=2)
    twin = deepcopy(model)
    eager = capture_inputs(twin, every=2)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(4):
        for each in (compiled, twin):
            backward(each, draw(13, 4, seed=step))
            backward(each, draw(13, 4, seed=10 + step))
        for ours, theirs in zip(model, twin, strict=True):
            if isinstance(ours, nn.Linear):
                torch.testing.assert_close(capture.gram(ours.weight), eager.gram(theirs.weight))
                capture.discard(ours.weight)
                eager.discard(theirs.weight)
    assert counter.frame_count == 2  # the first micro-batch, and the next
    torch._dynamo.reset()


def test_all_uses_of_a_tied_weight_count():
    first, second = nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 4, dtype=torch.float64)
    second.weight = first.weight
    model, x = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), first), draw(6, 4)
    capture = capture_inputs(model, every=1)
    backward(model, x)
    inputs = torch.cat([x, model[:2](x), model[:4](x)]).detach()
    capture.clear()
    backward(model, x)
    torch.testing.assert_close(capture.gram(first.weight), mean_gram(inputs))


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference", "frozen"])
def test_ignores_what_is_not_trained(how):
    model, x = net(), draw(7, 4)
    capture = capture_inputs(model, every=1)
    backward(model, x)
    if how == "eval":
        model.eval()(draw(3, 4))
    elif how == "frozen":
        model.requires_grad_(False)(draw(3, 4))
    else:
        with torch.no_grad() if how == "no_grad" else torch.inference_mode():
            model(draw(3, 4))
    torch.testing.assert_close(capture.gram(model[0].weight), mean_gram(x))


def test_a_weight_that_thaws_is_captured_from_then_on():
    model, x = net(), draw(7, 4)
    model[0].weight.requires_grad_(False)
    capture = capture_inputs(model, every=1)
    backward(model, x)
    with pytest.raises(KeyError):
        capture.gram(model[0].weight)
    model[0].weight.requires_grad_(True)
    backward(model, x)
    torch.testing.assert_close(capture.gram(model[0].weight), mean_gram(x))


def test_empty_batches_and_rows_without_a_direction_weigh_nothing():
    model, x = net(), draw(5, 4)
    capture = capture_inputs(model, every=1)
    for nothing in (x[:0], torch.zeros_like(x[:2])):
        backward(model, nothing)
        gram = capture.gram(model[0].weight)
        assert gram.shape == (4, 4) and not gram.any()  # and no NaN
    capture.clear()
    without = torch.zeros(3, 4, dtype=torch.float64)
    without[1, 2], without[2, 0] = torch.inf, torch.nan
    model(torch.cat([x, without]))
    torch.testing.assert_close(capture.gram(model[0].weight), mean_gram(x))


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e15, 1e25])
def test_the_scale_of_an_input_does_not_matter_until_it_is_no_number(scale):
    layer, x = nn.Linear(4, 2), draw(8, 4, dtype=torch.float32)
    capture = capture_inputs(layer, every=1)
    backward(layer, x * scale)
    gram = capture.gram(layer.weight).double()
    assert gram.isfinite().all()
    if 1e-12 < scale < 1e19:
        torch.testing.assert_close(gram, mean_gram(x), rtol=0, atol=1e-6)


def test_layers_with_one_input_share_one_gram():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(4))

        def forward(self, x):
            return self.out(self.q(x) * self.k(x) + self.v(x))

    model, x = Attention(), draw(9, 4)
    capture = capture_inputs(model, every=1)
    calls = []
    with CountMatmuls(calls):
        model(x)
    assert len(calls) == 2  # x, and what out sees
    grams = [capture.gram(layer.weight) for layer in (model.q, model.k, model.v)]
    assert all(torch.equal(gram, grams[0]) for gram in grams)
    model.q(x.mul_(-2)[:, [1, 0, 2, 3]].clone())  # written in place: another input
    model.k(x)
    x[:, 0] = 0
    model.v(x)
    grams = [capture.gram(layer.weight) for layer in (model.q, model.k, model.v)]
    assert not torch.equal(grams[0], grams[1]) and not torch.equal(grams[1], grams[2])
    assert capture.gram(model.out.weight).shape == (4, 4)


def test_convolutions_of_one_input_share_only_what_they_read_alike():
    options = ({}, {}, {"kernel_size": 3}, {}, {"stride": 2}, {}, {"dilation": 2})  # neighbours differ in one thing
    layers = [nn.Conv1d(2, 3, **{"kernel_size": 2, **each}).double() for each in options]
    capture, x = capture_inputs(nn.ModuleList(layers), every=1), draw(3, 2, 9)
    for layer in layers:
        layer(x)
    grams = [capture.gram(layer.weight) for layer in layers]
    assert torch.equal(grams[0], grams[1])
    for layer, gram in zip(layers, grams, strict=True):
        step, gap, length = layer.stride[0], layer.dilation[0], layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
        patches = [x[:, :, t : t + length : gap].flatten(1) for t in range(0, 10 - length, step)]
        torch.testing.assert_close(gram, mean_gram(torch.stack(patches)))


class CountMatmuls(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the batched products: of the model's layers, none."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.calls.append(func)
        return func(*args, **(kwargs or {}))


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3), (5, 4, 9)),
    "2d": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 3, 7, 6)),
    "same": (nn.Conv2d(2, 4, 3, padding="same"), (2, 2, 5, 4)),
    "reflect": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 4)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 4)),
    "depthwise": (nn.Conv1d(4, 4, 2, groups=4), (2, 4, 5)),
    "3d": (nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 3)),
    "unbatched": (nn.Conv2d(2, 3, 2), (2, 4, 4)),
}


@pytest.mark.parametrize("conv, shape", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_sees_its_patches(conv, shape):
    """Patches by autograd: the gradient of one output with respect to the weight is the patch it was made from."""
    conv, x = deepcopy(conv).double(), draw(*shape)
    capture = capture_inputs(conv, every=1)
    groups, outputs = conv.groups, conv.out_channels
    y = conv(x).reshape(-1, outputs, *conv(x).shape[-len(conv.kernel_size) :])  # [B, m, *O]
    capture.clear()
    conv(x)
    expected = []
    for group in range(groups):
        channel = group * outputs // groups
        patches = [
            torch.autograd.grad(one, conv.weight, retain_graph=True)[0][channel].flatten()
            for one in y[:, channel].flatten()
        ]
        expected.append(mean_gram(torch.stack(patches)))
    gram = capture.gram(conv.weight)
    torch.testing.assert_close(gram, torch.stack(expected).squeeze(0))


@pytest.mark.parametrize("every", [2, 8, 100])
def test_a_sample_has_the_size_asked_for_and_no_favourites(every):
    for rows in (*range(3 * every), 64 * every, 64 * every + 1):
        places = spread_places(rows, every, torch.device("cpu"))
        assert len(places) == -(-rows // every)
        assert torch.equal(places, places.unique()) and all((0 <= places) & (places < max(rows, 1)))
        assert torch.equal(places // every, torch.arange(len(places)))  # one in each run
    offsets = (spread_places(1000 * every, every, torch.device("cpu")) % every).bincount(minlength=every)
    assert (offsets - 1000 / every).abs().max() <= 4


def test_a_sample_is_of_the_same_tokens_for_every_layer_and_draws_nothing():
    model, x = net(), draw(64, 4)
    capture = capture_inputs(model, every=8)
    state = torch.get_rng_state()
    backward(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    rows = x[spread_places(64, 8, x.device)]
    torch.testing.assert_close(capture.gram(model[0].weight), mean_gram(rows))
    torch.testing.assert_close(capture.gram(model[2].weight), mean_gram(model[:2](rows).detach()))


@pytest.mark.parametrize(("every", "one_in"), [(4, 4), (None, 8 * 9)])
def test_a_sampled_convolution_sees_whole_patches(every, one_in):
    """By default fewer of them, the more places the kernel has: as many numbers as of a linear layer's input."""
    conv, x = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64), draw(4, 2, 5, 5)
    capture = capture_inputs(conv, every=every)
    conv(x)
    patches = F.unfold(x, 3, padding=1).mT.reshape(-1, 18)[spread_places(100, one_in, x.device)]
    torch.testing.assert_close(capture.gram(conv.weight), mean_gram(patches))


def test_a_linear_layer_is_sampled_at_one_token_in_eight_by_default():
    layer, x = nn.Linear(5, 3, dtype=torch.float64), draw(4, 20, 5)
    capture = capture_inputs(layer)
    layer(x)
    rows = x.flatten(0, 1)[spread_places(80, 8, x.device)]
    torch.testing.assert_close(capture.gram(layer.weight), mean_gram(rows))


def test_capturing_changes_nothing_in_training():
    grads = []
    for watched in (False, True):
        model = net()
        if watched:
            capture_inputs(model)
        backward(model, draw(16, 4))
        grads.append([param.grad for param in model.parameters()])
    assert all(map(torch.equal, *grads))


def test_detaches():
    model, x = net(), draw(5, 4)
    with capture_inputs(model, every=1) as capture:
        backward(model, x)
        assert capture.gram(model[0].weight).trace() == pytest.approx(1)
    assert model[0].weight not in capture and not model[0]._forward_hooks
    backward(model, x)
    with pytest.raises(KeyError):
        capture.gram(model[0].weight)
    capture.remove()


def test_keeps_no_input_alive():
    model, x = net(), draw(100, 4)
    capture = capture_inputs(model, every=1)
    seen = ref(x)
    model(x)
    del x
    assert seen() is None and capture is not None


def test_copies_of_the_model_capture_nothing():
    """A moving average is such a copy; it must neither pile up Grams nor add its inputs to the model's."""
    model, x = net(), draw(5, 4)
    capture = capture_inputs(model, every=1)
    copy = deepcopy(model)
    backward(copy, draw(9, 4, seed=5))
    backward(model, x)
    torch.testing.assert_close(capture.gram(model[0].weight), mean_gram(x))
    assert isinstance(deepcopy(capture), InputCapture) and copy[0].weight not in capture


def test_inputs_may_come_by_keyword_and_without_a_batch():
    layer, x = nn.Linear(4, 2, dtype=torch.float64), draw(4)
    capture = capture_inputs(layer)
    layer(input=x)
    torch.testing.assert_close(capture.gram(layer.weight), mean_gram(x))


def test_watches_what_it_is_asked_to():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.ConvTranspose1d(3, 3, 2), nn.Linear(6, 9))
    assert watched(capture_inputs(model)) == {model[1], model[3]}
    assert watched(capture_inputs(model, param_groups(model))) == {model[1]}  # the head is AdamW's
    assert watched(capture_inputs(model, [model[3].weight])) == {model[3]}
    assert watched(capture_inputs(model, model[3].named_parameters())) == {model[3]}
    assert watched(capture_inputs(model, [{"params": model[3].weight}])) == {model[3]}


def watched(capture):
    with capture:
        return {module for module in capture._seen if module._forward_hooks}


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "8"])
def test_refuses_a_sample_that_is_none(every):
    with pytest.raises(ValueError, match="Invalid every value"):
        capture_inputs(net(), every=every)


def test_refuses_what_has_no_layers():
    with pytest.raises(TypeError, match="takes a module, got list"):
        capture_inputs([nn.Linear(2, 2)])
    for model in (nn.Embedding(3, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="no linear layer or convolution"):
            capture_inputs(model)


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    """A process group of this process alone."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ranks_agree_on_the_mean_over_all_of_their_inputs(one_process, tmp_path):
    """Two ranks of gloo, each in a thread of its own. One has few tokens and keeps rows, the other keeps a Gram."""
    x = draw(12, 4)
    models = [net(), net()]  # made here: threads share the generator that initialises them

    def rank(number):
        group = torch.distributed.ProcessGroupGloo(torch.distributed.FileStore(str(tmp_path / "pair")), number, 2)
        model, experts = models[number], nn.ModuleList([nn.Linear(4, 4, dtype=torch.float64) for _ in range(4)])
        capture = capture_inputs(nn.ModuleList([model, experts]), every=1, process_group=group)
        backward(model, x[:2] if number == 0 else x[2:])
        if number == 1:
            experts[0](x)  # one expert got tokens on one rank alone, the next on none
        for share in experts[2:]:
            share(x)  # the same tensor: one Gram, to be summed over ranks for each
        grams = [capture.gram(each.weight) for each in (model[0], model[2], experts[0], experts[2], experts[3])]
        assert experts[1].weight not in capture
        backward(model, x)
        for share in experts[2:]:
            share(-2 * x[:4, [1, 0, 2, 3]])
        # what was reduced before is not reduced again, and weighs as much as it did
        return [*grams, *(capture.gram(each.weight) for each in (model[0], experts[2], experts[3]))]

    with ThreadPoolExecutor() as pool:
        ranks = [pool.submit(rank, number) for number in range(2)]
    last = (torch.cat([x, x, x]), *[torch.cat([x, x[:4, [1, 0, 2, 3]]])] * 2)
    expected = [mean_gram(each) for each in (x, net()[:2](x).detach(), x, x, x, *last)]
    for each in ranks:
        torch.testing.assert_close(each.result(timeout=30), expected)


def test_sees_through_the_wrapper_of_distributed_data_parallel(one_process):
    model, x = DistributedDataParallel(net()), draw(6, 4)
    capture = capture_inputs(model, every=1)
    backward(model, x)
    torch.testing.assert_close(capture.gram(model.module[0].weight), mean_gram(x))


def test_finds_the_weights_that_fsdp_has_sharded(one_process):
    """Between forward and step a sharded model exchanges its parameters."""
    model, x = net(), draw(6, 4)
    fully_shard(model)
    capture = capture_inputs(model, every=1)
    backward(model, x)
    torch.testing.assert_close(capture.gram(model[0].weight), mean_gram(x))
