"""Languages learnt in context, one after another: what is left of an earlier one (the shape of the paper's CTNL).

A string teaches every language in turn, by its dictionary: name of the language, word, meaning, for all words in random
order. Then one language is asked for: name and word, and the answer at the word is its meaning. All languages have the
same words, and no dictionary is met twice. The size of a problem is how many languages were taught after the one that
is asked for; the string is as long for all sizes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import IGNORE, Problem


class Translation:
    """Three dictionaries, and questions about one.

    Args:
        languages, words, meanings: how many symbols of each kind there are; all languages are taught.
    """

    whole = False

    def __init__(self, languages: int = 3, words: int = 8, meanings: int = 16) -> None:
        self.languages, self.words, self.meanings = languages, words, meanings
        self.vocab_size = languages + words + meanings
        self.train = (0, languages - 1)
        self.tests = {f"{since} since": (since, since) for since in range(languages)}

    def draw(self, rng: torch.Generator, batch: int, low: int, high: int) -> tuple[Tensor, Tensor]:
        since = torch.randint(low, high + 1, (batch,), generator=rng)
        name = torch.rand(batch, self.languages, generator=rng).argsort(-1)  # in the order of teaching
        shape = (batch, self.languages + 1, self.words)  # the last part asks
        word = torch.rand(shape, generator=rng).argsort(-1)
        dictionary = torch.randint(self.meanings, shape, generator=rng)
        rows, asked = torch.arange(batch), self.languages - 1 - since
        meaning = dictionary[:, :-1].gather(2, word[:, :-1])
        first = self.languages
        taught = [name[..., None].expand_as(meaning), first + word[:, :-1], first + self.words + meaning]
        question = word[:, -1]
        answer = first + self.words + dictionary[rows, asked].gather(1, question)
        questions = torch.stack([name[rows, asked, None].expand_as(question), first + question], -1).flatten(1)
        tokens = torch.cat([torch.stack(taught, -1).flatten(1), questions], 1)
        answers = torch.full_like(tokens, IGNORE)
        answers[:, -2 * self.words + 1 :: 2] = answer
        return tokens, answers


PROBLEMS: dict[str, Callable[[], Problem]] = {"translation": Translation}
