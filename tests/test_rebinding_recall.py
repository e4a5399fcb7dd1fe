"""What a memory that overwrites is for: keys are bound again and again, and each is asked for its latest value."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deep_optim.models import SelfModifyingTitans

KEYS, VALUES, DIM = 4, 8, 32
UNBOUND = -100  # of a key that was never written; cross_entropy leaves it out


def draw(batch: int, writes: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return tokens [B, 2 writes + KEYS], pairs of key and value and then every key in turn, and answers [B, KEYS]."""
    key = torch.randint(KEYS, (batch, writes), generator=rng)
    value = torch.randint(VALUES, (batch, writes), generator=rng)
    latest = torch.full((batch, KEYS), UNBOUND)
    for t in range(writes):
        latest[torch.arange(batch), key[:, t]] = value[:, t]
    question = torch.rand(batch, KEYS, generator=rng).argsort(-1)
    pairs = torch.stack([key, KEYS + value], -1).flatten(1)
    return torch.cat([pairs, KEYS + VALUES + question], 1), latest.gather(1, question)


class OneLayer(nn.Module):
    """Embedding, layer, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2 * KEYS + VALUES, DIM)
        self.layer = SelfModifyingTitans(DIM, heads=2, projection_chunk_size=8)
        self.head = nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, VALUES))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.layer(F.rms_norm(x, (DIM,)))[0]
        return self.head(x[:, -KEYS:])


@pytest.mark.filterwarnings("error")
def test_one_layer_answers_with_the_latest_value_also_after_twice_as_many_writes() -> None:
    """150 steps on 12 writes: each key has been bound to 3 values on average, which a memory that adds up confuses."""
    torch.manual_seed(0)
    rng, model, steps = torch.Generator().manual_seed(0), OneLayer(), 150
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        tokens, answers = draw(32, 12, rng)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), answers.flatten(), ignore_index=UNBOUND)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for writes in (12, 24):
        tokens, answers = draw(500, writes, rng)
        with torch.no_grad():
            right = model(tokens).argmax(-1)[answers != UNBOUND] == answers[answers != UNBOUND]
        accuracy = right.double().mean().item()
        print(f"{writes} writes: {accuracy:.4f}")
        assert accuracy > 0.98
