"""What each operation costs beside the plain way to write it, and how near it comes to what the machine can do.

Both are called in turn, in shuffled rounds; the ratio is per round. The plain way is the equation as a reader of the
paper would type it, one matrix at a time. No ratio is printed for an operation whose result is further from float64
than the plain one's, or than one rounding in the precision that the operation works in, by more than a factor 3.
Ceilings are measured in the same run: a large product in the working precision, and a large copy.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deep_optim.ops.deep_momentum import deep_momentum
from deep_optim.ops.feature_map import feature_map
from deep_optim.ops.frobenius import frobenius_norm
from deep_optim.ops.mlp_memory import MLPMemory
from deep_optim.ops.newton_schulz import newton_schulz, working_dtype
from deep_optim.ops.symmetric_product import symmetric_product
from deep_optim.ops.two_sided_delta import two_sided_delta

from .measure import ceilings, command, machine, paired_rounds, summarize, versions, waiting
from .timing_plots import draw_kernels

SHAPES: dict[str, tuple[int, int, int]] = {  # stack, rows, columns
    "48 x 64 x 64": (48, 64, 64),
    "12 x 128 x 128": (12, 128, 128),
    "4 x 128 x 512": (4, 128, 512),
    "4 x 512 x 128": (4, 512, 128),
    "1 x 768 x 768": (1, 768, 768),
    "1 x 768 x 3072": (1, 768, 3072),
}
GPU_SHAPES: dict[str, tuple[int, int, int]] = {
    "12 x 768 x 768": (12, 768, 768),  # those of GPT-2 124M
    "12 x 2304 x 768": (12, 2304, 768),
    "12 x 768 x 3072": (12, 768, 3072),
    "1 x 2048 x 2048": (1, 2048, 2048),
    "8 x 2048 x 2048": (8, 2048, 2048),  # of GPT-3 1.3B
    "8 x 2048 x 8192": (8, 2048, 8192),
    "4 x 4096 x 4096": (4, 4096, 4096),
}
LOSSES = 3.0  # times the plain way's error


@dataclass(frozen=True)
class Kernel:
    """An operation beside the plain way to write it.

    Args:
        ours: of the stacks of memories and of what is written.
        plain: likewise.
        bytes_per_entry: what it has to read and write for each entry of its matrix.
        precision: what it works in; None stands for what matrices are multiplied in on the device.
    """

    ours: Callable[[Tensor, Tensor], Tensor]
    plain: Callable[[Tensor, Tensor], Tensor]
    bytes_per_entry: int
    precision: torch.dtype | None


def plain_newton_schulz(memory: Tensor, written: Tensor) -> Tensor:
    """Muon's loop, as published: one matrix at a time, three products per iteration."""
    results = []
    for matrix in written:
        x = matrix.to(working_dtype(matrix))
        x = x.T if matrix.size(0) > matrix.size(1) else x
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        results.append((x.T if matrix.size(0) > matrix.size(1) else x).to(matrix.dtype))
    return torch.stack(results)


def plain_norm(memory: Tensor, written: Tensor) -> Tensor:
    """In float64, one matrix at a time."""
    return torch.stack([matrix.norm()[None, None] for matrix in written.double()]).to(written.dtype)


def plain_soft_rows(memory: Tensor, written: Tensor) -> Tensor:
    """Rows of nearly equal length; of columns, where those are more."""
    results = []
    for matrix in written:
        tokens = matrix if matrix.size(0) >= matrix.size(1) else matrix.T
        soft = tokens / (tokens.norm(dim=1, keepdim=True) + 0.3 * tokens.norm() / tokens.size(0) ** 0.5)
        soft = soft * (tokens.norm() / soft.norm())
        results.append(soft if tokens is matrix else soft.T)
    return torch.stack(results)


def plain_delta(memory: Tensor, written: Tensor) -> Tensor:
    """One inner step on each side, decay 0.95 and rate 0.5."""
    results = []
    for m, u in zip(memory, written, strict=True):
        key = u / u.norm()
        gram = key.T @ key if u.size(0) >= u.size(1) else key @ key.T
        key = key / (gram @ gram).norm() ** 0.25
        m = 0.95 * m - 0.5 * (m @ (key.T @ key) + key @ (key.T @ m)) + u
        results.append(u + 0.95 * m)
    return torch.stack(results)


def delta(memory: Tensor, written: Tensor) -> Tensor:
    """What `plain_delta` computes."""
    return two_sided_delta(memory, written, decay=0.95, short=0.5, long=0.5)[1]


