"""A block in a file of postponed annotations."""

from __future__ import annotations

import torch.nn.functional as F
from reading import Written
from torch import Tensor


class Block(Written):
    """Says what its tensors are."""

    def forward(self, x: Tensor) -> Tensor:
        """Words."""
        hidden: Tensor = F.silu(self.fc1(x))
        return self.fc2(hidden)
