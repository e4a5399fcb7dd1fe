"""`overhead`: its arms train what they say they train."""

import json

import pytest
import torch

pytest.importorskip("rich")

from benchmarks import __main__ as command
from benchmarks import overhead
from benchmarks.tasks import make_task


def test_overhead_writes_ratios_to_the_plain_arm(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "PERIOD", 2)
    file = tmp_path / "overhead.json"
    arguments = ["overhead", "--tasks", "vision-vit", "--rounds", "2", "--output", str(file)]
    assert command.main(arguments) == 0
    arms = json.loads(file.read_text())["tasks"]["vision-vit"]
    assert arms["plain"]["ratio"] == 1.0
    assert {"plain again", "capture, by default", "InputDeltaMomentum", "MultiFrequency, period 2"} < set(arms)
    assert all(numbers["ms"] > 0 for numbers in arms.values())


def test_watching_and_period_1_train_as_the_plain_arm_does(monkeypatch):
    """What is timed beside `Momentum` must do its work: all but two arms end at the same weights."""
    task, models = make_task("vision", model="resnet"), []
    make = task.model
    monkeypatch.setattr(task, "model", lambda seed: models.append(make(seed)) or models[-1])
    arms = overhead._arms(task)
    for arm in arms.values():
        arm()
    weights = {name: model.stem.weight.detach() for name, model in zip(arms, models, strict=True)}
    others = {"InputDeltaMomentum", f"MultiFrequency, period {overhead.PERIOD}"}
    for name, weight in weights.items():
        assert torch.equal(weight, weights[overhead.PLAIN]) == (name not in others), name
