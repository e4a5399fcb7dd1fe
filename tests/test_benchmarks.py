"""The benchmarks keep the promises that make their numbers comparable."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import __main__ as command
from benchmarks import toy
from benchmarks.measure import paired_rounds, summarize
from benchmarks.optimizers import OPTIMIZERS, TUNED, Setting, available, build, search_space
from benchmarks.report import edges, steps_to
from benchmarks.tasks import make_task
from benchmarks.tasks.regression import Regression
from benchmarks.training import Trial, relative_rate, run_trial

TASK_NAMES = ("text", "vision-vit", "vision-resnet", "regression", "gpt")


def test_lists_what_there_is(capsys):
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in command.BENCHMARKS)
    assert command.main(["no_such"]) == 2


@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_optimizer_has_the_same_budget(task):
    assert {len(set(search_space(name, task))) for name in OPTIMIZERS} == {4 if task == "gpt" else 12}
    for entry in OPTIMIZERS.values():
        assert np.allclose(np.divide(entry.lrs(task)[1:], entry.lrs(task)[:-1]), 2)


def test_tuned_settings_lie_inside_the_search_space():
    for task, settings in TUNED.items():
        for name, setting in settings.items():
            assert setting in OPTIMIZERS[name].trials(task)


@pytest.mark.parametrize("name", available())
def test_every_optimizer_trains_and_is_built_with_the_same_rest(name):
    task = make_task("vision")
    model = task.model(0)
    optimizers = build(name, task, model, Setting(1e-3, OPTIMIZERS[name].seconds[1]), warmup=1)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [param for group in groups for param in group["params"]]
    assert {*held} == {*model.parameters()} and len(held) == len({*held})
    matrices = 0.0 if name == "sgd" else task.weight_decay
    for group in groups:
        assert all(group["weight_decay"] == (matrices if param.ndim > 1 else 0.0) for param in group["params"])
    if name not in ("adamw", "sgd", "schedule_free_adamw", "soap", "ademamix"):
        outside = {id(model.head.weight), id(model.head.bias), id(model.position)}
        assert all(group["lr"] == task.aux_lr for group in groups if outside & {*map(id, group["params"])})
    result = run_trial(Trial("regression", (), name, OPTIMIZERS[name].lrs("regression")[1], 0.9, 0, 40, 20))
    assert result["curve"][-1][1] < result["curve"][0][1]


@pytest.mark.parametrize("name", ["input_delta", "dgd"])
@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_optimizers_that_look_at_inputs_see_those_of_every_matrix(name, model):
    """Built without them, they would refuse their first step."""
    result = run_trial(Trial("vision", (("model", model),), name, 1e-3, 0.9, 0, 3, 3))
    assert not result["diverged"] and result["loss"] > 0


def test_our_momentum_trains_like_torchs_muon():
    """The same curve up to the bf16 of torch's Newton-Schulz: routing, scale and schedule agree in both arms."""
    muon, ours = (run_trial(Trial("vision", (), name, 2e-3, 0.9, 0, 30, 15)) for name in ("muon", "momentum"))
    np.testing.assert_allclose(muon["curve"], ours["curve"], rtol=0.05)


def test_the_floor_of_regression_is_that_of_numpy():
    task = Regression()
    keys, values = task.keys.double().numpy(), task.values.double().numpy()
    solution, residual, *_ = np.linalg.lstsq(keys, values, rcond=None)
    assert residual.sum() / values.size == pytest.approx(task.floor, rel=1e-5)
    model = task.model(0)
    with torch.no_grad():
        above = task.loss(model, (task.keys, task.values)).item() - task.floor
        assert task.evaluate(model)["loss"] == pytest.approx(above, rel=1e-4)
        model["hidden"].weight.copy_(torch.from_numpy(solution.T))
    assert task.evaluate(model)["loss"] < 1e-9