def deep(memory: Tensor, written: Tensor) -> Tensor:
    """The memory of `DMGD(hidden_dim=16)`, three inner steps."""
    return deep_momentum(_with_hidden(memory), written, decay=0.95, inner_lr=0.5, inner_steps=3, lookahead=2.0)[1]


def plain_deep(memory: Tensor, written: Tensor) -> Tensor:
    """The same, matrix by matrix, from an inner loop instead of its closed form."""
    results = []
    for m, u in zip(memory, written, strict=True):
        tall = u.size(0) >= u.size(1)
        linear, w1, w2 = (weight[0] if tall else weight[0].T for weight in _with_hidden(m[None]))
        u_tall = u if tall else u.T
        r, p = u_tall.shape
        norm = u_tall.norm()
        z = (r * p) ** 0.5 * (u_tall / norm) @ w2.T
        hidden = z / (1 + z * z).sqrt() / (r * w2.size(0)) ** 0.5
        phi = torch.cat([u_tall / norm, hidden], 1)
        gram = phi.T @ phi
        key = phi / (gram @ gram).norm() ** 0.25
        both = torch.cat([linear, w1], 1)
        right, left = both, both
        for step in (2 / (1.2 + 0.8 * c) for c in (3**0.5 / 2, 0.0, -(3**0.5) / 2)):  # Chebyshev, on [0.2, 1]
            right = right - step * right @ (key.T @ key)
            left = left - step * key @ (key.T @ left)
        both = 0.95 * both - 0.5 * (both - right + both - left) + norm * phi
        read = 2.0 * u_tall + 0.95 * both[:, :p]
        results.append(read if tall else read.T)
    return torch.stack(results)


def gram(memory: Tensor, written: Tensor) -> Tensor:
    """U Uᵀ by the kernel."""
    return symmetric_product(_low(written), backend="triton")


def plain_gram(memory: Tensor, written: Tensor) -> Tensor:
    """By a general product, which computes every entry twice."""
    matrix = _low(written)
    return torch.bmm(matrix, matrix.mT)


def square(memory: Tensor, written: Tensor) -> Tensor:
    """2 A² − 4 A for a symmetric A, as in a step of Newton-Schulz, by the kernel."""
    matrix = _symmetric(memory)
    return symmetric_product(matrix, add=matrix, alpha=2.0, beta=-4.0, backend="triton")


def plain_square(memory: Tensor, written: Tensor) -> Tensor:
    """By a general product that adds."""
    matrix = _symmetric(memory)
    return torch.baddbmm(matrix, matrix, matrix, beta=-4.0, alpha=2.0)


def _symmetric(memory: Tensor) -> Tensor:
    """A matrix of the memory's shorter side, of norm about 1."""
    side = min(memory.shape[-2:])
    block = memory[..., :side, :side]
    return _low((block + block.mT) / (8 * side) ** 0.5)


