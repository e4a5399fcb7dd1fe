"""Two languages in sequence: the text against its definition, and the command."""

import json

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import __main__ as command
from benchmarks.tasks.languages import FLOOR, IGNORE, MODELS, PROBABILITIES, Languages


def followers(sequence, task, count=400):
    """By context of two letters, how often which letter followed."""
    tokens, targets = next(sequence.batches(1, task, 1, batch=count))
    assert (targets[:, 0] == IGNORE).all() and torch.equal(tokens[:, 2:], targets[:, 1:-1])
    table: dict[tuple[int, int], dict[int, int]] = {}
    for string, after in zip(tokens.tolist(), targets.tolist(), strict=True):
        for t in range(1, len(string)):
            counts = table.setdefault((string[t - 1], string[t]), {})
            counts[after[t]] = counts.get(after[t], 0) + 1
    return table


def test_four_letters_follow_every_context_with_the_probabilities_said():
    table = followers(Languages(), 0)
    ranked = torch.tensor([sorted(counts.values(), reverse=True) for counts in table.values() if len(counts) == 4])
    assert max(map(len, table.values())) == 4 and len(ranked) > 200
    shares = ranked.sum(0) / ranked.sum()
    assert torch.allclose(shares.float(), torch.tensor(PROBABILITIES), atol=0.02)


def test_the_second_language_is_the_first_in_other_letters():
    sequence = Languages()
    first, second = followers(sequence, 0), followers(sequence, 1)
    letter = sequence.alphabets[1].tolist()
    assert sorted(letter) == list(range(16)) and letter != list(range(16))
    common = 0
    for (x, y), counts in first.items():
        other = second.get((letter[x], letter[y]), {})
        if len(counts) == len(other) == 4:
            common += 1
            assert {letter[z] for z in counts} == set(other)
    assert common > 150


def test_the_floor_is_the_loss_of_who_knows_the_language():
    sequence = Languages()

    class Knows(torch.nn.Module):
        def forward(self, tokens):
            logits = torch.full((*tokens.shape, 16), -1e9)
            before = torch.cat([tokens[:, :1], tokens[:, :-1]], 1)
            logits.scatter_(
                -1, sequence.follows[before, tokens], torch.tensor(PROBABILITIES).log().expand(*tokens.shape, -1)
            )
            return logits, None

    assert sequence.evaluate(Knows(), 0)["score"] == pytest.approx(0.0, abs=0.02)
    assert sequence.evaluate(Knows(), 1)["score"] > 5
    assert torch.distributions.Categorical(torch.tensor(PROBABILITIES)).entropy().item() == pytest.approx(FLOOR)


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_of_a_model_learns_from_one_string(model):
    sequence = Languages(model=model)
    net = sequence.model(0)
    batch = next(sequence.batches(0, 0, 1, batch=1))
    grads = torch.autograd.grad(sequence.loss(net, batch, 0), list(net.parameters()))  # EWC asks for them all
    assert all(grad.isfinite().all() for grad in grads)


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="no model named 'rnn'; there are: transformer"):
        Languages(model="rnn")


def test_the_command_draws_frontiers_and_resumes(tmp_path):
    file = tmp_path / "two.json"
    arguments = ["two_languages", "--arms", "hope,transformer,transformer + replay", "--steps", "3", "--workers", "1"]
    arguments += ["--lrs", "1e-3,1e-2", "--seeds", "1,2", "--output", str(file)]
    assert command.main(arguments) == 0
    document = json.loads(file.read_text())
    assert (
        set(document["arms"]) == {"hope", "transformer", "transformer + replay"} and file.with_suffix(".png").exists()
    )
    assert len(document["trials"]) == 3 * 2 * 2
    for name, arm in document["arms"].items():
        assert set(arm["rates"]) == {"0.001", "0.01"} and ("saved" in arm) == (name != "transformer")
        for each in document["trials"]:
            options = each["trial"]["options"]["model"], each["trial"]["optimizer"]
            if options == (name, "adamw") and each["trial"]["lr"] == 0.01 and each["trial"]["seed"] == 2:
                scores = each["result"]["scores"]
                assert arm["rates"]["0.01"][1]["forgetting"] == pytest.approx(scores[1][0] - scores[0][0])
    stamp = document["trials"]
    assert command.main([*arguments, "--resume"]) == 0
    assert json.loads(file.read_text())["trials"] == stamp
