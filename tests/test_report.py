"""What the trials say together: differences seed by seed; and every committed file is reported and drawn again."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from matplotlib.figure import Figure

from benchmarks import __main__ as command
from benchmarks.report import compare

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
BENCHMARKS = {path: json.loads(path.read_text())["benchmark"] for path in sorted(RESULTS.glob("*.json"))}
UNDRAWN = (
    "overhead",
    "throughput",
    "activations",
    "meta train",
    "meta test",
)  # printed as they are measured, or drawn by a part


def test_differences_are_between_runs_of_one_seed():
    row = compare([1.1, 2.2, 3.0], [1.0, 2.0, 3.0])
    assert row["difference"] == pytest.approx(0.1) and row["mean"] == pytest.approx(2.1)
    assert row["error"] == pytest.approx(0.1 / 3**0.5) and row["z"] == pytest.approx(3**0.5)
    assert compare([None, 2.0], [1.0, 2.0])["mean"] is None
    assert compare([1.0, 2.0], [1.0, 2.0])["z"] is None
    assert compare([1.0], [2.0])["z"] is None  # one seed has no spread


def test_the_unpaired_error_knows_nothing_of_seeds():
    ours, theirs = [1.1, 2.2, 3.0], [1.0, 2.0, 3.0]
    row, turned = compare(ours, theirs), compare(ours, theirs[1:] + theirs[:1])
    assert row["z_unpaired"] == pytest.approx(turned["z_unpaired"])
    assert abs(turned["z"]) < row["z"]  # pairs that no longer move together
    assert compare([2.0, 4.0], [1.0, 1.0])["z_unpaired"] == pytest.approx(2.0)  # 2 / √(2 / 2)


@pytest.mark.parametrize(
    "path", [path for path, name in BENCHMARKS.items() if name not in UNDRAWN], ids=lambda path: path.stem
)
def test_a_committed_file_is_reported_and_drawn_again(path, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(path))
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    assert command.main([BENCHMARKS[path], "--plot-only", str(copy)]) == 0
    assert drawn and capsys.readouterr().out
    assert path.with_suffix(".png").exists()  # beside the numbers


def test_a_comparison_with_muon_has_both_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    path = RESULTS / "convergence-dmgd.json"
    (tmp_path / path.name).write_bytes(path.read_bytes())
    assert command.main(["convergence", "--plot-only", str(tmp_path / path.name)]) == 0
    rows = json.loads(path.read_text())["equal_steps"]
    row = compare(*(list(rows[name]["losses"].values()) for name in ("dmgd", "muon")))
    shown = f"{row['difference']:+.3g} ± {row['error']:.2g} ({row['z']:+.1f}, {row['z_unpaired']:+.1f})"
    assert shown in capsys.readouterr().out
