"""Time on a GPU: by events around a burst of calls, by replay of a CUDA graph, and what a call costs the host.

A burst is what a program sees: where the kernels are short it is the host that is timed. A replayed graph is the
kernels alone. Both are medians of turns, taken in turn by ``benchmarks.measure.bursts``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.clock import Staged

MOST_COPIES = 64  # inputs of a few bytes are in the cache of a real program too


def copies(bytes_each: int, device: torch.device) -> int:
    """How many copies of the inputs make sure that a step does not find its own in the L2 cache: twice its size."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MOST_COPIES, -(-2 * cache // max(bytes_each, 1))))


def burst(step: Callable[[], object], calls: int) -> float:
    """Seconds from the start of the first call's work to the end of the last one's; of a staged step the sum of those
    of its timed parts."""
    if isinstance(step, Staged):
        return _staged_burst(step, calls)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _staged_burst(step: Staged, calls: int) -> float:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        state = step.setup()
        start.record()
        step.timed(state)
        end.record()
        del state
    torch.cuda.synchronize()
    return float(sum(start.elapsed_time(end) for start, end in events)) / 1e3


@lru_cache(maxsize=1)
def _scratch(device: torch.device) -> Tensor:
    """Memory to be written, so that nothing else is left in the L2 cache, and so that the host gets ahead meanwhile."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(4 * cache, 1 << 28), dtype=torch.uint8, device=device)


def cold_burst(step: Callable[[], object], calls: int) -> float:
    """Seconds of so many calls, each after the L2 cache was overwritten, which is not counted.

    For a few kernels on tensors that cannot be rotated: the host has enqueued them while the cache is written.
    """
    scratch = _scratch(torch.device("cuda", torch.cuda.current_device()))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, end in events:
        scratch.zero_()
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return float(sum(start.elapsed_time(end) for start, end in events)) / 1e3


def capture(step: Callable[[], object], calls: int) -> Callable[[], None]:
    """A CUDA graph of so many calls, as a step. Whatever cannot be captured raises.

    The step has run before on the stream that captures, so that what is made once (workspaces, compiled kernels) is
    there. Its results are dropped, and the next call of the graph takes their memory, as outside of one.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(calls):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            step()
    return graph.replay


def host_milliseconds(step: Callable[[], object], turns: int = 20) -> float:
    """What a call costs the host: the median until it returns, with nothing left on the GPU to wait for."""
    times = []
    staged = step if isinstance(step, Staged) else Staged(lambda: None, lambda _: step())
    for _ in range(turns):
        state = staged.setup()
        torch.cuda.synchronize()
        start = time.perf_counter()
        staged.timed(state)
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e3
