"""The benchmark of forgetting: its sequences, what its arms remember, and what it makes of their scores."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from benchmarks import __main__ as command
from benchmarks.continual import ARMS, PERIOD, Course, Lesson, available, importance
from benchmarks.frontier import at_plasticity, measures, saved, summarize
from benchmarks.tasks.sequences import make_sequence
from deep_optim import MultiFrequency, param_groups

DIGITS = {"images": "digits", "tasks": 3}


def course(optimizer: str, lr: float, reset: bool = False, seed: int = 1) -> Course:
    return Course("orthogonal", (), optimizer, lr, seed, tasks=2, steps_per_task=40, reset=reset)


def test_gradients_of_orthogonal_tasks_are_orthogonal_and_their_loss_is_exact() -> None:
    """G_A G_Bᵀ = 0; the expectation is the sum over the axes of the inputs' distribution."""
    sequence = make_sequence("orthogonal")
    model = sequence.model(0)
    grads = []
    for task in range(2):
        (batch,) = sequence.batches(0, task, 1)
        (grad,) = torch.autograd.grad(sequence.loss(model, batch, task), list(model.parameters()))
        grads.append(grad)
    assert (grads[0] @ grads[1].T).abs().max() < 1e-5 < grads[0].abs().max()
    x, _ = next(sequence.batches(0, 1, 1, batch=8192))
    torch.testing.assert_close((x @ sequence.spaces[1]).var(0), sequence.spectrum, rtol=0.1, atol=0.0)  # six deviations
    assert [sequence.evaluate(model, task)["score"] for task in range(2)] == pytest.approx([1.0, 1.0])
    torch.nn.init.normal_(model["map"].weight)
    axes = (sequence.spaces[1] * sequence.spectrum.sqrt()).T  # E ‖A x‖² = Σ ‖A a‖² over these
    by_hand = sequence.loss(model, (axes, axes @ sequence.solution.T), 1)
    model_at_zero = sequence.model(0)
    start = sequence.loss(model_at_zero, (axes, axes @ sequence.solution.T), 1)
    assert sequence.evaluate(model, 1)["score"] == pytest.approx((by_hand / start).item(), rel=1e-4)
    with torch.no_grad():
        model["map"].weight.copy_(sequence.solution)
    assert sequence.evaluate(model, 1)["score"] < 1e-9


def test_gradient_descent_forgets_nothing_of_an_orthogonal_task() -> None:
    """Without momentum it cannot: what others forget is theirs."""
    sequence = make_sequence("orthogonal")
    model = sequence.model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    after = []
    for task in range(2):
        for batch in sequence.batches(0, task, 50):
            optimizer.zero_grad()
            sequence.loss(model, batch, task).backward()
            optimizer.step()
        after.append(sequence.evaluate(model, 0)["score"])
    assert after[0] < 0.5 and after[1] == pytest.approx(after[0], rel=1e-4)


def test_permuted_images_are_the_same_images() -> None:
    """Each task has its own order of the pixels, the first the natural one; labels stay."""
    sequence = make_sequence("permuted", **DIGITS)
    natural = sequence.test[0][0]
    for task in range(3):
        pixels, labels = sequence.test[task]
        assert torch.equal(pixels[:, sequence.orders[task].argsort()], natural)
        assert torch.equal(labels, sequence.test[0][1])
    assert not torch.equal(sequence.test[1][0], natural)
    pixels, labels = next(sequence.batches(5, 1, 1))
    seen = pixels[0][sequence.orders[1].argsort()]
    assert labels[0] in sequence.labels[(sequence.train == seen).all(1)]
    assert not torch.equal(labels, next(sequence.batches(5, 0, 1))[1])  # tasks draw for themselves
    first, again = (next(sequence.batches(5, 1, 1)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], next(sequence.batches(6, 1, 1))[0])


def test_split_images_have_classes_of_their_own() -> None:
    """Two in each task; the other outputs have no part in the loss, nor a gradient."""
    sequence = make_sequence("split", **DIGITS)
    model = sequence.model(0)
    for task in range(3):
        (batch,) = sequence.batches(0, task, 1)
        assert set(batch[1].tolist()) == {2 * task, 2 * task + 1} == set(sequence.test[task][1].tolist())
        model.zero_grad()
        sequence.loss(model, batch, task).backward()
        assert model.head.weight.grad.any(1).nonzero()[:, 0].tolist() == [2 * task, 2 * task + 1]
    with pytest.raises(ValueError, match="5 tasks"):
        make_sequence("split", images="digits", tasks=6)


