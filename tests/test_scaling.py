"""The cost model of `python -m benchmarks scaling`: its models, its counts and its limits."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import deep_optim
from benchmarks.scaling import COSTS, EVERYWHERE, MODELS, RANKS, flops, main, predict, sent, spread


@pytest.mark.parametrize("size, billions", [("7B", 6.74), ("70B", 70.55), ("405B", 405.8)])
def test_the_models_have_their_sizes(size: str, billions: float) -> None:
    assert MODELS[size].parameters() == pytest.approx(billions * 1e9, rel=3e-3)  # the norms are left out


@pytest.mark.parametrize("name", [name for name in COSTS if name != "AdamW"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 224), (160, 64)], ids=str)
def test_flops_are_those_of_the_matrix_itself(name: str, shape: tuple[int, int]) -> None:
    """Counted at its full size; the model counts at a quarter or less and multiplies by the cube."""
    options = {"missing": "gradient"} if name in ("DGD", "InputDeltaMomentum") else {}
    param = nn.Parameter(torch.zeros(shape))
    optimizer = getattr(deep_optim, name)([param], **options)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
    assert flops(name, *shape) == pytest.approx(counter.get_total_flops(), rel=1e-2)


def test_the_costliest_goes_to_who_has_least() -> None:
    assert spread([(3, 1), (2, 1), (2, 1), (1, 1)], 2) == (4, 2)
    assert spread([(5, 7), (1, 1), (1, 1), (1, 1)], 2) == (5, 7)


def test_one_rank_sends_nothing_to_others() -> None:
    assert sent("DMGD", 10**6, 1) == 0
    assert sent("Momentum", 10**6, 2) == 10**6 * 8 / 2 / 2
    assert all(predict("AdamW", model, ranks)["sent_bytes"] == 0 for model in MODELS.values() for ranks in RANKS)


def test_time_stops_falling_when_every_rank_has_one_matrix() -> None:
    """224 matrices of a 7B model: beyond as many ranks the largest decides."""
    model = MODELS["7B"]
    times = {ranks: predict("Momentum", model, ranks)["compute"] for ranks in RANKS}
    assert times[8] > 7 * times[64]
    assert times[512] == times[1024] == flops("Momentum", 4096, 11008) / 0.66 / 989e12


def test_spreading_never_costs_more_than_computing_everywhere() -> None:
    for model in MODELS.values():
        for ranks in RANKS:
            assert predict("Momentum", model, ranks)["step"] < predict(EVERYWHERE, model, ranks)["step"]


def test_it_says_that_it_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--output", str(tmp_path / "scaling.json")]) == 0
    document = json.loads((tmp_path / "scaling.json").read_text())
    assert document["kind"] == "prediction" and set(document["predictions"]) == set(MODELS)
    assert (tmp_path / "scaling.png").stat().st_size > 1000
    assert "predicted" in capsys.readouterr().out
