"""What a machine can do at most, as PyTorch reaches it: of products in GFLOP/s by dtype, of a copy in GB/s."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import cuda_clock
from benchmarks.cases import name_of
from benchmarks.clock import burst

SIZES = {"cpu": (2048, 1 << 28), "cuda": (8192, 1 << 31)}  # of a square product, and bytes of a copy
TURNS = 5


def peaks(device: torch.device) -> dict[str, float]:
    """The best of a few turns each."""
    size, copied = SIZES[device.type]
    timed = cuda_clock.burst if device.type == "cuda" else burst

    def best(step: Callable[[], object]) -> float:
        return min(timed(step, 1) for _ in range(TURNS))

    found: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[name_of(dtype)] = round(2 * size**3 / best(lambda a=a, b=b: a @ b) / 1e9, 1)  # type: ignore[misc]
    source, target = (torch.empty(copied // 2, dtype=torch.uint8, device=device).fill_(1) for _ in range(2))
    found["copy"] = round(copied / best(lambda: target.copy_(source)) / 1e9, 1)
    return found
