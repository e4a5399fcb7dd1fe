"""A small language model of this file's own bytes, trained by an optimizer whose name is the first argument.

python examples/plain_loop.py DMGD
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import deep_optim

CONTEXT, WIDTH, STEPS = 32, 64, 60


class Model(nn.Module):
    """Reads CONTEXT bytes at once and predicts the next."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.hidden = nn.Sequential(
            nn.Linear(CONTEXT * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH)
        )
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, text: Tensor) -> Tensor:  # [B, CONTEXT] -> [B, 256]
        return self.head(self.hidden(self.embed(text).flatten(1)))


def main(name: str = "DMGD") -> tuple[float, float]:
    """Train, and return the loss of the first and of the last step."""
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    windows = text.unfold(0, CONTEXT + 1, 1)
    model = Model()
    optimizer = deep_optim.create_optimizer(name, model, lr=3e-3)  # in place of torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    losses = []
    for _ in range(STEPS):
        batch = windows[torch.randint(len(windows), (64,))]
        loss = nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    print(f"{name}: loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main(*sys.argv[1:])
