"""`language`: models of equal size, and a loss that is that of the bytes it says."""

import json
import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import __main__ as command
from benchmarks.equal_size import SIZED, build
from benchmarks.language import Reading, held_out_loss


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize(("dim", "layers"), [(32, 1), (64, 2), (128, 4)])
def test_models_have_as_many_parameters_as_the_transformer(name, dim, layers):
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in build(each, 256, dim, layers).parameters()) for each in (name, "transformer")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


class Counter(torch.nn.Module):
    """Sure of byte 0 with e^t to one, t its place in the window: what is lost tells where windows begin."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        logits = torch.full((*tokens.shape, 256), -math.inf)
        logits[..., 1] = 0.0
        logits[..., 0] = torch.arange(tokens.shape[1])
        return logits, None


@pytest.mark.parametrize("length", [8, 2])
def test_the_loss_is_over_all_bytes_in_windows_that_know_nothing_of_each_other(length):
    tokens = torch.zeros(20, 8, dtype=torch.long)
    targets = torch.zeros_like(tokens)
    targets[3, 5] = 1
    surprise = [math.log1p(math.exp(-(t % length))) for t in range(8)]
    expected = (20 * sum(surprise) + 5 % length) / (20 * 8)
    assert held_out_loss(Counter(), tokens, targets, length) == pytest.approx(expected)


def test_the_command_tunes_scores_draws_and_resumes(tmp_path):
    text, file = tmp_path / "book.txt", tmp_path / "language.json"
    text.write_bytes(bytes(range(97, 123)) * 200)
    arguments = [
        *("language", "--corpus", str(text), "--models", "hope,lstm", "--dims", "16", "--layers", "1", "--steps", "4"),
        *("--batch", "2", "--context", "16", "--lrs", "1e-9,1e-2", "--seeds", "1,2", "--workers", "1"),
        *("--output", str(file)),
    ]
    assert command.main(arguments) == 0
    document = json.loads(file.read_text())
    assert [row["model"] for row in document["rows"]] == ["lstm", "hope"] and file.with_suffix(".png").exists()
    for row in document["rows"]:
        assert row["lr"] == 1e-2 and len(row["loss"]) == len(row["longer"]) == 2
    stamp = {json.dumps(each["trial"]): each["result"] for each in document["trials"]}
    assert command.main([*arguments, "--resume"]) == 0
    assert stamp == {json.dumps(each["trial"]): each["result"] for each in json.loads(file.read_text())["trials"]}


def test_reading_learns_and_can_be_repeated(tmp_path):
    text = tmp_path / "book.txt"
    text.write_bytes(b"abcd" * 2000)
    reading = Reading(str(text), "lstm", 16, 1, 3e-2, 0, 40, 4, 16)
    first, again = reading.run(), reading.run()
    assert first["loss"] == again["loss"] < 1.0 and first["longer"] < 1.0
    assert Reading.from_json(reading.to_json()) == reading


def test_a_reading_that_diverges_says_where(tmp_path):
    text = tmp_path / "book.txt"
    text.write_bytes(b"abcd" * 2000)
    result = Reading(str(text), "transformer", 16, 1, 1e30, 0, 40, 4, 16).run()
    assert result["diverged"] and result["loss"] is None and 1 < result["stopped"] < 40 and result["parameters"] > 0


def test_an_unknown_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["language", "--models", "rnn"])
    assert "no model named 'rnn'" in capsys.readouterr().err
