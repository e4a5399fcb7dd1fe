"""Recall from what was read: keys that are bound again, many keys at once, a needle in a growing haystack.

A string is pairs of key and value, a sign, and then keys alone; the answer at each of these is the value that its key
was bound to last. The size of a problem is its number of pairs, of a haystack its number of symbols.

Re-binding is the sharpest: a memory that only adds answers with a mixture of all that a key was ever bound to, one that
erases before it writes, or forgets, with the last. With distinct keys nothing has to be erased. In a haystack with one
needle, to keep its value is enough; with several, their keys have to be told apart.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import IGNORE, Problem


class Recall:
    """Pairs of key and value, then queries.

    Args:
        keys, values: how many symbols of each kind there are.
        pairs: of a string in training.
        more: of a longer string, only tested.
        distinct: whether each key is bound once; else keys are drawn with replacement and the last value counts.
    """

    whole = False

    def __init__(self, keys: int, values: int, pairs: int, more: int, *, distinct: bool) -> None:
        self.keys, self.values, self.distinct = keys, values, distinct
        self.vocab_size = keys + values + 1
        self.train = (pairs, pairs)
        self.tests = {f"{count} pairs": (count, count) for count in (pairs, more)}

    def draw(self, rng: torch.Generator, batch: int, low: int, high: int) -> tuple[Tensor, Tensor]:
        pairs = int(torch.randint(low, high + 1, (), generator=rng))
        if self.distinct:
            key = torch.rand(batch, self.keys, generator=rng).argsort(-1)[:, :pairs]
        else:
            key = torch.randint(self.keys, (batch, pairs), generator=rng)
        value = torch.randint(self.values, (batch, pairs), generator=rng)
        bound = torch.full((batch, self.keys), IGNORE)
        for t in range(pairs):  # later ones overwrite
            bound.scatter_(1, key[:, t : t + 1], self.keys + value[:, t : t + 1])
        asked = min(pairs, self.keys)
        order = torch.rand(batch, self.keys, generator=rng).masked_fill_(bound == IGNORE, 2.0)
        query = order.argsort(-1)[:, :asked]  # every key that was bound, in random order
        sign = torch.full((batch, 1), self.keys + self.values)
        written = torch.stack([key, self.keys + value], -1).flatten(1)  # [B, 2 pairs]
        tokens = torch.cat([written, sign, query], 1)
        nothing = torch.full((batch, 2 * pairs + 1), IGNORE)
        return tokens, torch.cat([nothing, bound.gather(1, query)], 1)


class Needles:
    """Pairs, each announced by a sign, among symbols without meaning; at the end the sign and one of the keys again.

    Args:
        needles: how many pairs, of different keys, at equal distances.
        longest: haystack in training; tested up to eight times that.
        keys, values, fillers: how many symbols of each kind there are.
    """

    whole = True

    def __init__(self, needles: int, longest: int, keys: int = 16, values: int = 16, fillers: int = 31) -> None:
        self.needles, self.keys, self.values, self.fillers = needles, keys, values, fillers
        self.vocab_size = keys + values + fillers + 1
        self.train = (max(longest // 8, 8 * needles), longest)
        self.tests = {str(length): (length, length) for length in (longest // 2, *(longest * 2**i for i in range(4)))}

    def draw(self, rng: torch.Generator, batch: int, low: int, high: int) -> tuple[Tensor, Tensor]:
        length = int(torch.randint(low, high + 1, (), generator=rng))
        sign = self.keys + self.values + self.fillers
        tokens = self.keys + self.values + torch.randint(self.fillers, (batch, length), generator=rng)
        key = torch.randint(self.keys, (batch, 1), generator=rng)  # that is asked for
        value = torch.randint(self.values, (batch, 1), generator=rng)
        place = torch.randint(length - 5, (batch, 1), generator=rng)
        others = (batch, self.needles - 1)
        steps = torch.randint(1, self.keys // self.needles + 1, others, generator=rng).cumsum(1)
        key = torch.cat([key, (key + steps) % self.keys], 1)  # [B, needles], no two alike
        value = self.keys + torch.cat([value, torch.randint(self.values, others, generator=rng)], 1)
        distance = (length - 5) // self.needles
        place = (place + distance * torch.arange(self.needles)) % (length - 5)
        tokens.scatter_(1, place, sign).scatter_(1, place + 1, key).scatter_(1, place + 2, value)
        tokens[:, -2], tokens[:, -1] = sign, key[:, 0]
        answers = torch.full_like(tokens, IGNORE)
        answers[:, -1] = value[:, 0]
        return tokens, answers


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "rebinding": lambda: Recall(keys=8, values=16, pairs=24, more=48, distinct=False),
    "mqar": lambda: Recall(keys=64, values=16, pairs=16, more=32, distinct=True),
    "needle": lambda: Needles(1, longest=512),
    "needles": lambda: Needles(4, longest=512),
    "short needle": lambda: Needles(1, longest=128),  # for a CPU
    "short needles": lambda: Needles(4, longest=128),
}
