"""The problems against their own definitions, by another way than the one that made them."""

import pytest
import torch

from benchmarks.problems import IGNORE, languages, mad, make_problem, recall, score, translation

NAMES = [*languages.PROBLEMS, *recall.PROBLEMS, *mad.PROBLEMS, *translation.PROBLEMS]


def drawn(name, which="train", batch=8, seed=0):
    problem = make_problem(name)
    sizes = problem.train if which == "train" else problem.tests[which]
    return problem, *problem.draw(torch.Generator().manual_seed(seed), batch, *sizes)


@pytest.mark.parametrize("name", NAMES)
def test_strings_and_answers_fit_the_vocabulary_and_the_seed(name):
    problem, tokens, answers = drawn(name)
    assert tokens.shape == answers.shape and tokens.dtype == answers.dtype == torch.long
    assert 0 <= tokens.min() and tokens.max() < problem.vocab_size
    asked = answers[answers != IGNORE]
    assert len(asked) and 0 <= asked.min() and asked.max() < problem.vocab_size
    assert torch.equal(tokens, drawn(name)[1]) and problem.tests


def test_an_unknown_problem_is_refused_with_a_list():
    with pytest.raises(ValueError, match="no problem named 'chess'; there are: parity"):
        make_problem("chess")


REGULAR = {
    "parity": lambda word: [sum(word[: t + 1]) % 2 for t in range(len(word))],
    "(aa)*": lambda word: [int(t % 2 == 0) for t in range(len(word))],
    "(abab)*": lambda word: [[0, 1, 0, 2][t % 4] for t in range(len(word))],
}


@pytest.mark.parametrize("name", REGULAR)
def test_regular_languages(name):
    _, tokens, after = drawn(name, "outside")
    for symbols, expected in zip(tokens.tolist(), after.tolist(), strict=True):
        word = symbols[: sum(answer != IGNORE for answer in expected)]
        assert 41 <= len(word) <= 80 and expected[: len(word)] == REGULAR[name](word)
        assert name == "parity" or word == [t % 2 if name == "(abab)*" else 0 for t in range(len(word))]


def test_long_parity_is_parity_at_one_length_a_test():
    for length in (20, 40, 160):
        _, tokens, after = drawn("long parity", str(length))
        assert tokens.shape == (8, length) and torch.equal(after, tokens.cumsum(1) % 2)


def test_s3_answers_the_product_of_permutation_matrices():
    matrices = torch.eye(3)[torch.tensor(languages.S3)]  # P [i, j] = 1 where place i takes what stood in place j
    _, tokens, after = drawn("s3", "outside")
    for symbols, expected in zip(tokens, after, strict=True):
        product = torch.eye(3)
        for symbol, answer in zip(symbols, expected[expected != IGNORE], strict=False):
            product = matrices[symbol] @ product
            assert torch.equal(matrices[answer], product)
    assert set(tokens.flatten().tolist()) == set(range(6))


@pytest.mark.parametrize(("name", "letters"), [("anbn", 2), ("anbncn", 3)])
def test_counter_languages_answer_what_may_follow(name, letters):
    """The set that an answer stands for, from the language: all w such that prefix w … is in it."""
    _, tokens, after = drawn(name)
    words = {tuple(letter for letter in range(letters) for _ in range(n)) for n in range(1, 60)}
    sets: dict[int, set] = {}
    for symbols, expected in zip(tokens.tolist(), after.tolist(), strict=True):
        length = sum(answer != IGNORE for answer in expected)
        assert tuple(symbols[:length]) in words
        for t in range(length):
            prefix = tuple(symbols[: t + 1])
            follows = {word[t + 1] if len(word) > t + 1 else "end" for word in words if word[: t + 1] == prefix}
            assert sets.setdefault(expected[t], follows) == follows
    assert len(sets) == letters + 1 and len({frozenset(each) for each in sets.values()}) == letters + 1


def test_shuffle2_balances_each_kind_by_itself():
    _, tokens, after = drawn("shuffle-2", batch=30)
    crossed = 0
    for symbols, expected in zip(tokens.tolist(), after.tolist(), strict=True):
        length, depth, stack = sum(answer != IGNORE for answer in expected), [0, 0], []
        for symbol, answer in zip(symbols[:length], expected, strict=False):
            kind, closes = divmod(symbol, 2)
            depth[kind] += -1 if closes else 1
            if closes:
                crossed += stack.pop() != kind
            else:
                stack.append(kind)
            assert min(depth) >= 0 and answer == (depth[0] > 0) + 2 * (depth[1] > 0)
        assert depth == [0, 0]
    assert crossed  # else one bracket kind would do


@pytest.mark.parametrize("name", ["rebinding", "mqar"])
def test_recall_asks_for_what_a_key_was_bound_to_last(name):
    problem, tokens, answers = drawn(name)
    pairs = problem.train[0]
    overwritten = 0
    for string, expected in zip(tokens.tolist(), answers.tolist(), strict=True):
        bound = {}
        for key, value in zip(string[0 : 2 * pairs : 2], string[1 : 2 * pairs : 2], strict=True):
            overwritten += key in bound
            bound[key] = value
        asked = [(string[t], expected[t]) for t in range(len(string)) if expected[t] != IGNORE]
        assert dict(asked) == bound and len(asked) == len(bound) and string[2 * pairs] == problem.vocab_size - 1
    assert (overwritten > 0) == (name == "rebinding")


