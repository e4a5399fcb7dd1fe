"""The loop that is differentiated is the package's rule, and nothing it learns from is what it is tested on."""

import json

import pytest
import torch

import deep_optim

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from benchmarks import __main__ as command
from benchmarks import meta_learning, meta_scores
from benchmarks.meta_learning import (
    ARMS,
    HAND_SET,
    TRAINED,
    TRAINING_SEEDS,
    Budget,
    drawn_w2,
    from_free,
    learn,
    to_free,
)
from benchmarks.meta_scores import UNSEEN, comparisons, score_all, summarize, what_moved
from benchmarks.tasks.stacked import CONTEXT, Bytes, Images, Teacher
from benchmarks.training import relative_rate
from benchmarks.unroll import AUX_BETAS, AUX_LR, DMGD, Muon, Rates, unroll

RATES = Rates(lr=0.05, momentum=0.9, inner_lr=0.4, lookahead=1.5, hidden_lr=0.02)
STEPS = 3


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    text = tmp_path_factory.mktemp("corpus") / "text"
    text.write_bytes(bytes(range(97, 123)) * 40)
    return {"teacher": Teacher(), "images": Images(), "bytes": Bytes(data=str(text))}


def end(task, rule, seeds=(5, 6), steps=STEPS, graph=False):
    *_, (_, weights) = unroll(task, rule, list(seeds), steps, graph=graph)
    return weights


