"""What a step costs a GPU and what it costs the host, which wall time alone does not tell apart."""

import statistics
import time
from collections.abc import Callable

import torch
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

STEPS = 5
CALLS = 15


def device_time(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds that the GPU is busy, launches, and milliseconds until the host is free again."""
    hosts = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        hosts.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    # Beside the kernels the profiler lists the step itself, with all their time once more.
    events = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in events if not event.key.startswith("Optimizer.")]
    return {
        "device_ms": sum(event.self_device_time_total for event in kernels) / STEPS / 1e3,
        "launches": sum(event.count for event in kernels) / STEPS,
        "host_ms": 1e3 * statistics.median(hosts),
    }


def replay_time(optimizers: list[Optimizer], replays: int = 20) -> float | None:
    """Milliseconds of a step replayed from a CUDA graph, or None if the optimizers have no `capturable`.

    Leaves them without state, since what a graph wants of it is not what is timed without one.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if not all("capturable" in group for group in groups):
        return None
    _begin_anew(optimizers, capturable=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for optimizer in optimizers:
            optimizer.step()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    del graph
    _begin_anew(optimizers, capturable=False)
    return statistics.median(times)


def _begin_anew(optimizers: list[Optimizer], *, capturable: bool) -> None:
    """Without state: counters are where `capturable` wants them from the state's making on."""
    for optimizer in optimizers:
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["capturable"] = capturable
