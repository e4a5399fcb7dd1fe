"""Timing that survives a noisy machine, and the description of that machine to print beside it."""

import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deep_optim.ops.newton_schulz import working_dtype


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
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
        summary[name] = {
            "ms": 1e3 * statistics.median(own),
            "min_ms": 1e3 * min(own),
            "ratio": middle,
            "ratio_q1": low,
            "ratio_q3": high,
        }
    return summary


class TransientMemory(TorchDispatchMode):
    """Within it, `peak` becomes the most bytes that tensors made meanwhile held at any time.

    It sees what operations return, not what they need inside themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._living: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in old:
                self._living.append((StorageWeakRef(storage), storage.nbytes()))
                old.add(storage._cdata)
        self._living = [(reference, size) for reference, size in self._living if not reference.expired()]
        self.peak = max(self.peak, sum(size for _, size in self._living))
        return out


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """The best rates of one large product and of one large copy, read and written bytes both counted."""
    side, entries = (768, 2**23) if device == "cpu" else (8192, 2**28)
    matrix = torch.randn(side, side, device=device).to(dtype)
    source, target = torch.randn(2, entries, device=device)
    arms = {"product": lambda: matrix @ matrix, "copy": lambda: target.copy_(source)}
    seconds = paired_rounds({name: waiting(arm, device) for name, arm in arms.items()}, rounds=20)
    return {
        "gflops": 2 * side**3 / min(seconds["product"]) / 1e9,
        "gbytes": 8 * entries / min(seconds["copy"]) / 1e9,
    }


def waiting(arm: Callable[[], object], device: str) -> Callable[[], None]:
    """The call and, on an accelerator, its end."""

    def call() -> None:
        arm()
        if device != "cpu":
            torch.cuda.synchronize()

    return call


def machine() -> dict[str, Any]:
    """The processors and their load; no name of the host."""
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    native = working_dtype(torch.empty(1)) == torch.bfloat16  # else the CPU's matrices are in float32
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return gpu | {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "multiplies_bfloat16": native,
        "cores": os.cpu_count(),
        "threads_per_process": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Python, the packages a result depends on, and the commit of this repository, with a + if files have changed."""
    found = {"python": platform.python_version()}
    if revision := _git("describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"):
        found["revision"] = revision
    for package in ("torch", "triton", "deep-optim", "numpy", "schedulefree", "pytorch-optimizer"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command(name: str, arguments: list[str]) -> str:
    """The command line that repeats this run."""
    return shlex.join(["python", "-m", "benchmarks", name, *arguments])


def _git(*arguments: str) -> str:
    """What git says of this repository; nothing where there is no git, or no repository."""
    run = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if sys.platform == "linux" else []