def random_w2(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4


class Remembering(deep_optim.DMGD):
    """`DMGD` whose group says what W₂ starts from, as tall matrices have it."""

    def init_state(self, param, group):
        w2 = group["w2"].mT if len(param) < param.shape[1] else group["w2"]
        return super().init_state(param, group) | {"memory.w2": w2[None].clone()}


def by_the_package(task, seed, w2s):
    """Train by the real optimizer: `Momentum`, or `DMGD` with one initial W₂ for every hidden matrix."""
    weights = {name: torch.nn.Parameter(w[0]) for name, w in task.weights([seed]).items()}
    rest = [w for name, w in weights.items() if name not in task.hidden]
    groups = [{"params": rest, "rule": "adamw", "lr": AUX_LR, "adamw_betas": AUX_BETAS}]
    both = dict(lr=RATES.lr, momentum=RATES.momentum, weight_decay=0.0)
    if w2s is None:
        groups += [{"params": [weights[name] for name in task.hidden]}]
        optimizer = deep_optim.Momentum(groups, **both)
    else:
        groups += [{"params": [weights[name]], "w2": w2} for name, w2 in zip(task.hidden, w2s, strict=True)]
        options = dict(hidden_dim=len(w2s[0]), **{name: getattr(RATES, name) for name in RATES._fields[2:]})
        optimizer = Remembering(groups, **both, **options)
    initial = [group["lr"] for group in optimizer.param_groups]
    for step, batch in enumerate(task.batches([seed], STEPS), start=1):
        for group, lr in zip(optimizer.param_groups, initial, strict=True):
            group["lr"] = lr * relative_rate(step, STEPS, 1)
        optimizer.zero_grad()
        task.loss({name: w[None] for name, w in weights.items()}, batch).sum().backward()
        optimizer.step()
    return {name: w.detach() for name, w in weights.items()}


@pytest.mark.parametrize("kind", ["muon", "shared", "each its own"])
@pytest.mark.parametrize("family", ["teacher", "images", "bytes"])
def test_the_loop_is_the_packages_rule(tasks, family, kind):
    """The same weights to float64's rounding: routing, schedule, memory, its training, read-out and output map."""
    task = tasks[family]
    count = len(task.hidden)
    w2 = {"muon": None, "shared": random_w2(4, 32), "each its own": random_w2(count, 4, 32)}[kind]
    ours = end(task, Muon(RATES) if w2 is None else DMGD(RATES, w2), graph=True)
    theirs = by_the_package(task, 6, w2 if w2 is None or w2.ndim == 3 else [w2] * count)
    for name, weights in theirs.items():
        torch.testing.assert_close(ours[name][1].detach(), weights, rtol=1e-9, atol=1e-11, msg=name)


def test_no_features_are_no_hidden_layer(tasks):
    """Why the test has no arm with W₂ = 0."""
    without = end(tasks["images"], DMGD(RATES, drawn_w2()[:0]))
    zero, drawn = (end(tasks["images"], DMGD(RATES, drawn_w2() * scale)) for scale in (0, 1))
    for name, weights in without.items():
        torch.testing.assert_close(zero[name], weights)
    assert (drawn["up0"] - without["up0"]).abs().max() > 1e-4


def test_turned_gradients_and_a_turned_w2_are_a_turned_memory():
    """Networks whose hidden units point anywhere teach W₂ no direction, only its rows' lengths and angles."""
    grad, w2 = random_w2(1, 64, 32), random_w2(4, 32)
    turn = torch.linalg.qr(random_w2(32, 32)).Q
    memory, turned = (rule.start(grad) for rule in (DMGD(RATES, w2), DMGD(RATES, w2 @ turn)))
    for scale in (1.0, 2.0):
        memory, read = DMGD(RATES, w2).step(memory, grad.cos() * scale)
        turned, other = DMGD(RATES, w2 @ turn).step(turned, grad.cos() * scale @ turn)
        torch.testing.assert_close(other, read @ turn)


@pytest.mark.parametrize("family", ["teacher", "images", "bytes"])
def test_the_gradient_through_a_run_is_that_of_finite_differences(tasks, family):
    def last_loss(rates, w2):
        *_, (losses, _) = unroll(tasks[family], DMGD(Rates(*rates), w2), [3], 4, graph=True)
        return losses.sum()

    inputs = (torch.tensor(RATES, dtype=torch.float64).requires_grad_(), random_w2(2, 32).requires_grad_())
    assert torch.autograd.gradcheck(last_loss, inputs, eps=1e-5, rtol=1e-3, atol=1e-7, fast_mode=True)


def test_without_a_graph_nothing_is_kept(tasks):
    with_graph, without = (end(tasks["teacher"], DMGD(RATES, drawn_w2()), graph=graph) for graph in (True, False))
    assert with_graph["up0"].grad_fn is not None and without["up0"].grad_fn is None
    torch.testing.assert_close(with_graph["up0"].detach(), without["up0"])


@pytest.mark.parametrize("family", ["teacher", "images", "bytes"])
def test_a_run_does_not_depend_on_its_stack(tasks, family):
    alone, among = (end(tasks[family], DMGD(RATES, drawn_w2()), seeds) for seeds in ([6], [9, 6, 4]))
    for name, weights in alone.items():
        torch.testing.assert_close(among[name][1], weights[0])
    held = [tasks[family].held_out(seeds) for seeds in ([6], [9, 6, 4])]
    assert all(torch.equal(a[0], b[1]) for a, b in zip(*held, strict=True))


def test_batches_weights_and_held_out_examples_are_drawn_apart(tasks):
    """The CPU's generator takes 32 bits of a seed: streams offset by more would be one."""
    (x,), _ = next(tasks["teacher"].batches([6], 1))
    (held,), _ = tasks["teacher"].held_out([6])
    (head,) = tasks["teacher"].weights([6])["head"] * 32**0.5
    for other in (held, head):
        assert not torch.isclose(x[:, None], other).all(-1).any()


def test_one_network_has_the_same_weights_and_other_data():
    task = Teacher(network=7)
    weights, (x, target) = task.weights([1, 2]), next(task.batches([1, 2], 1))
    assert all(torch.equal(*pair) for pair in weights.values())
    assert not torch.equal(*x) and not torch.equal(*target)
    assert not torch.equal(weights["up0"], Teacher().weights([1, 2])["up0"])


def test_no_byte_sees_those_after_it(tasks):
    weights, x = tasks["bytes"].weights([1]), random_w2(1, 2, CONTEXT, 32)
    later = x.clone()
    later[:, :, 10] += 1
    changed = (tasks["bytes"]._attend(weights, later) - tasks["bytes"]._attend(weights, x)).abs().amax((0, 1, 3))
    assert not changed[:10].any() and changed[10:].all()


def test_rates_come_back_and_are_always_stable():
    torch.testing.assert_close(torch.stack(list(from_free(to_free(RATES)))), torch.tensor(RATES, dtype=torch.float64))
    for seed in range(20):
        noise = 4 * torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rates = from_free(dict(zip(to_free(RATES), noise, strict=True)))._asdict()
        deep_optim.DMGD([torch.nn.Parameter(torch.ones(2, 2))], **{name: x.item() for name, x in rates.items()})


def test_no_test_data_in_training(monkeypatch, tasks):
    """Other sources, other seeds; and what is held out is in no batch."""
    assert not {which[:2] for which in TRAINED.values()} & {which[:2] for which in UNSEEN.values()}
    assert not {which[:2] for which in TRAINED.values()} & {which[:2] for which in meta_scores.DEEPER.values()}
    used = []
    monkeypatch.setattr(meta_learning, "TRAINED", {"teacher": (Teacher, "tanh")})
    monkeypatch.setattr(meta_learning, "unroll", lambda *args, **kw: used.extend(args[2]) or unroll(*args, **kw))
    for meta_seed in (1, 2):
        learn(ARMS["hand"], HAND_SET, meta_seed, Budget(steps=2, iterations=3, stack=2))
    assert min(used) >= TRAINING_SEEDS and len(set(used)) == len(used) == 12
    with pytest.raises(ValueError, match="meta-training"):
        next(score_all({}, [TRAINING_SEEDS], 2, 1))
    train, held = tasks["images"].train[0], tasks["images"].held_out([1])[0][0]
    assert not (train.double()[None] == held[:, None]).all(-1).any()
    text = tasks["bytes"].text
    assert len(text.train) + len(text.held_out) == 26 * 40 and len(text.held_out) > CONTEXT


def test_an_arm_moves_what_it_learns_and_nothing_else(monkeypatch):
    monkeypatch.setattr(meta_learning, "TRAINED", {"teacher": (Teacher, "tanh")})
    for name, arm in ARMS.items():
        record = learn(arm, HAND_SET, 1, Budget(steps=4, iterations=2, stack=1))
        before = Rates(*HAND_SET[:2]) if arm.muon else HAND_SET._replace(**dict(arm.given))
        moved = {key for key, x in before._asdict().items() if abs(record["rates"][key] - x) > 1e-6}
        # The bound on inner_lr moves with momentum.
        assert moved - {"inner_lr"} == set(arm.learns) - {"w2", "inner_lr"}, name
        if "w2" not in arm.learns:
            assert record["w2"] == {}
            continue
        (w2,) = (torch.tensor(w2, dtype=torch.float64) for w2 in record["w2"].values())
        assert list(record["w2"]) == (["teacher"] if arm.one_network else ["any"])
        assert (w2 - drawn_w2()).abs().max() > 1e-3
        if arm.one_network:
            assert w2.shape[0] == len(Teacher().hidden) and not torch.allclose(w2[0], w2[1])


def test_the_meta_loss_is_the_mean_log_loss_of_the_second_half(monkeypatch):
    monkeypatch.setattr(meta_learning, "TRAINED", {"tanh": (Teacher, "tanh"), "relu": (Teacher, "relu")})
    record = learn(ARMS["w2"], HAND_SET, 1, Budget(steps=4, iterations=1, stack=2))
    seeds = [TRAINING_SEEDS + 2, TRAINING_SEEDS + 3]
    runs = [unroll(Teacher(kind), DMGD(HAND_SET, drawn_w2()), seeds, 4, graph=False) for kind in ("tanh", "relu")]
    losses = torch.stack([loss for run in runs for loss, _ in list(run)[2:]])
    assert record["meta_losses"] == [pytest.approx(losses.log().mean().item(), rel=1e-9)]


def test_adam_sees_the_gradient_of_one_iteration_and_ends_in_small_steps(monkeypatch):
    """Under a loss of lr itself, the meta-loss is what Adam moves, and its gradient is 1."""
    monkeypatch.setattr(meta_learning, "TRAINED", {"teacher": (Teacher, "tanh")})
    monkeypatch.setattr(meta_learning, "unroll", lambda task, rule, *_, **__: [(rule.rates.lr.view(1), {})] * 2)
    seen, step = [], torch.optim.Adam.step

    def spy(adam):
        (group,) = adam.param_groups
        seen.append((group["params"][0].grad.item(), group["lr"] / meta_learning.RATE_STEP))
        return step(adam)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    learn(ARMS["hand"], HAND_SET, 1, Budget(steps=2, iterations=3, stack=1))
    assert seen == [(pytest.approx(1), pytest.approx(share)) for share in (1, 2 / 3, 1 / 3)]


def test_a_row_is_what_its_arm_learned():
    shared, own = random_w2(16, 32), random_w2(2, 16, 32)
    record = {"rates": RATES._asdict(), "w2": {"any": shared.tolist(), "images": own.tolist()}}
    learned = {(arm, 3): record for arm in ARMS}

    def row(name):
        return meta_scores.make_row(learned, name, 3, "images")

    assert isinstance(row("muon"), Muon) and row("muon").rates == RATES == row("w2: drawn").rates
    assert torch.equal(row("w2: learned").w2, shared) and torch.equal(row("one network: learned").w2, own)
    assert torch.equal(row("w2: drawn").w2, drawn_w2()) and len(row("w2: none").w2) == 0 == len(row("rates").w2)


def test_meta_training_lowers_the_loss(monkeypatch):
    monkeypatch.setattr(meta_learning, "TRAINED", {"teacher": (Teacher, "tanh")})
    low = HAND_SET._replace(lr=0.005)
    record = learn(ARMS["rates"], low, 1, Budget(steps=8, iterations=6, stack=2))
    assert record["rates"]["lr"] > 1.2 * low.lr
    assert record["meta_losses"][-1] < record["meta_losses"][0] - 0.05


def test_differences_are_taken_seed_by_seed_over_tasks_that_have_both():
    logs = torch.tensor([[[9.0, 9.0], [1.0, 3.0]]]).double()  # one meta-seed, two points, two seeds
    row = summarize(logs)
    assert row["scores"] == [1.0, 3.0] == row["last"] and row["curve"] == [9.0, 2.0]
    other = summarize(logs + torch.tensor([0.1, 0.3]))
    scores = {"a": {"w2: drawn": other, "w2: none": row}, "b": {"w2: drawn": row, "w2: none": row}}
    for task in scores.values():
        rows = [name for pair in meta_scores.PAIRS.values() for name in pair]
        task |= {name: row for name in rows if name not in task and "one network" not in name}
    scores["a"] |= {name: row for name in meta_scores.ONE_NETWORK}
    difference = comparisons(scores)["hand-set rates: drawn - none"]
    assert difference["all"]["difference"] == pytest.approx(0.1) and difference["all"]["z"] == pytest.approx(2)
    assert difference["a"]["difference"] == pytest.approx(0.2) and difference["b"]["z"] is None
    assert "b" not in comparisons(scores)["one network: drawn - none"]


def test_how_far_w2_went():
    records = {(arm, seed): {"w2": {"any": (2 * drawn_w2()).tolist()}} for arm in ARMS for seed in (1, 2)}
    assert what_moved(records)["w2"] == pytest.approx({"length": 2, "way": 1, "agreement": 1})
    assert set(what_moved(records)) == {"w2", "w2 and rates", "moving w2", "one network"}


def test_trains_tests_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    for module in (meta_learning, meta_scores):
        monkeypatch.setattr(module, "TRAINED", {"teacher tanh": (Teacher, "tanh")})
    monkeypatch.setattr(meta_scores, "UNSEEN", {"teacher relu": (Teacher, "relu")})
    monkeypatch.setattr(meta_scores, "LONGER", 2)
    memory, output = tmp_path / "memory.json", tmp_path / "out.json"
    train = ["meta", "train", "--steps", "2", "--iterations", "1", "--stack", "1", "--memory", str(memory)]
    assert command.main([*train, "--meta-seeds", "1"]) == 0
    assert command.main([*train, "--meta-seeds", "1,2", "--resume"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("muon, meta-seed 1") == printed.count("muon, meta-seed 2") == 1
    learned = json.loads(memory.read_text())["learned"]
    assert [(record["arm"], record["meta_seed"]) for record in learned] == [(arm, s) for s in (1, 2) for arm in ARMS]
    rates = {(record["arm"], record["meta_seed"]): record["rates"] for record in learned}
    assert rates["w2", 2] == pytest.approx(rates["hand", 2]) and rates["w2", 2]["lr"] != pytest.approx(HAND_SET.lr)
    files = ["--memory", str(memory), "--output", str(output)]
    assert command.main(["meta", "test", "--seeds", "1", "--workers", "1", *files]) == 0
    document = json.loads(output.read_text())
    assert document["config"]["lengths"] == {"trained on": 2, "unseen": 2, "unseen, 4 times as long": 4}
    scores = document["scores"]["unseen"]["teacher relu"]
    assert scores["one network: none"]["scores"] != pytest.approx(scores["w2: none"]["scores"])  # at the same rates
    assert document["config"]["meta_seeds"] == [1, 2] and document["machine"]["cpu"] and document["versions"]["torch"]
    assert output.with_suffix(".png").stat().st_size > 10_000