def test_domains_are_read_in_order(tmp_path: Path) -> None:
    """Files stand for themselves; a model that was not trained is worth log 256 on either."""
    for name, byte in (("a.txt", 97), ("b.txt", 98)):
        (tmp_path / name).write_bytes(bytes([byte]) * 4000)
    sequence = make_sequence("text", domains=f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}")
    assert [int(next(sequence.batches(0, task, 1))[0].max()) for task in range(sequence.tasks)] == [97, 98]
    assert sequence.evaluate(sequence.model(0), 1)["score"] == pytest.approx(5.545, abs=1e-3)


def test_an_unknown_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="there are: orthogonal"):
        make_sequence("shuffled")


@pytest.mark.parametrize("name", available())
def test_every_arm_learns_with_one_learning_rate(name: str) -> None:
    """Nothing keeps a rate of its own, or forgets by weight decay; slow groups are the hidden matrices."""
    sequence = make_sequence("permuted", **DIGITS)
    model = sequence.model(0)
    optimizers = ARMS[name].build(param_groups(model, weight_decay=0.0), 2.0**-7)
    hidden = {model.first.weight, model.second.weight}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        slow = bool(hidden & set(group["params"]))
        assert group["lr"] == 2.0**-7 / (PERIOD if slow and name.startswith("low_rate") else 1)
        assert group.get("weight_decay", 0.0) == 0.0
        assert group.get("period", 1) == (PERIOD if slow and name.startswith("multi_frequency") else 1)
    assert name.startswith("multi_frequency") == isinstance(optimizers[0], MultiFrequency)
    lr = ARMS[name].lowest_lr["regression"] / 16
    result = course(name, lr).run()
    assert not result["diverged"] and result["scores"][0][0] < 0.97  # slow arms step five times
    assert ARMS[name].against is None or ARMS[name].against in ARMS


def test_a_course_depends_on_its_description_alone() -> None:
    """The same twice; another with fresh state at each task, but only from the second task on."""
    carried, again, reset = course("adamw", 0.02).run(), course("adamw", 0.02).run(), course("adamw", 0.02, True).run()
    assert carried["scores"] == again["scores"]
    assert carried["scores"][0] == reset["scores"][0] and carried["scores"][1] != reset["scores"][1]
    assert course("sgd", 1e6).run()["diverged"]
    assert Course.from_json(json.loads(json.dumps(course("adamw", 0.02).to_json()))) == course("adamw", 0.02)


