"""`step_time` and `kernels`: what they measure besides the clock is exact, and a wrong result has no speed."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import deep_optim

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import __main__ as command
from benchmarks import kernels
from benchmarks.kernels import KERNELS, Kernel
from benchmarks.measure import TransientMemory, versions
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.step_time import bytes_and_flops, timed
from benchmarks.timed_shapes import SHAPES


def test_transient_memory_is_the_peak_of_what_lives_at_once():
    kept = torch.zeros(1000)
    with TransientMemory() as memory:
        a = kept + 1  # 4000 bytes
        b = a * 2  # 8000 together
        del a
        b.add_(1)  # in place: nothing new
        c = b.view(10, 100) + 1  # a view is nothing new either: 8000 again
        del b, c
        d = kept[:500] + 1  # 2000
        del d
    assert memory.peak == 8000


def test_step_time_writes_times_bytes_and_rates(tmp_path):
    file = tmp_path / "times.json"
    assert {"adamw", "muon", "momentum", "m3"} <= set(timed()) and "dgd" not in timed()  # which needs layers that run
    some = ["--optimizers", "muon,momentum,muon (other)"]
    arguments = ["step_time", "--shapes", "small", "--rounds", "2", *some, "--output", str(file)]
    assert command.main(arguments) == 0
    document = json.loads(file.read_text())
    arms = document["shapes"]["small"]["arms"]
    assert list(arms) == ["adamw", "muon", "momentum", "muon (other)", "adamw (again)"]
    assert arms["adamw"]["ratio"] == 1.0 and arms["adamw"]["state_bytes_per_parameter"] == pytest.approx(8, abs=0.01)
    assert arms["adamw"]["flops_per_parameter"] == 0
    assert arms["adamw"]["traffic_bytes_per_parameter"] == pytest.approx(28, abs=0.02)  # g, and w, m and v twice
    assert arms["momentum"]["traffic_bytes_per_parameter"] == pytest.approx(20, abs=0.2)  # the biases are AdamW's
    assert 0 < document["shapes"]["small"]["from_muon"] < 0.1
    assert {"multiplies_bfloat16", "cpu"} <= set(document["machine"])
    # five steps of 6 m³ products on all but the biases
    assert arms["momentum"]["flops_per_parameter"] == pytest.approx(5 * 6 * 64 * 64 / 65)
    assert document["ceilings"]["gflops"] > 0 and file.with_suffix(".png").exists()


def test_nothing_is_timed_where_momentum_is_not_muon(tmp_path, monkeypatch, capsys):
    """Say its Newton-Schulz had lost a step."""
    momentum = deep_optim.Momentum
    monkeypatch.setattr(deep_optim, "Momentum", lambda params, lr: momentum(params, lr=lr, ns_steps=4))
    file = tmp_path / "times.json"
    assert command.main(["step_time", "--shapes", "small", "--rounds", "2", "--output", str(file)]) == 1
    result = json.loads(file.read_text())["shapes"]["small"]
    assert not result["correct"] and result["from_muon"] > 0.1 and "arms" not in result
    assert "nothing is timed" in capsys.readouterr().out


def test_a_result_says_which_commit_it_is_of(monkeypatch):
    """And nothing where there is no git."""
    known = (Path(__file__).parents[1] / ".git").exists() and shutil.which("git")
    assert len(versions().get("revision", "").rstrip("+")) == (12 if known else 0)
    monkeypatch.setenv("PATH", "")
    assert "revision" not in versions()


@pytest.mark.parametrize("name", ["adamw", "momentum", "dmgd"])
def test_costs_of_a_step_are_those_of_its_tensors(name):
    """AdamW fused makes nothing; the others at least a copy of what they orthogonalise."""
    model = nn.Linear(40, 30)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    groups = [{"params": list(model.named_parameters()), "weight_decay": 0.0, "rule": "memory"}]
    setting = OPTIMIZERS[name].trials("text")[0]
    optimizers = OPTIMIZERS[name].build(groups, setting, 1e-3, 1)
    for optimizer in optimizers:
        optimizer.step()
    costs = bytes_and_flops(optimizers, 1230)
    assert (costs["transient_bytes_per_parameter"] > 4) == (name != "adamw")
    assert (costs["flops_per_parameter"] > 0) == (name != "adamw")


def test_resnet50_has_its_parameters():
    make, _ = SHAPES["resnet50"]
    assert sum(param.numel() for param in make().parameters()) == 25_557_032


@pytest.mark.parametrize("shape", ["48 x 64 x 64", "4 x 512 x 128"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_plain_way_computes_the_same(name, shape):
    """In float64, where both are exact, on tall and square stacks."""
    _, m, n = kernels.SHAPES[shape]
    memory, written = torch.randn(2, 2, m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(KERNELS[name].ours(memory, written), KERNELS[name].plain(memory, written))


def test_kernels_writes_errors_times_and_rates(tmp_path):
    file = tmp_path / "kernels.json"
    arguments = ["kernels", "--shapes", "48 x 64 x 64", "--rounds", "2", "--output", str(file)]
    assert command.main(arguments) == 0
    document = json.loads(file.read_text())
    assert set(document["kernels"]) == set(KERNELS)
    result = document["kernels"]["newton_schulz"]["48 x 64 x 64"]
    assert result["correct"] and result["ratio"] > 0 and 0 < result["error"] < 0.1
    assert file.with_suffix(".png").exists()


def test_a_wrong_result_has_no_speed(tmp_path, monkeypatch, capsys):
    wrong = Kernel(lambda memory, written: 1.1 * written, lambda memory, written: written, 8, None)
    monkeypatch.setitem(KERNELS, "wrong", wrong)
    file = tmp_path / "kernels.json"
    assert command.main(["kernels", "--kernels", "wrong", "--shapes", "48 x 64 x 64", "--output", str(file)]) == 1
    result = json.loads(file.read_text())["kernels"]["wrong"]["48 x 64 x 64"]
    assert not result["correct"] and "ratio" not in result and "ms" not in result
    assert "wrong" in capsys.readouterr().out


@pytest.mark.parametrize("precision, correct", [(torch.float32, False), (torch.float16, True), (torch.bfloat16, True)])
def test_an_error_is_wrong_by_the_precision_that_an_operation_works_in(precision, correct):
    """A thousandth of a percent is a hundred roundings of float32, and none of half precision."""
    kernel = Kernel(lambda memory, written: (1 + 1e-5) * written, lambda memory, written: written, 8, precision)
    result = kernels.measure(kernel, (2, 6, 4), argparse.Namespace(device="cpu", rounds=2))
    assert result["correct"] is correct and result["error"] == pytest.approx(1e-5, rel=0.05)
    assert ("ratio" in result) is correct and result["precision"] == str(precision).partition(".")[2]


@pytest.mark.parametrize("name", ["frobenius_norm", "feature_map(soft_rows)"])
def test_what_works_in_float32_is_held_to_float32(name):
    """On a matrix whose norm loses digits where its squares are summed one after the other."""
    memory, written = torch.randn(2, 1, 768, 768, generator=torch.Generator().manual_seed(0))
    exact = KERNELS[name].plain(memory.double(), written.double())
    assert KERNELS[name].precision == torch.float32
    assert (KERNELS[name].ours(memory, written) - exact).norm() <= 3 * torch.finfo(torch.float32).eps * exact.norm()
