"""Bytes that a block of the paper's sizes keeps per token for the backward pass, counted on tensors without data.

Shapes decide what autograd keeps, so that nothing is computed and nothing allocated: a block of every preset reads one
sequence of at least two chunks of its slowest level.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deep_optim.models import Hope, LanguageModel, Transformer

from .measure import command, machine, versions
from .throughput import kept_bytes

OUTPUT = Path(__file__).parent / "results" / "activations.json"
SHORT, LONG = (64, 16), (2048, 512)  # the default, and the paper's
ARMS: dict[str, tuple[type[LanguageModel], dict[str, Any], int]] = {  # class, options, tokens
    "transformer": (Transformer, {}, 1024),
    "hope, chunks of 64 and 16": (Hope, {"chunk_sizes": SHORT}, 1024),
    "hope, chunks of 2048 and 512": (Hope, {"chunk_sizes": LONG}, 4096),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks activations", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="340m,760m,1.3b")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(arguments)
    document: dict[str, Any] = {
        "benchmark": "activations", "command": command("activations", arguments), "machine": machine(),
        "versions": versions(), "bytes_per_token": {},
    }  # fmt: skip
    console = Console()
    for size in args.sizes.split(","):
        row = {}
        for name, (model, options, tokens) in ARMS.items():
            with FakeTensorMode():
                whole = model.preset(size, vocab_size=1, **options)
                row[name] = len(whole.blocks) * block_bytes(whole.blocks[0], whole.embedding.embedding_dim, tokens)
        document["bytes_per_token"][size] = row
        counts = ", ".join(f"{count / 1e6:.1f} MB ({name})" for name, count in row.items())
        console.print(f"{size}: {counts}", highlight=False)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"numbers: {args.output}")
    return 0


def block_bytes(block: nn.Module, dim: int, tokens: int) -> float:
    """Bytes per token that a block keeps of one sequence, its input included."""
    x = torch.zeros(1, tokens, dim, requires_grad=True)
    return kept_bytes(block, lambda: block(x)[0]) / tokens
