"""Next-byte prediction on real text at equal parameters: Hope beside Transformer, LSTM, DeltaNet and others.

1. Every model at every learning rate on one seed; the best has the lowest loss on the held-out documents.
2. The same model at that rate, on other seeds.
3. The held-out bytes are read in windows as long as in training, and again in windows of four times that: the same
   bytes, with more in front of them.
"""

import argparse
import math
import statistics
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .command_line import add_arguments, carry_out, floats, integers
from .equal_size import SIZED, build
from .hope_variants import VARIANTS
from .lesson import train
from .measure import machine, versions
from .model_plots import draw_language
from .tasks.byte_corpus import ByteCorpus
from .trials import Meter, Result, Results, Run, run_trials

RESULTS = Path(__file__).parent / "results"
TUNING_SEED = 0
LONGER = 4  # windows of the second test, in those of the first
WINDOWS, TEST_BATCH = 32, 8  # long ones; held-out bytes are WINDOWS x LONGER x context
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": dict(dims=[64], layers=2, steps=600, batch=8, context=256, lrs=[1.5e-3, 3e-3, 6e-3], device="cpu"),
    "gpu": dict(dims=[256, 512], layers=6, steps=10_000, batch=32, context=1024, lrs=[5e-4, 1e-3, 2e-3], device="cuda"),
}


@dataclass(frozen=True)
class Reading(Run):
    """One model on one corpus, at one learning rate."""

    title = "{model} ({dim}),"

    corpus: str
    model: str
    dim: int
    num_layers: int
    lr: float
    seed: int
    steps: int
    batch: int
    context: int
    device: str = "cpu"

    def run(self) -> Result:
        """Train with AdamW, then test at both lengths."""
        corpus = cached_corpus(self.corpus)
        torch.manual_seed(self.seed)
        maker = VARIANTS.get(self.model)
        model = maker(256, self.dim, self.num_layers) if maker else build(self.model, 256, self.dim, self.num_layers)
        model = model.to(self.device)
        draw = partial(corpus.draw, torch.Generator().manual_seed(self.seed), self.batch, self.context)
        result = train(model, draw, self.lr, self.steps)
        if result["diverged"]:
            return result
        test = corpus.validation(WINDOWS, LONGER * self.context)
        loss, longer = (held_out_loss(model, *test, length) for length in (self.context, LONGER * self.context))
        return result | {"loss": loss, "longer": longer}


cached_corpus = cache(ByteCorpus.named)


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Tensor, targets: Tensor, length: int) -> float:
    """Nats per byte, each window read in pieces of a length that know nothing of each other."""
    device = next(model.parameters()).device
    model.eval()
    total = 0.0
    pieces = (each.unflatten(1, (-1, length)).flatten(0, 1).split(TEST_BATCH) for each in (tokens, targets))
    for piece, after in zip(*pieces, strict=True):
        logits = model(piece.to(device))[0].flatten(0, 1)
        total += F.cross_entropy(logits, after.flatten().to(device), reduction="sum").item()
    model.train()
    return total / targets.numel()


