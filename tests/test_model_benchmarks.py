"""`models`: its baselines compute what they are named for, and a run can be repeated and resumed."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import __main__ as command
from benchmarks import activations, lesson, models, throughput
from benchmarks.lesson import Lesson, accuracy
from benchmarks.problems import IGNORE, make_problem
from benchmarks.sequence_models import EVERY, DeltaNet, LinearAttention, ReflectingDeltaNet
from benchmarks.trials import Results
from deep_optim.models import Hope, Transformer

TINY = ["--steps", "3", "--dim", "16", "--layers", "1", "--batch", "4", "--lrs", "1e-3,2e-3", "--seeds", "1,2"]


@pytest.mark.parametrize("name", EVERY)
def test_models_are_causal_and_treat_samples_alone(name):
    torch.manual_seed(0)
    model = EVERY[name](11, 16, 2).double().eval()
    tokens = torch.randint(11, (3, 20), generator=torch.Generator().manual_seed(1))
    edited = tokens.clone()
    edited[:, 12:] = (edited[:, 12:] + 1) % 11
    logits = model(tokens)[0]
    assert logits.shape == (3, 20, 11)
    torch.testing.assert_close(model(edited)[0][:, :12], logits[:, :12])
    torch.testing.assert_close(model(tokens[1:2])[0], logits[1:2])


@pytest.mark.parametrize("mixer", [LinearAttention, DeltaNet])
def test_baseline_mixers_against_their_recurrence(mixer):
    rng = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 40, 4, generator=rng, dtype=torch.float64)
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    rate = torch.rand(2, 2, 40, generator=rng, dtype=torch.float64)
    memory = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    expected = []
    for t in range(40):
        q, k, v = (each[:, :, t, :, None] for each in (query, key, value))
        b = rate[:, :, t, None, None]
        memory = memory + b * (v - (memory @ k if mixer is DeltaNet else 0)) @ k.mT
        expected.append((memory @ q)[..., 0])
    answers = mixer(8, 2).double().answers(query, key, value, rate)
    torch.testing.assert_close(answers, torch.stack(expected, 2))


def test_strengths_of_the_baselines_end_where_their_names_say():
    """DeltaNet's at 1, where a write replaces; the other's at 2, where it reflects. Keys have length 1 for both."""
    seen = {}

    def watch(mixer):
        def answers(query, key, value, rate, own=mixer.answers):
            seen[type(mixer)] = rate, key
            return own(query, key, value, rate)

        mixer.answers = answers

    for cls, most in ((LinearAttention, 1.0), (DeltaNet, 1.0), (ReflectingDeltaNet, 2.0)):
        torch.manual_seed(0)
        mixer = cls(8, 2)
        watch(mixer)
        mixer(100 * torch.randn(2, 30, 8))
        rate, key = seen[cls]
        assert 0 <= rate.min() < 0.1 * most and 0.9 * most < rate.max() <= most
        torch.testing.assert_close(key.norm(dim=-1), torch.ones(2, 2, 30))


def test_the_better_rate_is_that_with_more_right_answers_as_long_as_in_training():
    lessons = [Lesson("rebinding", "lstm", 16, 1, lr, 0, 4, 4) for lr in (1e-3, 2e-3, 4e-3)]
    made = Results(Path("nowhere"), resume=False, kind=Lesson)
    made.trials = {
        lessons[0]: {"diverged": False, "loss": 0.2, "scores": {"24 pairs": 0.5, "48 pairs": 0.9}},
        lessons[1]: {"diverged": False, "loss": 0.1, "scores": {"24 pairs": 0.5, "48 pairs": 0.1}},
        lessons[2]: {"diverged": True, "loss": None, "scores": {}},
    }
    assert models._best(lessons, made) == 2e-3
    made.trials[lessons[0]]["scores"]["24 pairs"] = 0.6
    assert models._best(lessons, made) == 1e-3


def test_the_strings_of_the_test_are_not_those_of_training():
    problem = make_problem("rebinding")
    rows = [
        {tuple(row) for row in problem.draw(torch.Generator().manual_seed(seed), 512, *problem.train)[0].tolist()}
        for seed in (lesson.TEST_SEED, 0, 1, 2, 3)
    ]
    assert not rows[0] & set().union(*rows[1:])


def test_accuracy_counts_strings_whole_and_answers_one_by_one():
    class Cheat(torch.nn.Module):
        """Knows the answers of parity, but for every fourth string's last."""

        def forward(self, tokens):
            right = tokens.cumsum(1) % 2
            right[::4, -1] ^= 1
            return F.one_hot(right, 2).float(), {}

    problem = make_problem("parity")
    rows = problem.draw(torch.Generator().manual_seed(0), 4, 30, 30)[1]
    assert (rows != IGNORE).all()
    assert accuracy(Cheat(), problem, (30, 30), "cpu") == 0.75


def test_a_lesson_can_be_repeated_and_tests_every_size():
    lesson = Lesson("rebinding", "linear attention", 16, 1, 1e-3, 3, 4, 4)
    first, again = lesson.run(), lesson.run()
    assert first["curve"] == again["curve"] and first["scores"] == again["scores"]
    assert set(first["scores"]) == {"24 pairs", "48 pairs"} and not first["diverged"]
    assert Lesson.from_json(lesson.to_json()) == lesson