def _low(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype == torch.float64 else matrix.half()


def _with_hidden(memory: Tensor) -> MLPMemory:
    """A memory with 16 hidden features, made of pieces of the linear one."""
    tall = memory.mT if memory.shape[-2] < memory.shape[-1] else memory
    w1, w2 = tall[..., :16] / 2, tall[..., :16, :]
    w2 = w2 / frobenius_norm(w2) * 4
    return MLPMemory(memory, w1, w2) if tall is memory else MLPMemory(memory, w1.mT, w2.mT)


KERNELS: dict[str, Kernel] = {
    "frobenius_norm": Kernel(lambda m, u: frobenius_norm(u), plain_norm, 4, torch.float32),
    "feature_map(soft_rows)": Kernel(lambda m, u: feature_map(u, "soft_rows"), plain_soft_rows, 8, torch.float32),
    "newton_schulz": Kernel(lambda m, u: newton_schulz(u), plain_newton_schulz, 8, None),
    "two_sided_delta": Kernel(delta, plain_delta, 16, None),
    "deep_momentum": Kernel(deep, plain_deep, 16, None),
}
GPU_KERNELS: dict[str, Kernel] = {  # of which a CPU has none
    "gram": Kernel(gram, plain_gram, 6, torch.float16),
    "square": Kernel(square, plain_square, 6, torch.float16),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks kernels", description=__doc__.splitlines()[0])
    kernels, shapes = KERNELS | GPU_KERNELS, SHAPES | GPU_SHAPES
    parser.add_argument("--kernels", help=f"of {', '.join(kernels)}; by default those that the device has")
    parser.add_argument("--shapes", help=f"of {', '.join(shapes)}; by default those of the device")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    parser.add_argument("--plot-only", type=Path, metavar="FILE", help="only draw the plot of a JSON file")
    args = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 130)
    if args.plot_only:
        document = json.loads(args.plot_only.read_text())
        console.print(f"plot: {draw_kernels(document, args.plot_only.with_suffix('.png'))}")
        return 0
    args.kernels = args.kernels or ",".join(KERNELS if args.device == "cpu" else kernels)
    args.shapes = args.shapes or ",".join(SHAPES if args.device == "cpu" else GPU_SHAPES)
    torch.set_num_threads(args.threads)
    dtype = working_dtype(torch.empty(1, device=args.device))
    document: dict[str, Any] = {
        "benchmark": "kernels", "command": command("kernels", arguments), "machine": machine(), "versions": versions(),
        "device": args.device, "rounds": args.rounds, "ceilings": ceilings(args.device, dtype), "kernels": {},
    }  # fmt: skip
    rates = document["ceilings"]
    console.print(f"ceilings: {rates['gflops']:.0f} GFLOP/s, {rates['gbytes']:.1f} GB/s", highlight=False)
    for name in args.kernels.split(","):
        results = {}
        for shape in args.shapes.split(","):
            console.print(f"timing {name} on {shape} ...", highlight=False)
            results[shape] = measure(kernels[name], shapes[shape], args)
        document["kernels"][name] = results
        console.print(_table(name, results))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(document, indent=1) + "\n")
    plot = draw_kernels(document, args.output.with_suffix(".png"))
    console.print(f"numbers: {args.output}\nplot:    {plot}")
    return 0 if all(r["correct"] for results in document["kernels"].values() for r in results.values()) else 1


def measure(kernel: Kernel, shape: tuple[int, int, int], args: argparse.Namespace) -> dict[str, Any]:
    """Errors against float64 first, then times; the times of a wrong result are not taken."""
    generator = torch.Generator().manual_seed(0)
    memory, written = torch.randn(2, *shape, generator=generator).to(args.device)
    exact = kernel.plain(memory.double(), written.double())
    errors = {
        name: ((way(memory, written).double() - exact).norm() / exact.norm()).item()
        for name, way in (("ours", kernel.ours), ("plain", kernel.plain))
    }
    precision = kernel.precision or working_dtype(written)
    correct = errors["ours"] <= LOSSES * max(errors["plain"], torch.finfo(precision).eps)
    result: dict[str, Any] = {
        "error": errors["ours"], "plain_error": errors["plain"], "precision": str(precision).removeprefix("torch."),
        "correct": correct,
    }  # fmt: skip
    if not correct:
        return result
    with FlopCounterMode(display=False) as counter:
        kernel.ours(memory, written)
    arms = {"ours": lambda: kernel.ours(memory, written), "plain": lambda: kernel.plain(memory, written)}
    seconds = paired_rounds(
        {name: waiting(arm, args.device) for name, arm in arms.items()}, rounds=args.rounds, warmup=3
    )
    times = summarize(seconds, reference="plain")
    best = min(seconds["ours"])
    rates = {
        "gflops": counter.get_total_flops() / best / 1e9,
        "gbytes": kernel.bytes_per_entry * written.numel() / best / 1e9,
    }
    return result | times["ours"] | {"plain_ms": times["plain"]["ms"]} | rates


def _table(name: str, results: dict[str, Any]) -> Table:
    table = Table(title=name, title_justify="left")
    for heading in ("stack", "ms", "to the plain way", "quartiles", "GFLOP/s", "GB/s", "error", "plain error"):
        table.add_column(heading, justify="left" if heading == "stack" else "right", no_wrap=True)
    for shape, r in results.items():
        errors = (f"{r['error']:.1e}", f"{r['plain_error']:.1e}")
        if not r["correct"]:
            table.add_row(shape, "[red]wrong[/red]", "", "", "", "", *errors)
            continue
        quartiles = f"[{r['ratio_q1']:.2f}, {r['ratio_q3']:.2f}]"
        rates = (f"{r['gflops']:.0f}", f"{r['gbytes']:.1f}")
        table.add_row(shape, f"{r['ms']:.3f}", f"{r['ratio']:.2f}", quartiles, *rates, *errors)
    return table
