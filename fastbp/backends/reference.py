"""The reference as a backend: PyTorch's own operations, which serve every dtype and device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowADInplaceOrView

from fastbp import reference
from fastbp.problem import Config, Problem
from fastbp.version import __version__

ACCUMULATES = True
CHECKS_TENSORS = False  # PyTorch's operations broadcast and promote what a call must refuse


def supports(problem: Problem) -> str | None:
    """Why this backend cannot serve the problem, or None: it serves all."""
    return None


def identity(device: torch.device) -> str:
    """What a measurement of this backend depends on: its own sources; torch is named anyway."""
    return __version__


def routes(problem: Problem, rows: int | None) -> tuple[str, ...]:
    """The ways to compute that a call may ask for: there is one."""
    return ()


def forward(config: Config, x: Tensor, tensors: Sequence[Any]) -> list[Tensor]:
    """y and the residuals of the policy, none of them a view in the eyes of autograd.

    F.linear ends in a view of a 2-D product; from inside a Function such a y would forbid ``y += residual``.
    """
    with _AutoDispatchBelowADInplaceOrView():
        y, residuals = reference.forward(config, *config.form.split((x, *tensors)))
    return [y, *residuals]


def backward(
    config: Config,
    dy: Tensor,
    saved: Sequence[Tensor | None],
    needs: tuple[bool, ...],
    overwrite: bool = False,
    into: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """The gradients of the inputs, of every weight and of every bias; None where ``needs`` does not ask.

    ``overwrite`` allows what PyTorch's operations do not do: writing over the residuals. ``into`` as in
    ``reference.backward``.
    """
    # Nothing here is to be differentiated, and 15 operations without a stop at autograd's kernels count.
    with _AutoDispatchBelowADInplaceOrView():
        return reference.backward(config, dy, reference.unflatten(config.form, saved, len(needs)), needs, into=into)