@pytest.mark.parametrize("length", [32, 1024])
@pytest.mark.parametrize("count", [1, 4])
def test_each_needle_is_there_once_and_one_of_them_is_asked_for_at_the_end(count, length):
    problem = recall.Needles(count, longest=128)
    assert problem.train[0] <= 32
    tokens, answers = problem.draw(torch.Generator().manual_seed(0), 400, length, length)
    sign = problem.vocab_size - 1
    assert tokens.shape == (400, length)
    places, asked = [], []
    for string, expected in zip(tokens.tolist(), answers.tolist(), strict=True):
        *found, last = (t for t, symbol in enumerate(string) if symbol == sign)
        pairs = {string[t + 1]: string[t + 2] for t in found}
        assert last == length - 2 and len(found) == len(pairs) == count and expected[-1] == pairs[string[-1]]
        assert all(0 <= key < 16 <= value < 32 for key, value in pairs.items())
        assert sum(symbol < 32 for symbol in string) == 2 * count + 1  # all else has no meaning
        assert sum(answer != IGNORE for answer in expected) == 1
        places += found
        asked.append(list(pairs).index(string[-1]))
    assert min(places) < 0.03 * length and max(places) > 0.8 * length and set(asked) == set(range(count))


@pytest.mark.parametrize("since", [0, 1, 2])
def test_translation_asks_for_the_language_that_was_taught_so_long_ago(since):
    _, tokens, answers = drawn("translation", f"{since} since", batch=20)
    contradicted = 0
    for string, expected in zip(tokens.tolist(), answers.tolist(), strict=True):
        taught, questions = string[:72], string[72:]
        order = list(dict.fromkeys(taught[::3]))
        assert sorted(order) == [0, 1, 2] and [taught[24 * k] for k in range(3)] == order
        book = dict(zip(zip(taught[::3], taught[1::3], strict=True), taught[2::3], strict=True))
        assert len(book) == 24 and all(2 < word <= 10 < meaning for (_, word), meaning in book.items())
        assert set(questions[::2]) == {order[2 - since]} and sorted(questions[1::2]) == list(range(3, 11))
        assert expected[:72] == [IGNORE] * 72 and expected[72::2] == [IGNORE] * 8
        assert expected[73::2] == [book[question] for question in zip(questions[::2], questions[1::2], strict=True)]
        contradicted += sum(book[0, word] != book[1, word] for word in range(3, 11))
    assert contradicted > 100


def test_in_context_recall_asks_only_for_keys_seen_before():
    _, tokens, answers = drawn("in-context recall")
    for string, expected in zip(tokens.tolist(), answers.tolist(), strict=True):
        seen = {}
        for t in range(0, len(string), 2):
            assert expected[t] == seen.get(string[t], IGNORE) and expected[t + 1] == IGNORE
            seen[string[t]] = string[t + 1]


def test_fuzzy_recall_asks_for_the_whole_word_after_a_key_seen_before():
    _, tokens, answers = drawn("fuzzy recall")
    for string, expected in zip(tokens.tolist(), answers.tolist(), strict=True):
        seen, t = {}, 0
        while True:
            try:
                middle = string.index(16, t)
                end = string.index(16, middle + 1)
            except ValueError:
                break  # the last pair is cut off
            key, value = tuple(string[t:middle]), string[middle + 1 : end]
            assert max(key) < 8 <= min(value) and 1 <= len(key) <= 3 and 1 <= len(value) <= 3
            assert expected[t:middle] == [IGNORE] * len(key) and expected[end] == IGNORE
            assert expected[middle:end] == ([*value, 16] if key in seen else [IGNORE] * (len(value) + 1))
            assert seen.setdefault(key, value) == value
            t = end + 1


def test_selective_copying_repeats_what_is_not_blank():
    _, tokens, answers = drawn("selective copying")
    for string, expected in zip(tokens.tolist(), answers.tolist(), strict=True):
        content = [symbol for symbol in string[:64] if symbol < 16]
        assert len(content) == 16 and string[64:] == [17] * 16
        assert expected == [IGNORE] * 64 + content


def test_memorisation_has_one_dictionary_for_all_seeds():
    _, tokens, answers = drawn("memorisation", seed=1)
    _, others, more = drawn("memorisation", seed=2)
    known = dict(zip(tokens.flatten().tolist(), answers.flatten().tolist(), strict=True))
    met = [
        (key, value)
        for key, value in zip(others.flatten().tolist(), more.flatten().tolist(), strict=True)
        if key in known
    ]
    assert len(met) > 50 and all(known[key] == value for key, value in met)


def test_compression_asks_for_every_place_once():
    _, tokens, answers = drawn("compression")
    for string, expected in zip(tokens.tolist(), answers.tolist(), strict=True):
        assert sorted(string[32:]) == list(range(16, 48))
        assert expected == [IGNORE] * 32 + [string[place - 16] for place in string[32:]]


def test_a_string_counts_whole_or_by_its_answers():
    expected = torch.tensor([[0, IGNORE, 1], [1, 1, 1]])
    answers = torch.tensor([[0, 7, 1], [1, 0, 1]])
    assert score(answers, expected, whole=True) == (1, 2)
    assert score(answers, expected, whole=False) == (4, 5)
