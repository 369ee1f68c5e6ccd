"""Time by the host's clock."""

from __future__ import annotations

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
