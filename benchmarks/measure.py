"""Timing that survives a noisy machine, and the description of that machine to print beside it."""

import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def paired_rounds(
    arms: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 5, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of every call: one call of each arm per round, in an order shuffled each round."""
    for arm in arms.values():
        for _ in range(warmup):
            arm()
    order, rng = list(arms), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            start = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summarize(seconds: Mapping[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Per arm the median milliseconds, and the median and quartiles of its per-round ratio to `reference`."""
    summary = {}
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[reference], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        summary[name] = {
            "ms": 1e3 * statistics.median(own),
            "min_ms": 1e3 * min(own),
            "ratio": middle,
            "ratio_q1": low,
            "ratio_q3": high,
        }
    return summary


def machine() -> dict[str, Any]:
    """The processor and its load; no name of the host."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads_per_process": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Python and the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("torch", "deep-optim", "numpy", "schedulefree", "pytorch-optimizer"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command(name: str, arguments: list[str]) -> str:
    """The command line that repeats this run."""
    return " ".join(["python", "-m", "benchmarks", name, *arguments])


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if sys.platform == "linux" else []
