"""Random operands of a seed, and memory for results."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Drawn:
    """What every case of the Triton kernels draws from, in the dtype that it names."""

    def __init__(self, case: Any, seed: int):
        self.generator, self.case = torch.Generator().manual_seed(seed), case
        self.dtype: torch.dtype = getattr(torch, case.dtype)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return drawn.to(self.dtype)

    def space(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """For results: NaN, and as far off 16 bytes as the case says."""
        skew = getattr(self.case, "skew", 0)
        return torch.full((math.prod(shape) + skew,), math.nan, dtype=dtype or self.dtype)[skew:].view(shape)
