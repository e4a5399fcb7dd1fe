"""Several ranks of one gloo group, as processes: started once per test module, since each costs seconds."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

TIMEOUT = 180  # seconds until a rank that waits for another is given up


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function(*arguments)` returns on each rank of a group of processes; raise what one of them raised.

    Returned can be what `torch.load` takes with `weights_only`: numbers, strings, tensors, lists and dicts of them.
    """
    context = multiprocessing.get_context("forkserver")  # a clean process, whatever this one has started
    context.set_forkserver_preload(["torch.distributed.fsdp", "deep_optim"])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, folder, function, arguments), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(TIMEOUT)
        stuck = [process for process in ranks if process.is_alive()]
        for process in stuck:
            process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        if errors or stuck or any(process.exitcode for process in ranks):
            codes = [process.exitcode for process in ranks]
            raise RuntimeError("\n".join([f"exit codes {codes}, {len(stuck)} stuck", *errors]))
        return [torch.load(Path(folder, f"result-{rank}")) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder, "store")), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        torch.save(function(*arguments), Path(folder, f"result-{rank}"))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)
