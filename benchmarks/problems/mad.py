"""The synthetic problems of MAD (Poli et al. 2024, arXiv:2403.17844), which the paper's Table 4 reports.

In-context recall: pairs of key and value, drawn with repetition from a dictionary that is new for every string; the
answer at a key is its value, wherever it has been seen before. Fuzzy recall: the same with keys and values of one to
three symbols. Selective copying: symbols scattered among blanks, to be repeated in their order at the end.
Memorisation: the dictionary is the same for all strings, so that the weights have to hold it. Compression: a string,
then its places in random order; the answer at a place is the symbol that stood there. (MAD reads a compressed string
by an MLP of its own; here the model itself is asked.) The size of a problem is the number of its symbols.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import IGNORE, Problem


class Mad:
    """One of them, at one length. `draw` takes the batch from `strings`, whose length is the size."""

    whole = False

    def __init__(
        self, vocab_size: int, length: int, strings: Callable[[torch.Generator, int, int], tuple[Tensor, Tensor]]
    ) -> None:
        self.vocab_size, self.strings = vocab_size, strings
        self.train = (length, length)
        self.tests = {str(length): (length, length)}

    def draw(self, rng: torch.Generator, batch: int, low: int, high: int) -> tuple[Tensor, Tensor]:
        return self.strings(rng, batch, int(torch.randint(low, high + 1, (), generator=rng)))


KEYS = VALUES = 16


def in_context_recall(rng: torch.Generator, batch: int, length: int) -> tuple[Tensor, Tensor]:
    pairs = length // 2
    dictionary = torch.randint(VALUES, (batch, KEYS), generator=rng)
    key = torch.randint(KEYS, (batch, pairs), generator=rng)
    value = KEYS + dictionary.gather(1, key)
    earlier = (key[:, :, None] == key[:, None, :]).tril(-1).any(-1)  # seen before
    tokens = torch.stack([key, value], -1).flatten(1)
    answers = torch.stack([value.where(earlier, torch.tensor(IGNORE)), torch.full_like(value, IGNORE)], -1).flatten(1)
    return tokens, answers


def fuzzy_recall(rng: torch.Generator, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys are words over the first eight symbols, values over the next; a sign ends each word."""
    letters, sign, entries = 8, 16, 8
    tokens = torch.full((batch, length), sign)
    answers = torch.full((batch, length), IGNORE)

    def word(first: int) -> list[int]:
        count = int(torch.randint(1, 4, (), generator=rng))
        return [first + int(letter) for letter in torch.randint(letters, (count,), generator=rng)]

    for row in range(batch):
        dictionary: dict[tuple[int, ...], list[int]] = {}
        while len(dictionary) < entries:
            dictionary[tuple(word(0))] = word(letters)
        entry, seen, symbols, after = list(dictionary.items()), set(), [], []
        while len(symbols) < length:
            key, value = entry[int(torch.randint(entries, (), generator=rng))]
            pair = [*key, sign, *value, sign]
            asked = [*value, sign] if key in seen else [IGNORE] * (len(value) + 1)
            symbols += pair
            after += [IGNORE] * len(key) + asked + [IGNORE]  # the sign after a key asks for the first of its value
            seen.add(key)
        tokens[row], answers[row] = torch.tensor(symbols[:length]), torch.tensor(after[:length])
    return tokens, answers


def selective_copying(rng: torch.Generator, batch: int, length: int) -> tuple[Tensor, Tensor]:
    symbols, copied = 16, 16
    blank, sign = symbols, symbols + 1
    content = torch.randint(symbols, (batch, copied), generator=rng)
    places = torch.rand(batch, length, generator=rng).argsort(-1)[:, :copied].sort(-1).values
    text = torch.full((batch, length), blank).scatter_(1, places, content)
    tokens = torch.cat([text, torch.full((batch, copied), sign)], 1)
    return tokens, torch.cat([torch.full((batch, length), IGNORE), content], 1)


def memorisation(rng: torch.Generator, batch: int, length: int) -> tuple[Tensor, Tensor]:
    keys, values = 256, 16
    dictionary = torch.randint(values, (keys,), generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(keys, (batch, length), generator=rng)
    return tokens, dictionary[tokens]


def compression(rng: torch.Generator, batch: int, length: int) -> tuple[Tensor, Tensor]:
    symbols = 16
    text = torch.randint(symbols, (batch, length), generator=rng)
    places = torch.rand(batch, length, generator=rng).argsort(-1)
    return torch.cat([text, symbols + places], 1), torch.cat([torch.full_like(text, IGNORE), text.gather(1, places)], 1)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "in-context recall": lambda: Mad(KEYS + VALUES, 64, in_context_recall),
    "fuzzy recall": lambda: Mad(17, 96, fuzzy_recall),
    "selective copying": lambda: Mad(18, 64, selective_copying),
    "memorisation": lambda: Mad(256, 32, memorisation),
    "compression": lambda: Mad(16 + 32, 32, compression),
}
