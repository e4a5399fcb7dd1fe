"""Ablations: every row is the optimizer it says, and rows are compared seed by seed."""

import json

import pytest
import torch

import deep_optim

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import __main__ as command
from benchmarks import dmgd, m3
from benchmarks.optimizers import VARIANTS, Setting, find
from benchmarks.tasks import make_task
from benchmarks.training import train_step
from benchmarks.variants import InputsToErrorsLinear, Plain


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


@pytest.mark.parametrize("ablation", [dmgd.ABLATION, m3.ABLATION], ids=lambda ablation: ablation.name)
def test_every_row_of_an_ablation_has_an_entry_and_can_be_asked_for(ablation):
    names = {name for table in ablation.tables.values() for name in table}
    assert {name for name in VARIANTS if name.startswith(f"{ablation.name}:")} <= names | {ablation.reference}
    assert all(find(name) for name in names) and not any("," in name for name in names)
    with pytest.raises(SystemExit):
        ablation.main(["--tables", "no_such"])


def test_ablation_at_equal_wall_time_fits_the_steps(tmp_path, monkeypatch):
    times = {"muon": {"ratio": 3.0}, "m3:M3": {"ratio": 1.5}}
    asked = []
    monkeypatch.setattr(
        "benchmarks.ablation.step_times", lambda task, settings, rounds: asked.append(settings) or times
    )
    path = tmp_path / "m3.json"
    rest = ["--rows", "M3", "--seeds", "1", "--workers", "1", "--output", str(path)]
    assert m3.ABLATION.main(["--tables", "memories", "--steps", "2", "--wall", "m3:M3", *rest]) == 0
    document = json.loads(path.read_text())
    assert [set(settings) for settings in asked] == [{"muon", "m3:M3"}]
    steps, time = document["tables"]["memories"], document["equal_wall"]["memories"]
    assert [row["steps"] for row in steps.values()] == [2, 2]
    assert {name: row["steps"] for name, row in time.items()} == {"muon": 1, "m3:M3": 2}
    assert steps["muon"]["difference"] == 0 and time["m3:M3"]["difference"] == 0  # each kind has its reference
    assert time["muon"]["difference"] == time["muon"]["mean"] - steps["m3:M3"]["mean"] != 0
    assert len(document["trials"]) == 3  # M3's is in both
    with pytest.raises(SystemExit):
        m3.ABLATION.main(["--tables", "memories", "--wall", "no_such", *rest])


def test_rows_are_compared_with_the_reference_that_is_asked_for(tmp_path):
    path = tmp_path / "dmgd.json"
    rest = ["--rows", "all three", "--steps", "2", "--seeds", "1", "--workers", "1", "--output", str(path)]
    assert dmgd.ABLATION.main(["--tables", "defaults", "--reference", "dmgd:no hidden layer", *rest]) == 0
    document = json.loads(path.read_text())
    rows = document["tables"]["defaults"]
    assert document["reference"] == "dmgd:no hidden layer" and list(rows) == ["dmgd:no hidden layer", "dmgd:all three"]
    assert rows["dmgd:all three"]["difference"] == rows["dmgd:all three"]["mean"] - rows["dmgd:no hidden layer"]["mean"]
    with pytest.raises(SystemExit):
        dmgd.ABLATION.main(["--reference", "no_such", *rest])


ABLATION = ["--tables", "retention,drift", "--rows", "no hidden layer,momentum=0.98", "--seeds", "1", "--workers", "1"]


@pytest.mark.parametrize("name, options", [("dmgd", ABLATION), ("memory", ["--every", "1"])])
def test_what_is_measured_is_written_and_drawn(name, options, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.tasks.text.VALIDATION_WINDOWS", 16)
    output = tmp_path / "out.json"
    assert command.main([name, "--steps", "2", "--output", str(output), *options]) == 0
    document = json.loads(output.read_text())
    assert document["benchmark"] == name and (tmp_path / "out.png").stat().st_size > 10_000
