"""Time by the host's clock, and what would disturb it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Step = Callable[[], object]


@dataclass(frozen=True)
class Staged:
    """A step of which a first part is not timed."""

    setup: Callable[[], Any]
    timed: Callable[[Any], object]

    def __call__(self) -> object:
        return self.timed(self.setup())


def burst(step: Step, calls: int) -> float:
    """Seconds of so many calls; of a staged step those of its timed part."""
    if isinstance(step, Staged):
        return sum(_timed(step) for _ in range(calls))
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - start


def _timed(step: Staged) -> float:
    state = step.setup()
    start = time.perf_counter()
    step.timed(state)
    return time.perf_counter() - start


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what is freed, as it does anyway after a while.

    Whether it gives the top of the heap back to the kernel after a step, and so has every page faulted in again,
    depends on what else lies there: one rival's gradients on another's remains. It was up to half of a step's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        for setting in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(setting, 1 << 30)