def test_runs_end_to_end_and_goes_on_where_it_stopped(tmp_path, capsys):
    file = tmp_path / "result.json"
    arguments = ["convergence", "--task", "regression", "--steps", "8", "--seeds", "1,2", "--rounds", "2"]
    arguments += ["--optimizers", "sgd,adamw", "--workers", "1", "--eval-every", "4", "--output", str(file)]
    assert command.main(arguments) == 0
    document = json.loads(file.read_text())
    assert list(document["best"]) == ["adamw", "sgd"]  # baselines in the table's order, not the command line's
    tuning = [record["trial"] for record in document["trials"] if record["trial"]["seed"] == 0]
    assert len(tuning) == 24
    assert set(document["equal_steps"]["sgd"]["losses"]) == {"1", "2"}
    assert document["equal_wall"]["adamw"]["steps"] >= 1
    assert set(document["step_time"]) == {"adamw", "sgd", "adamw (again)"}
    assert document["machine"]["cpu"] and document["versions"]["torch"] and "--steps 8" in document["command"]
    assert file.with_suffix(".png").stat().st_size > 10_000
    capsys.readouterr()
    assert command.main([*arguments, "--resume"]) == 0
    assert "tune:" not in capsys.readouterr().out
    assert json.loads(file.read_text())["equal_steps"] == document["equal_steps"]
    file.with_suffix(".png").unlink()
    assert command.main(["convergence", "--plot-only", str(file)]) == 0
    assert file.with_suffix(".png").exists()


def test_divergence_is_a_result():
    result = run_trial(Trial("regression", (), "sgd", 1e6, 0.9, 0, 50, 10))
    assert result["diverged"] and result["loss"] is None and result["stopped"] < 50
    json.dumps(result, allow_nan=False)


def test_warns_at_the_edge_of_a_grid():
    low, *_, high = OPTIMIZERS["adamw"].lrs("text")
    middle = OPTIMIZERS["adamw"].seconds[1]
    inside = Setting(2 * low, middle)
    assert edges({"adamw": inside}, "text") == []
    assert len(edges({"adamw": replace(inside, lr=low), "sgd": Setting(0.1, 0.9)}, "text")) == 1
    assert "edge" in edges({"adamw": replace(inside, lr=high)}, "text")[0]
    low, inside, _, high = search_space("momentum", "gpt")  # one second value, which was the best on text
    assert inside.second == TUNED["text"]["momentum"].second
    assert edges({"momentum": inside}, "gpt") == [] and len(edges({"momentum": low}, "gpt")) == 1


def test_schedule_warms_up_and_decays():
    rates = [relative_rate(step, 100, 10) for step in range(1, 101)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and 0 < rates[-1] < 0.02
    assert np.argmax(rates) == 9


def test_steps_to_a_target_are_interpolated():
    assert steps_to(2.5, [(10, 3.0), (20, 2.0)]) == 15
    assert steps_to(1.0, [(10, 3.0), (20, 2.0)]) is None


def test_paired_rounds_call_every_arm_once_per_round():
    calls = []
    seconds = paired_rounds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=20, warmup=0)
    rounds = ["".join(calls[i : i + 2]) for i in range(0, 40, 2)]
    assert {*rounds} == {"ab", "ba"}
    assert summarize(seconds, "a")["a"]["ratio"] == 1.0


def test_quartiles_of_ratios_need_no_more_than_one_round():
    times = {"a": [1.0, 2.0, 1.0, 4.0, 1.0], "b": [2.0, 2.0, 3.0, 16.0, 5.0]}  # ratios 2, 1, 3, 4, 5
    row = summarize(times, "a")["b"]
    assert (row["ratio_q1"], row["ratio"], row["ratio_q3"], row["ms"]) == (2.0, 3.0, 4.0, 3000.0)
    row = summarize({name: seconds[:1] for name, seconds in times.items()}, "a")["b"]
    assert row["ratio_q1"] == row["ratio"] == row["ratio_q3"] == 2.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "text", "--device", "cuda"], "text runs on the cpu alone"),
        (["--task", "gpt", "--optimizers", "dgd"], "dgd looks at layer inputs"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(["convergence", *arguments])
    assert message in capsys.readouterr().err


def test_toy_search_runs_the_package_rule():
    """The array form of the search and the package's optimizers visit the same points, until chaos parts them."""
    valley = toy.VALLEYS[0]
    for setting in (dict(lr=0.05, momentum=0.8), dict(lr=0.05, momentum=0.8, inner_lr=0.25)):
        needed = toy.steps_needed(valley, [setting])[0, 0]
        assert abs(len(toy.path(valley, setting)) - 1 - needed) <= 1
    r, theta = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.7, -0.4))
    k, a, omega = valley
    (r**2 + k * (r - theta + a * torch.sin(omega * r)) ** 2).backward()
    assert np.allclose(toy.gradient(0.7, -0.4, valley), [r.grad, theta.grad])