def test_a_course_is_the_plain_loop() -> None:
    """Constant rate, no decay, one optimizer throughout."""
    sequence = make_sequence("orthogonal")
    model = sequence.model(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    scores = []
    for task in range(2):
        for batch in sequence.batches(1, task, 40):
            optimizer.zero_grad()
            sequence.loss(model, batch, task).backward()
            optimizer.step()
        scores.append([sequence.evaluate(model, each)["score"] for each in range(2)])
    torch.testing.assert_close(course("adamw", 0.02).run()["scores"], scores, rtol=1e-3, atol=1e-6)  # fused, float32


def test_replayed_images_keep_their_task() -> None:
    """Their two outputs, not those of the task at hand."""
    sequence = make_sequence("split", **DIGITS)
    model = sequence.model(0)
    lesson = Lesson(sequence, ARMS["replay"])
    lesson.learnt(model, seed=0)
    assert lesson.loss(model, next(sequence.batches(0, 1, 1))).isfinite()


def test_importance_is_the_mean_of_squared_gradients() -> None:
    """In closed form for one sample of a linear map: ((W x − y) xᵀ)²."""
    sequence = make_sequence("orthogonal")
    model = sequence.model(0)
    (found,) = importance(sequence, model, 0, seed=3)
    x, y = (torch.cat(part) for part in zip(*sequence.batches(3, 0, 128, batch=1), strict=True))
    torch.testing.assert_close(found, (y.square().T @ x.square()) / 128)  # at W = 0


def test_the_penalty_pulls_back_and_replay_adds_an_old_loss() -> None:
    """λ F (θ − θ*) beside the gradient of the task at hand; the stored batch counts like one of the new."""
    sequence = make_sequence("orthogonal")
    model = sequence.model(0)
    (batch,) = sequence.batches(0, 1, 1)
    ewc, replay = Lesson(sequence, ARMS["ewc"]), Lesson(sequence, ARMS["replay"])
    for lesson in (ewc, replay):
        lesson.learnt(model, seed=0)
    (weights,), (fisher,) = ewc.anchors[0]
    torch.nn.init.normal_(model["map"].weight)
    weight = model["map"].weight
    plain = sequence.loss(model, batch, 1)
    (pull,) = torch.autograd.grad(ewc.loss(model, batch) - plain, weight)
    torch.testing.assert_close(pull, ARMS["ewc"].penalty * fisher * (weight - weights), rtol=1e-4, atol=1e-4)
    added = (replay.loss(model, batch) - sequence.loss(model, batch, 1)).item()
    assert added in [pytest.approx(sequence.loss(model, old, task).item(), rel=1e-3) for task, old in replay.stored]
    assert not Lesson(sequence, ARMS["adamw"]).stored and ewc.task == 1


def test_measures_of_a_run() -> None:
    """By hand, for accuracies and for losses. The best before the end need not be the one right after."""
    scores = [[0.8, 0.1, 0.1], [0.9, 0.7, 0.1], [0.5, 0.6, 0.9]]
    found = measures(scores, higher_is_better=True)
    assert found["right_after"] == pytest.approx(0.8) and found["final"] == pytest.approx(2 / 3)
    assert found["backward_transfer"] == pytest.approx((-0.3 - 0.1) / 2)
    assert found["forgetting"] == pytest.approx((0.4 + 0.1) / 2)
    losses = [[1 - score for score in row] for row in scores]
    mirrored = measures(losses, higher_is_better=False)
    assert [mirrored[key] for key in ("backward_transfer", "forgetting")] == pytest.approx([-0.2, 0.25])
    assert measures([[0.5]], True) == {"right_after": 0.5, "final": 0.5, "backward_transfer": 0.0, "forgetting": 0.0}


def test_forgetting_is_compared_at_equal_plasticity() -> None:
    """Half as plastic and half as forgetful is nothing saved; the frontier may turn back on itself."""
    reference = [(0.2, 0.0), (0.6, 0.4), (0.4, 0.6)]
    assert at_plasticity(reference, 0.4) == pytest.approx(0.2) and at_plasticity(reference, 0.5) == pytest.approx(0.3)
    assert at_plasticity(reference, 0.7) is None and at_plasticity([(0.5, 0.1)], 0.5) is None
    assert saved([(0.3, 0.1), (0.5, 0.3), (0.9, 0.0)], reference) == pytest.approx(0.0)
    assert saved([(0.4, 0.1)], reference) == pytest.approx(0.1)
    assert saved([(0.9, 0.0)], reference) is None
    assert at_plasticity([(0.5, 0.3), (0.5, 0.1)], 0.5) == 0.1


def test_summary_leaves_no_mean_where_a_seed_diverged() -> None:
    runs = {}
    for seed in (1, 2):
        for name, lr, after, final in (("adamw", 0.1, 0.6, 0.5), ("adamw", 0.2, 0.8, 0.4), ("muon", 0.1, 0.7, 0.6)):
            runs[course(name, lr, seed=seed)] = {"diverged": False, "scores": [[after, 0.0], [final, after]]}
    runs[course("adamw", 0.4, seed=1)] = {"diverged": True}
    runs[course("adamw", 0.4, seed=2)] = {"diverged": False, "scores": [[0.9, 0.0], [0.9, 0.9]]}
    row = summarize(runs, True)["carried"]
    assert row["adamw"]["rates"][2] == {"lr": 0.4, "diverged": 1} and row["adamw"]["best"] == 0.2
    assert row["muon"]["saved_adamw"]["mean"] == pytest.approx(0.25 - 0.1)
    assert "saved_adamw" not in row["adamw"]
    del runs[course("adamw", 0.4, seed=1)], runs[course("adamw", 0.4, seed=2)]
    assert summarize(runs, False)["carried"]["adamw"]["best"] == 0.1


TINY = ["--steps", "6", "--lrs", "2", "--workers", "1", "--optimizers", "adamw,multi_frequency,low_rate"]


@pytest.mark.parametrize("task", ["orthogonal", "split"])
def test_runs_end_to_end_and_goes_on_where_it_stopped(task: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "result.json"
    images = ["--images", "digits", "--tasks", "3"] if task != "orthogonal" else []
    arguments = ["forgetting", "--task", task, *TINY, *images, "--seeds", "1,2", "--output", str(file)]
    assert command.main(arguments) == 0
    document = json.loads(file.read_text())
    assert len(document["trials"]) == 3 * 2 * 2 * 2 and set(document["summary"]) == {"carried", "reset"}
    assert set(document["summary"]["reset"]["multi_frequency"]) >= {"rates", "best", "saved_adamw", "saved_against"}
    assert document["machine"]["cpu"] and document["versions"]["torch"] and "--steps 6" in document["command"]
    assert file.with_suffix(".png").stat().st_size > 10_000
    capsys.readouterr()
    assert command.main([*arguments, "--resume"]) == 0
    assert "learn:" not in capsys.readouterr().out
    file.with_suffix(".png").unlink()
    assert command.main(["forgetting", "--plot-only", str(file)]) == 0
    assert file.with_suffix(".png").exists()
    again = json.loads(file.read_text())
    assert again["summary"] == document["summary"]
