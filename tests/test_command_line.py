"""What the commands that run trials have in common: an interrupted one keeps what was finished, and goes on there."""

import json

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import __main__ as command
from benchmarks.trials import Meter

COMMANDS = {
    "convergence": "--task regression --optimizers adamw --no-wall --rounds 2 --seeds 1",
    "forgetting": "--task orthogonal --optimizers sgd,adamw --state reset --lrs 1 --seeds 1",
    "language": "--corpus {text} --models lstm --dims 16 --layers 1 --batch 2 --context 16 --lrs 1e-3 --seeds 1,2",
    "models": "--task parity --models lstm --dim 16 --layers 1 --batch 2 --lrs 1e-3 --seeds 1,2",
    "two_languages": "--arms transformer --lrs 1e-3 --seeds 1,2",
    "m3": "--tables mix --rows none --seeds 1,2",
}
SHORT = ["--steps", "2", "--workers", "1"]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_says_how_to_go_on_and_does(name, tmp_path, capsys, monkeypatch):
    text, file = tmp_path / "book.txt", tmp_path / "file.json"
    text.write_bytes(b"abcd" * 2000)
    arguments = [name, *COMMANDS[name].format(text=text).split(), *SHORT, "--output", str(file)]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "advance", interrupt)
        assert command.main(arguments) == 130
    assert "interrupted: 1 finished runs are in" in capsys.readouterr().out
    (first,) = json.loads(file.read_text())["trials"]
    assert command.main([*arguments, "--resume"]) == 0
    document = json.loads(file.read_text())
    assert len(document["trials"]) > 1 and document["trials"][0] == first  # seconds, too: it was not run again
    started, resumed = document["command"].splitlines()  # whoever wants the file again needs both
    assert resumed == f"{started} --resume" and file.with_suffix(".png").exists()
    assert f"numbers: {file}" in "".join(capsys.readouterr().out.splitlines())


def test_a_finished_file_is_reported_again(tmp_path, capsys):
    file = tmp_path / "file.json"
    arguments = ["m3", *COMMANDS["m3"].split(), *SHORT, "--output", str(file)]
    assert command.main(arguments) == 0
    reported = capsys.readouterr().out
    written = file.read_bytes()
    file.with_suffix(".png").unlink()
    assert command.main(["m3", "--plot-only", str(file)]) == 0
    again = capsys.readouterr().out
    assert again in reported and "mix, at equal steps" in again
    assert file.read_bytes() == written and file.with_suffix(".png").exists()
    with pytest.raises(SystemExit, match=r"no results in .*none\.json; run without --plot-only"):
        command.main(["m3", "--plot-only", str(tmp_path / "none.json")])