def main(arguments: list[str]) -> int:
    return carry_out("language", arguments, parse(arguments), kind=Reading, run=run, report=report)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line over preset."""
    parser = argparse.ArgumentParser("python -m benchmarks language", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="cpu: two hours on two cores")
    parser.add_argument("--corpus", default="stdlib", help="a name of corpus.py, or a file")
    parser.add_argument("--models", default=",".join(SIZED), help="comma-separated, or: ablation; default: all")
    parser.add_argument("--dims", type=integers, help="of the Transformer")
    for name in ("layers", "steps", "batch", "context"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--lrs", type=floats)
    parser.add_argument("--device", help="on cuda, --workers 1")
    add_arguments(parser, output=RESULTS / "language.json")
    parser.set_defaults(**PRESETS[parser.parse_known_args(arguments)[0].preset])
    args = parser.parse_args(arguments)
    args.models = [name for word in args.models.split(",") for name in (VARIANTS if word == "ablation" else (word,))]
    if unknown := [name for name in args.models if name not in {**SIZED, **VARIANTS}]:
        parser.error(f"no model named {unknown[0]!r}; there are: {', '.join([*SIZED, *VARIANTS])}")
    return args


def run(args: argparse.Namespace, results: Results, console: Console) -> None:
    """Fill `results`. Models run in the order given: the slowest first leave no worker idle at the end."""
    keys = ("preset", "corpus", "dims", "layers", "steps", "batch", "context", "lrs", "seeds", "device")
    results.document |= {
        "benchmark": "language", "machine": machine(), "versions": versions(),
        "config": {key: getattr(args, key) for key in keys}
        | cached_corpus(args.corpus).describe() | {"longer": LONGER * args.context},
    }  # fmt: skip
    console.print(f"{args.corpus}: {', '.join(args.models)}; {args.steps} steps, seeds {args.seeds}")

    def reading(model: str, dim: int, lr: float, seed: int) -> Reading:
        size = (args.steps, args.batch, args.context, args.device)
        return Reading(args.corpus, model, dim, args.layers, lr, seed, *size)

    pairs = [(model, dim) for model in args.models for dim in args.dims]
    searched = args.lrs if len(args.lrs) > 1 else []
    with Meter(len(pairs) * (len(searched) + len(args.seeds)) * args.steps) as meter:
        tuning = [reading(*pair, lr, TUNING_SEED) for pair in pairs for lr in searched]
        run_trials("tune", tuning, results, meter, args.workers)

        def loss(pair: tuple[str, int], lr: float) -> float:
            found = results.trials[reading(*pair, lr, TUNING_SEED)]["loss"] if searched else 0.0
            return math.inf if found is None else found

        best = {pair: min(args.lrs, key=lambda lr, pair=pair: loss(pair, lr)) for pair in pairs}  # type: ignore[misc]
        scoring = {pair: [reading(*pair, best[pair], seed) for seed in args.seeds] for pair in pairs}
        run_trials("score", [each for runs in scoring.values() for each in runs], results, meter, args.workers)
    rows: list[dict[str, Any]] = results.document.get("rows", [])
    fresh = [_summary(scoring[pair], results) for pair in pairs]
    known = {(row["model"], row["dim"]): row for row in [*rows, *fresh]}
    order = [*SIZED, *VARIANTS]
    results.document["rows"] = sorted(known.values(), key=lambda row: (row["dim"], order.index(row["model"])))


def _summary(runs: list[Reading], results: Results) -> dict[str, Any]:
    """Of all seeds the losses, None for a run that diverged; the curve is the mean of those that did not."""
    found = [results.trials[run] for run in runs]
    whole = [each for each in found if not each["diverged"]]
    curves = [each["curve"] for each in whole]
    return {
        "model": runs[0].model, "dim": runs[0].dim, "lr": runs[0].lr, "steps": runs[0].steps,
        "parameters": found[0]["parameters"],
        "loss": [each["loss"] for each in found], "longer": [each.get("longer") for each in found],
        "seconds": statistics.median([each["seconds"] for each in whole]) if whole else None,
        "curve": [(at[0][0], statistics.mean(point[1] for point in at)) for at in zip(*curves, strict=True)],
    }  # fmt: skip


def report(results: Results, plot: Path, console: Console) -> None:
    console.print(_table(results.document))
    draw_language(results.document, plot)


def _table(document: dict[str, Any]) -> Table:
    config = document["config"]
    table = Table(
        title=f"{config['corpus']}: nats per byte, mean of the seeds ± standard deviation", title_justify="left"
    )
    for heading in (
        "model", "parameters", f"windows of {config['context']}", f"of {config['longer']}", "lr", "s a run"
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for row in document["rows"]:
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        losses = (_pm(row[key]) for key in ("loss", "longer"))
        table.add_row(row["model"], f"{row['parameters']:,}", *losses, f"{row['lr']:g}", seconds)
    return table


def _pm(losses: list[float | None]) -> str:
    whole = [loss for loss in losses if loss is not None]
    if len(whole) < len(losses):
        return f"{len(losses) - len(whole)} diverged"
    return f"{statistics.mean(whole):.3f} ± {statistics.stdev(whole) if len(whole) > 1 else 0:.3f}"
