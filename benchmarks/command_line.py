"""What the commands that run trials have in common: their last arguments, and the way from these to file and plot."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from .measure import command
from .trials import Results, Run, cores


def integers(text: str) -> list[int]:
    """The value of --seeds and the like: 1,2,3."""
    return [int(part) for part in text.split(",")]


def floats(text: str) -> list[float]:
    """The value of --lrs: 1e-3,2e-3."""
    return [float(part) for part in text.split(",")]


def add_arguments(
    parser: argparse.ArgumentParser, *, output: Path | None = None, seeds: Sequence[int] = (1, 2, 3)
) -> None:
    """Add what they all take; without `output`, parsing has to say where the file lies."""
    parser.add_argument("--seeds", type=integers, default=list(seeds), help="comma-separated")
    parser.add_argument("--workers", type=int, default=cores(), help="processes, one thread each")
    parser.add_argument("--output", type=Path, default=output, help="the JSON file; the plot lies beside it")
    parser.add_argument("--resume", action="store_true", help="keep the finished runs of the JSON file")
    parser.add_argument("--plot-only", type=Path, metavar="FILE", help="only report and draw a JSON file again")


def carry_out(
    name: str,
    arguments: list[str],
    args: argparse.Namespace,
    *,
    kind: type[Run],
    run: Callable[[argparse.Namespace, Results, Console], None],
    report: Callable[[Results, Path, Console], None],
    width: int = 150,
) -> int:
    """Carry a benchmark out and return the exit status.

    Args:
        name: of the command.
        arguments: its command line.
        args: the same, parsed: with `output`, `resume` and `plot_only`.
        kind: of its runs.
        run: fills the results.
        report: prints them, and draws them to the path.
        width: of the console, where it is no terminal.
    """
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else width)
    if args.plot_only and not args.plot_only.exists():
        sys.exit(f"no results in {args.plot_only}; run without --plot-only")
    results = Results(args.plot_only or args.output, resume=args.resume or args.plot_only is not None, kind=kind)
    if not args.plot_only:
        earlier = results.document.get("command", "").splitlines()  # of a file that is resumed
        results.document["command"] = "\n".join(dict.fromkeys([*earlier, command(name, arguments)]))
        try:
            run(args, results, console)
        except KeyboardInterrupt:
            done = len(results.trials)
            console.print(f"\ninterrupted: {done} finished runs are in {results.path}; --resume goes on from there")
            return 130
        results.save()
    plot = results.path.with_suffix(".png")
    report(results, plot, console)
    console.print(f"numbers: {results.path}\nplot:    {plot}")
    return 0
