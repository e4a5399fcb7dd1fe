"""What an optimizer step costs on many GPUs, predicted: memory, communication and time of a sharded (FSDP2) model.

    state          bytes per entry / ranks, and whole matrices for the time of the step
    communication  entries · (gathered + scattered) bytes / ranks · (ranks − 1) / ranks, sent by a rank on average
    time           max over ranks of (FLOPs of its matrices / rate, bytes of its matrices / bandwidth)

A matrix is computed on one rank, so the time stops falling when every rank has one matrix or none. FLOPs per matrix are
counted at a small scale and grow with the cube; bytes and FLOPs are checked by tests against runs on several ranks.
The rates of the machine are assumptions. Nothing here has been measured on a GPU.
"""

import argparse
import functools
import heapq
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import deep_optim

from .measure import command, versions
from .scaling_plot import draw_scaling

RESULTS = Path(__file__).parent / "results" / "scaling.json"
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
SHOWN = (8, 64, 256, 1024)
TOKENS = 4 * 2**20  # in a step, whatever the number of ranks

# Assumed of one GPU, an H100 SXM: dense bfloat16 products at 2/3 of their peak, HBM at 80 %, NVLink within a node
# of 8 and 400 Gbit/s between nodes at 80 %, training at 40 % of the peak.
RATE, HBM = 0.66 * 989e12, 0.8 * 3.35e12
NVLINK, NETWORK = 0.8 * 450e9, 0.8 * 50e9
TRAINING = 0.4 * 989e12


class Model(NamedTuple):
    """A Llama: its sizes, of which the matrices of a layer follow."""

    layers: int
    width: int
    hidden: int
    key_value: int  # width of all keys
    words: int

    def matrices(self) -> list[tuple[int, int]]:
        """Return the shape of every matrix that has a memory."""
        d, h, k = self.width, self.hidden, self.key_value
        return [(d, d), (k, d), (k, d), (d, d), (h, d), (h, d), (d, h)] * self.layers

    def entries(self) -> int:
        return sum(m * n for m, n in self.matrices())

    def parameters(self) -> int:
        return self.entries() + 2 * self.words * self.width


MODELS = {
    "7B": Model(32, 4096, 11008, 4096, 32000),
    "70B": Model(80, 8192, 28672, 1024, 128256),
    "405B": Model(126, 16384, 53248, 1024, 128256),
}


class Costs(NamedTuple):
    """Bytes per entry of a matrix: what is kept, what is gathered and what is scattered in a step."""

    state: int
    gathered: int
    scattered: int


COSTS = {
    "AdamW": Costs(8, 0, 0),
    "Momentum": Costs(4, 4, 4),  # Muon
    "DeltaMomentum": Costs(4, 8, 8),
    "DMGD": Costs(4, 8, 8),
    "InputDeltaMomentum": Costs(4, 8, 8),
    "DGD": Costs(4, 12, 8),
    "M3": Costs(12, 12, 8),  # and 8 more in one step out of a hundred
}
EVERYWHERE = "Muon on every rank"  # gathers the gradient and the momentum, and computes all of it


