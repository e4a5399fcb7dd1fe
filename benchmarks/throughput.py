"""Tokens per second in training, activations and state of the sequence models, and what the chunk form is worth.

1. Forward and backward passes of every model at one width, in paired shuffled rounds, at several lengths; the ratio is
   to the Transformer's time in the same round. It runs twice: how far the two come apart is how far to trust others.
2. Bytes that autograd keeps for the backward pass, and bytes of state after reading, per length.
3. The gated delta rule in chunks and as a loop over tokens, with gradients, on the same tensors.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from deep_optim.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_reference

from .measure import command, machine, paired_rounds, summarize, versions, waiting
from .sequence_models import MODELS
from .step_time import tensor_bytes

REFERENCE, AGAIN = "transformer", "transformer again"
VOCAB_SIZE = 256
LOOP_LENGTH = 2048


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks throughput", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="transformer,lstm,deltanet,titans,hope-attention,hope")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch: longer sequences come in smaller batches")
    parser.add_argument("--lengths", default="256,1024,2048")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "throughput.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 120)
    document: dict[str, Any] = {
        "benchmark": "throughput", "command": command("throughput", arguments), "machine": machine(),
        "versions": versions(), "device": args.device, "dim": args.dim, "layers": args.layers, "lengths": {},
    }  # fmt: skip
    for length in map(int, args.lengths.split(",")):
        console.print(f"training steps on {args.tokens // length} x {length} tokens ...", highlight=False)
        document["lengths"][str(length)] = measure(args.models.split(","), length, args)
        console.print(_table(length, document["lengths"][str(length)]))
    document["chunks"] = chunks_against_loop(args.device)
    chunks = document["chunks"]
    console.print(
        f"the gated delta rule with its gradients, {chunks['length']} tokens: {chunks['chunks_ms']:.0f} ms in chunks, "
        f"{chunks['loop_ms']:.0f} ms as a loop, {chunks['ratio']:.0f} times as long",
        highlight=False,
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"numbers: {args.output}")
    return 0


def measure(names: list[str], length: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Times, parameters and bytes of every model at one length."""
    batch = max(1, args.tokens // length)
    tokens = torch.randint(VOCAB_SIZE, (batch, length + 1), generator=torch.Generator().manual_seed(0)).to(args.device)
    models = {}
    for name in dict.fromkeys([REFERENCE, *names]):
        torch.manual_seed(0)
        models[name] = MODELS[name](VOCAB_SIZE, args.dim, args.layers).to(args.device)
    arms: dict[str, Callable[[], None]] = {name: _arm(model, tokens, args.device) for name, model in models.items()}
    arms[AGAIN] = _arm(models[REFERENCE], tokens, args.device)
    rows = summarize(paired_rounds(arms, rounds=args.rounds, warmup=1), reference=REFERENCE)
    for name, model in models.items():
        with torch.no_grad():
            _, state = model(tokens[:, :-1])
        rows[name] |= {
            "parameters": sum(param.numel() for param in model.parameters()),
            "tokens_per_second": 1e3 * batch * length / rows[name]["ms"],
            "saved_bytes_per_token": saved_bytes(model, tokens) / (batch * length),
            "state_bytes_per_sample": tensor_bytes(state) / batch,
        }
    return rows


def _arm(model: nn.Module, tokens: Tensor, device: str) -> Callable[[], None]:
    def call() -> None:
        model.zero_grad()
        loss(model, tokens).backward()

    return waiting(call, device)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    return F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())


def saved_bytes(model: nn.Module, tokens: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside the parameters."""
    return kept_bytes(model, lambda: loss(model, tokens))


def kept_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps of `forward`, beside the module's parameters; storages count once."""
    known = {StorageWeakRef(param.untyped_storage()) for param in module.parameters()}
    kept: dict[StorageWeakRef, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if (reference := StorageWeakRef(storage)) not in known:
            kept[reference] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = forward()  # alive, so that no storage is used twice
    del held
    return sum(kept.values())


def chunks_against_loop(device: str) -> dict[str, float]:
    """Seconds of one forward and backward pass each; the loop takes too long for more than a few."""
    rng = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, LOOP_LENGTH, 32, generator=rng).to(device) for _ in range(3))
    rate = torch.ones(1, 4, LOOP_LENGTH, device=device)
    decay = (0.99 * rate).log()
    inputs = [F.normalize(query, dim=-1), F.normalize(key, dim=-1), value]
    empty = torch.zeros(1, 4, 32, 32, device=device)

    def timed(rule: Callable[..., Any]) -> float:
        leaves = [each.clone().requires_grad_() for each in inputs]
        start = time.perf_counter()
        rule(*leaves, decay, rate, empty)[0].square().sum().backward()
        if device != "cpu":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    timed(gated_delta_rule)
    chunks = min(timed(gated_delta_rule) for _ in range(5))
    loop = min(timed(gated_delta_rule_reference) for _ in range(2))
    return {"length": LOOP_LENGTH, "chunks_ms": chunks, "loop_ms": loop, "ratio": loop / chunks}


def _table(length: int, rows: dict[str, dict[str, float]]) -> Table:
    table = Table(title=f"sequences of {length} tokens", title_justify="left")
    for heading in ("model", "parameters", "tokens/s", "time to Transformer", "quartiles", "kept B/token", "state B"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for name, row in rows.items():
        keys = ("parameters", "tokens_per_second", "saved_bytes_per_token", "state_bytes_per_sample")
        costs = [f"{row[key]:,.0f}" if key in row else "" for key in keys]
        quartiles = f"[{row['ratio_q1']:.2f}, {row['ratio_q3']:.2f}]"
        table.add_row(name, *costs[:2], f"{row['ratio']:.2f}", quartiles, *costs[2:])
    return table
