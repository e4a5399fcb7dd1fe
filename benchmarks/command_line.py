"""What the commands that run trials have in common: run what the file lacks, keep it there, report and draw it."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from .measure import command
from .trials import Results, Run


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
    results = Results(args.output, resume=args.resume or args.plot_only, kind=kind)
    if not args.plot_only:
        try:
            run(args, results, console)
        except KeyboardInterrupt:
            done = len(results.trials)
            console.print(f"\ninterrupted: {done} finished runs are in {results.path}; --resume goes on from there")
            return 130
        results.document["command"] = command(name, arguments)
        results.save()
    plot = results.path.with_suffix(".png")
    report(results, plot, console)
    console.print(f"numbers: {results.path}\nplot:    {plot}")
    return 0