def test_models_tunes_scores_draws_and_resumes(tmp_path):
    file = tmp_path / "models.json"
    arguments = [
        "models",
        "--task",
        "parity,mqar",
        "--models",
        "lstm,deltanet",
        *TINY,
        "--workers",
        "1",
        "--output",
        str(file),
    ]
    assert command.main(arguments) == 0
    document = json.loads(file.read_text())
    assert set(document["problems"]) == {"parity", "mqar"} and file.with_suffix(".png").exists()
    row = document["problems"]["parity"]["deltanet"]
    assert row["lr"] in (1e-3, 2e-3) and len(row["scores"]["outside"]) == 2 and row["parameters"] > 0
    assert len(document["trials"]) == 2 * 2 * (2 + 2)
    stamp = {json.dumps(each["trial"]): each["result"] for each in document["trials"]}
    assert command.main([*arguments, "--resume", "--task", "parity"]) == 0
    resumed = json.loads(file.read_text())
    assert {json.dumps(each["trial"]): each["result"] for each in resumed["trials"]} == stamp  # nothing was run again
    assert resumed["config"] == document["config"] and not {"steps", "lrs"} & set(resumed["config"])
    with pytest.raises(SystemExit, match=r"models\.json has runs with dim=16, not 32; write to another --output"):
        command.main([*arguments, "--resume", "--dim", "32"])


def test_an_unknown_model_or_problem_is_refused(capsys):
    for arguments, said in (
        (["--task", "chess"], "nothing named 'chess'"),
        (["--models", "rnn"], "nothing named 'rnn'"),
    ):
        with pytest.raises(SystemExit):
            command.main(["models", *arguments])
        assert said in capsys.readouterr().err


def test_throughput_writes_times_and_exact_bytes(tmp_path):
    file = tmp_path / "throughput.json"
    sizes = ["--dim", "16", "--layers", "1", "--tokens", "128", "--lengths", "64,128", "--rounds", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "LOOP_LENGTH", 32)
        assert command.main(["throughput", "--models", "hope", *sizes, "--output", str(file)]) == 0
    document = json.loads(file.read_text())
    short, long = document["lengths"]["64"], document["lengths"]["128"]
    cache = 2 * 4 * 16  # keys and values of one token in float32
    assert short["transformer"]["state_bytes_per_sample"] == 64 * cache
    assert long["transformer"]["state_bytes_per_sample"] == 128 * cache
    sizes = [rows["hope"]["state_bytes_per_sample"] for rows in (short, long)]
    assert sizes[0] == pytest.approx(sizes[1], abs=8) and sizes[0] > 0  # but for the counter that samples share
    assert document["chunks"]["ratio"] > 0 and short["transformer"]["ratio"] == 1.0


def test_activations_counts_without_data_what_a_block_keeps_with_it(tmp_path):
    def counted():
        return activations.block_bytes(Hope(1, 16, 1, chunk_sizes=(16, 8)).blocks[0], 16, 40)

    with FakeTensorMode():
        without = counted()
    assert without == counted() > 0


def test_the_page_of_estimates_has_the_figures_that_follow_from_presets_and_counts():
    page = (Path(__file__).parent.parent / "docs" / "models" / "estimates.md").read_text(encoding="utf-8")
    counts = json.loads(activations.OUTPUT.read_text())["bytes_per_token"]
    for size, tokens in {"340m": 15e9, "760m": 30e9, "1.3b": 100e9}.items():
        with torch.device("meta"):
            transformer, model = Transformer.preset(size), Hope.preset(size)
        params, dim = sum(param.numel() for param in transformer.parameters()), model.head.in_features
        short, long = (counts[size][f"hope, chunks of {chunks}"] / 1e6 for chunks in ("64 and 16", "2048 and 512"))
        kept = counts[size]["transformer"] / 1e6
        assert f"| {size.upper()} | {dim:,}, 24 | {short:.0f} MB | {long:.0f} MB | {kept:.1f} MB |" in page
        rate = 0.4 * 989e12 / (6 * params)
        hours = tokens / rate / 3600
        (line,) = re.findall(rf"\| {size.upper()} \|(.* G \|.*) \|", page)
        row = [float(re.sub("[, G]", "", cell)) for cell in line.split("|")]
        assert row == pytest.approx([params / 1e9, tokens / 1e9, rate, rate / 5, hours, 5 * hours], rel=0.01)
    assert f"would keep {4096 * counts['1.3b']['hope, chunks of 2048 and 512'] / 1e9:.0f} GB" in " ".join(page.split())


def test_saved_bytes_are_what_autograd_keeps():
    class Square(torch.nn.Module):
        def forward(self, tokens):
            return self.logits(tokens), {}

        def logits(self, tokens):
            x = torch.zeros(*tokens.shape, 5, requires_grad=True)
            return x * x  # keeps x, 4 · 5 bytes a token, once

    tokens = torch.zeros(2, 9, dtype=torch.long)
    # cross-entropy keeps its log-probabilities, the targets, and a weight of one number
    assert throughput.saved_bytes(Square(), tokens) == 16 * (4 * 5 + 4 * 5 + 8) + 4
