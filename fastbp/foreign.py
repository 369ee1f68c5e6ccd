"""Linears of other packages that stand where nn.Linear would: which these are, and what they compute.

Nothing is imported for their sake: a class is known where somebody has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbp.casts import cast_weight
from fastbp.stock import is_defined_in

Path = tuple[str, str]  # a module and a class of it


@dataclass(frozen=True)
class Foreign:
    """A linear of another package: y of h, weight and bias as it computes it, and its weight as (out, in)."""

    product: Callable[..., Tensor]
    weight: Callable[[Any], Tensor]
    autocasts: bool  # whether autocast has its arguments cast as those of F.linear


def _addmm(h: Tensor, weight: Tensor, bias: Any) -> Tensor:
    """y = x W + b with W (in, out); ``weight`` is its transposed."""
    y = torch.addmm(bias, h.view(-1, h.size(-1)), weight.mT)
    return y.view(*h.shape[:-1], y.size(-1))


def _matmul(h: Tensor, weight: Tensor, bias: Any) -> Tensor:
    y = h @ weight.T
    return y if bias is None else y + bias


CONV1D: Path = ("transformers.pytorch_utils", "Conv1D")
_FOREIGN: dict[Path, Foreign] = {
    # Of the cast, where autocast makes one: that of a view would be made in every call.
    CONV1D: Foreign(_addmm, lambda m: cast_weight(m.weight).mT, True),
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"): Foreign(_matmul, lambda m: m.weight, False),
}


def imported(path: Path) -> Any:
    """The class of this path, where somebody has imported it; else None."""
    return getattr(sys.modules.get(path[0]), path[1], None)


def foreign(kind: type[nn.Module]) -> Foreign | None:
    """What is known of a class of another package."""
    path = kind.__module__, kind.__name__
    return _FOREIGN.get(path) if imported(path) is kind else None


def has_own_forward(kind: Any) -> bool:
    """Whether the forward of such a class is the package's, and nobody's who put his in its place."""
    return is_defined_in(kind.forward, "forward", "transformers")
