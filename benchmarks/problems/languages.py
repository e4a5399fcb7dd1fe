"""Formal languages (the paper's Table 5): after each symbol of a string, which symbols may follow?

The answer at a position is the number of a set: the symbols by which the prefix so far can go on in the language, its
end among them. Trained on short strings, tested on strings as short ("inside") and on longer ones ("outside", up to
twice as long); a string counts if every one of its answers is right. The size of a problem is the length of its string.
"Long parity" is parity, tested on strings of one length each, the longest four times those of training.

Regular: parity (words over {0, 1}; the answer is the number of ones modulo 2), (aa)*, (abab)*. Counter languages:
aⁿbⁿ, aⁿbⁿcⁿ, and Shuffle-2, brackets of two kinds that are each balanced but not nested in each other. The test is that
of Bhattamishra et al. 2020 (arXiv:2009.11264), from which the paper takes the languages. Beyond the paper, the word
problem of S₃: any of the six permutations of three things at every place, the answer their product so far. It is the
smallest group whose elements do not commute.
"""

from collections.abc import Callable
from itertools import permutations

import torch
from torch import Tensor

from . import IGNORE, Problem

LONGEST = 40  # of the strings in training

String = tuple[list[int], list[int]]  # symbols, and answers after each


class Language:
    """Strings of one language, of different lengths in a batch; what is padded asks for nothing.

    Args:
        vocab_size: symbols, or answers if there are more of these.
        multiple: what a length must be a multiple of.
        string: from a generator and a length to a string.
        lengths: of the tests, one each; without, those of training ("inside") and the longer ones ("outside").
    """

    whole = True

    def __init__(
        self,
        vocab_size: int,
        multiple: int,
        string: Callable[[torch.Generator, int], String],
        lengths: tuple[int, ...] = (),
    ) -> None:
        self.vocab_size, self.multiple, self.string = vocab_size, multiple, string
        self.train = (1, LONGEST)
        self.tests = {str(length): (length, length) for length in lengths} or {
            "inside": self.train,
            "outside": (LONGEST + 1, 2 * LONGEST),
        }

    def draw(self, rng: torch.Generator, batch: int, low: int, high: int) -> tuple[Tensor, Tensor]:
        lengths = torch.arange(low, high + 1)
        lengths = lengths[lengths % self.multiple == 0]
        chosen = lengths[torch.randint(len(lengths), (batch,), generator=rng)].tolist()
        tokens = torch.zeros(batch, max(chosen), dtype=torch.long)
        answers = torch.full_like(tokens, IGNORE)
        for row, length in enumerate(chosen):
            symbols, after = self.string(rng, length)
            tokens[row, :length], answers[row, :length] = torch.tensor(symbols), torch.tensor(after)
        return tokens, answers


def parity(rng: torch.Generator, length: int) -> String:
    bits = torch.randint(2, (length,), generator=rng)
    return bits.tolist(), (bits.cumsum(0) % 2).tolist()


def aa(rng: torch.Generator, length: int) -> String:
    """Only a may follow an odd number of them; after an even one the string may end."""
    return [0] * length, [(t + 1) % 2 for t in range(length)]


def abab(rng: torch.Generator, length: int) -> String:
    """{b}, {a}, {b}, {a, end}: 0, 1, 0, 2."""
    return [t % 2 for t in range(length)], [(0, 1, 0, 2)[t % 4] for t in range(length)]


S3 = list(permutations(range(3)))


def s3(rng: torch.Generator, length: int) -> String:
    """Each permutation is applied to what those before it have made of (0, 1, 2)."""
    symbols, after, product = torch.randint(len(S3), (length,), generator=rng).tolist(), [], S3[0]
    for symbol in symbols:
        x, y, z = (product[place] for place in S3[symbol])
        product = (x, y, z)
        after.append(S3.index(product))
    return symbols, after


def counted(letters: int) -> Callable[[torch.Generator, int], String]:
    """aⁿbⁿ…: the first letter may repeat or end; each other must come n times; then the end."""

    def string(rng: torch.Generator, length: int) -> String:
        n = length // letters
        symbols = [letter for letter in range(letters) for _ in range(n)]
        after = [0] * n  # {a, b}
        for letter in range(1, letters):
            after += [letter] * (n - 1) + [letter + 1]  # the same one again; after the last, the next or the end
        return symbols, after

    return string


def shuffle2(rng: torch.Generator, length: int) -> String:
    """Both kinds may always open; each may close where it is open, and the string may end where none is."""
    symbols, after, depth = [], [], [0, 0]
    for left in range(length, 0, -1):
        opened = sum(depth)
        opens = opened == 0 or (opened < left and torch.rand((), generator=rng).item() < 0.5)
        kinds = [0, 1] if opens else [kind for kind in (0, 1) if depth[kind]]
        kind = kinds[int(torch.randint(len(kinds), (), generator=rng))]
        depth[kind] += 1 if opens else -1
        symbols.append(2 * kind + (0 if opens else 1))
        after.append((depth[0] > 0) + 2 * (depth[1] > 0))
    return symbols, after


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "parity": lambda: Language(2, 1, parity),
    "(aa)*": lambda: Language(2, 1, aa),
    "(abab)*": lambda: Language(3, 1, abab),
    "long parity": lambda: Language(2, 1, parity, lengths=(20, LONGEST, 4 * LONGEST)),
    "s3": lambda: Language(len(S3), 1, s3),
    "anbn": lambda: Language(3, 2, counted(2)),
    "anbncn": lambda: Language(4, 3, counted(3)),
    "shuffle-2": lambda: Language(4, 2, shuffle2),
}