@functools.cache
def flops(name: str, m: int, n: int) -> int:
    """Return the FLOPs of a step of one matrix, counted on a small one of the same form."""
    scale = 1
    while m % (2 * scale) == 0 and n % (2 * scale) == 0 and min(m, n) // (2 * scale) >= 16:
        scale *= 2
    param = nn.Parameter(torch.zeros(m // scale, n // scale))
    options = {"missing": "gradient"} if name in ("DGD", "InputDeltaMomentum") else {}
    optimizer = getattr(deep_optim, name)([param], **options)
    for _ in range(2):  # in the first step M3 begins a chunk
        param.grad = torch.ones_like(param)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
    return counter.get_total_flops() * scale**3


def sent(name: str, entries: int, ranks: int) -> float:
    """Return the bytes that a rank sends in a step, on average."""
    return entries * (COSTS[name].gathered + COSTS[name].scattered) / ranks * (ranks - 1) / ranks


def spread(costs: list[tuple[float, float]], ranks: int) -> tuple[float, float]:
    """Return the sums of the rank with the most of the first, when the costliest comes first to who has least."""
    loads = [(0.0, 0.0, rank) for rank in range(ranks)]
    for first, second in sorted(costs, reverse=True):
        load = heapq.heappop(loads)
        heapq.heappush(loads, (load[0] + first, load[1] + second, load[2]))
    return max(loads)[:2]


def predict(name: str, model: Model, ranks: int) -> dict[str, float]:
    """Return what one step costs on each rank; times in seconds."""
    everywhere = name == EVERYWHERE
    cls = "Momentum" if everywhere else name
    cost, entries = COSTS[cls], model.entries()
    bandwidth = NVLINK if ranks <= 8 else NETWORK
    rest = model.parameters() - entries  # AdamW's
    # weights, gradient and state, read and written
    passes = (entries * (12 + 2 * cost.state) + rest * 28) / ranks / HBM
    result = {"state_bytes": (entries * cost.state + rest * 8) / ranks, "sent_bytes": sent(cls, entries, ranks)}
    if cls == "AdamW":
        seconds = {"compute": 0.0, "network": 0.0}
    elif everywhere:
        work = sum(flops(cls, m, n) for m, n in model.matrices())
        result["sent_bytes"] = entries * 8 / ranks * (ranks - 1)  # shards of gradient and momentum, to every rank
        seconds = {"compute": work / RATE, "network": result["sent_bytes"] / bandwidth}
    else:
        # the owner of a matrix receives it and sends the results: one direction at a time is the busier
        moved = max(cost.gathered, cost.scattered)
        busiest = spread([(flops(cls, m, n), m * n * moved * (ranks - 1) / ranks) for m, n in model.matrices()], ranks)
        seconds = {"compute": busiest[0] / RATE, "network": busiest[1] / bandwidth}
    optimizer = passes + max(seconds.values())
    training = 6 * model.parameters() * TOKENS / ranks / TRAINING
    return {**result, **seconds, "memory_passes": passes, "step": optimizer, "share": optimizer / training}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file; the plot lies beside it")
    parser.add_argument("--plot-only", type=Path, metavar="FILE", help="only draw the plot of a JSON file")
    args = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 110)
    if args.plot_only:
        document = json.loads(args.plot_only.read_text())
        console.print(f"plot: {draw_scaling(document, args.plot_only.with_suffix('.png'))}")
        return 0
    names = [*COSTS, EVERYWHERE]
    predictions: dict[str, Any] = {
        size: {name: {str(ranks): predict(name, model, ranks) for ranks in RANKS} for name in names}
        for size, model in MODELS.items()
    }
    assumed = {"rate": RATE, "hbm": HBM, "nvlink": NVLINK, "network": NETWORK, "training": TRAINING, "tokens": TOKENS}
    document = {
        "benchmark": "scaling", "kind": "prediction", "command": command("scaling", arguments), "versions": versions(),
        "assumed": assumed, "models": {size: model._asdict() for size, model in MODELS.items()},
        "predictions": predictions,
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    for size, rows in predictions.items():
        table = Table(title=f"{size}, predicted: milliseconds of the optimizer, and its share of the training step")
        for column in ("optimizer", "state", *(f"{ranks} GPUs" for ranks in SHOWN)):
            table.add_column(column, justify="left" if column == "optimizer" else "right")
        for name, row in rows.items():
            shown = [row[str(ranks)] for ranks in SHOWN]
            cells = [f"{each['step'] * 1e3:,.1f} ({each['share']:.1%})" for each in shown]
            table.add_row(name, f"{row['8']['state_bytes'] * 8 / 2**30:,.0f} GiB", *cells)
        console.print(table)
    console.print(f"plot: {draw_scaling(document, args.output.with_suffix('.png'))}")
    return 0
