"""One run of a sequence model on a synthetic problem, described by plain values like a `Trial`."""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .problems import IGNORE, Problem, make_problem, score
from .sequence_models import EVERY
from .training import relative_rate

BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.01, 1.0
TEST_SEED, TEST_STRINGS, TEST_BATCH = 10**6, 512, 32
CURVE = 20  # points


@dataclass(frozen=True)
class Lesson:
    """Everything that decides the outcome of a run, besides the machine."""

    problem: str
    model: str
    dim: int
    num_layers: int
    lr: float
    seed: int
    steps: int
    batch: int
    device: str = "cpu"

    @property
    def label(self) -> str:
        return f"{self.model} on {self.problem}, lr={self.lr:g} seed={self.seed}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Lesson":
        return cls(**values)

    def run(self) -> dict[str, Any]:
        """Train with AdamW, then test on strings of all sizes that the problem is tested at."""
        problem = make_problem(self.problem)
        torch.manual_seed(self.seed)
        model = EVERY[self.model](problem.vocab_size, self.dim, self.num_layers).to(self.device)
        parameters = sum(param.numel() for param in model.parameters())
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
        rng = torch.Generator().manual_seed(self.seed)
        losses: list[float] = []
        start = time.perf_counter()
        for step in range(1, self.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * relative_rate(step, self.steps, min(100, self.steps // 10 + 1))
            tokens, answers = (each.to(self.device) for each in problem.draw(rng, self.batch, *problem.train))
            loss = F.cross_entropy(model(tokens)[0].flatten(0, 1), answers.flatten(), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                return {"diverged": True, "loss": None, "scores": {}, "parameters": parameters, "stopped": step}
        seconds = time.perf_counter() - start
        piece = max(1, self.steps // CURVE)
        curve = [(i + piece, sum(losses[i : i + piece]) / piece) for i in range(0, self.steps - piece + 1, piece)]
        scores = {name: accuracy(model, problem, sizes, self.device) for name, sizes in problem.tests.items()}
        return {
            "diverged": False, "loss": curve[-1][1], "curve": curve, "scores": scores, "seconds": seconds,
            "parameters": parameters,
        }  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, problem: Problem, sizes: tuple[int, int], device: str) -> float:
    """The share of strings, or of answers, that are right: the same strings for every model."""
    rng = torch.Generator().manual_seed(TEST_SEED)
    model.eval()
    right = count = 0
    for _ in range(TEST_STRINGS // TEST_BATCH):
        tokens, expected = problem.draw(rng, TEST_BATCH, *sizes)
        answers: Tensor = model(tokens.to(device))[0].argmax(-1).cpu()
        more = score(answers, expected, problem.whole)
        right, count = right + more[0], count + more[1]
    model.train()
    return right / count
