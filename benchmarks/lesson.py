"""One training run of a sequence model on a synthetic problem."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hope_variants import count
from .problems import IGNORE, Problem, make_problem, score
from .sequence_models import EVERY
from .training import relative_rate
from .trials import Result, Run

BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.01, 1.0
TEST_SEED, TEST_STRINGS, TEST_BATCH = 10**6, 512, 32
CURVE = 20  # points


@dataclass(frozen=True)
class Lesson(Run):
    """One model on one problem, at one learning rate."""

    title = "{model} on {problem},"

    problem: str
    model: str
    dim: int
    num_layers: int
    lr: float
    seed: int
    steps: int
    batch: int
    device: str = "cpu"

    def run(self) -> Result:
        """Train with AdamW, then test on strings of all sizes that the problem is tested at."""
        problem = make_problem(self.problem)
        torch.manual_seed(self.seed)
        model = EVERY[self.model](problem.vocab_size, self.dim, self.num_layers).to(self.device)
        rng = torch.Generator().manual_seed(self.seed)
        result = train(model, lambda: problem.draw(rng, self.batch, *problem.train), self.lr, self.steps)
        tests = {} if result["diverged"] else problem.tests
        return result | {"scores": {name: accuracy(model, problem, size, self.device) for name, size in tests.items()}}


def train(model: nn.Module, draw: Callable[[], tuple[Tensor, Tensor]], lr: float, steps: int) -> Result:
    """Train with AdamW on what is drawn, tokens [B, T] and answers [B, T]; a loss that is none ends the run."""
    start = time.perf_counter()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    losses: list[float] = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * relative_rate(step, steps, min(100, steps // 10 + 1))
        tokens, answers = (each.to(device) for each in draw())
        loss = F.cross_entropy(model(tokens)[0].flatten(0, 1), answers.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return {"diverged": True, "loss": None, "parameters": count(model), "stopped": step}
    seconds, curve = time.perf_counter() - start, thinned(losses)
    return {"diverged": False, "loss": curve[-1][1], "parameters": count(model), "curve": curve, "seconds": seconds}


def thinned(losses: list[float]) -> list[tuple[int, float]]:
    """Means of `CURVE` equal parts, each under its last step."""
    piece = max(1, len(losses) // CURVE)
    return [(i + piece, sum(losses[i : i + piece]) / piece) for i in range(0, len(losses) - piece + 1, piece)]


@torch.no_grad()
def accuracy(model: nn.Module, problem: Problem, sizes: tuple[int, int], device: str) -> float:
    """The share of strings, or of answers, that are right: the same strings for every model."""
    rng = torch.Generator().manual_seed(TEST_SEED)
    model.eval()
    right = asked = 0
    for _ in range(TEST_STRINGS // TEST_BATCH):
        tokens, expected = problem.draw(rng, TEST_BATCH, *sizes)
        answers: Tensor = model(tokens.to(device))[0].argmax(-1).cpu()
        more = score(answers, expected, problem.whole)
        right, asked = right + more[0], asked + more[1]
    model.train()
    return right / asked
