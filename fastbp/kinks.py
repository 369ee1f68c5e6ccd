"""Gradients beside a kink: how far off they are of whoever adds up z in another order.

A z within a rounding of a kink of its activation (0 of ReLU, ±3 of Hardswish) may fall to either side of it, and its
slope then differs as a whole. Who computes it so is as right as PyTorch. What that makes of gradients is computed, not
guessed: once more in float64, with the slope of the other side at every such z, of which there are none or few.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastbp.activations import wide

Activate = Callable[[Tensor], Tensor]
JUMP = 2.0**-7  # of the slope, from which on it is a kink: what is less is no more than rounding


class Sides:
    """An activation in plain PyTorch, for one call in a dtype and for the same in float64.

    The call itself, in its dtype, takes ``noting``; then each composition in float64 may take an ``other``.
    """

    def __init__(self, activation: Activate, dtype: torch.dtype) -> None:
        self.activation, self.dtype = activation, dtype
        self.kinks = kinks(activation)
        self.turned = 0  # z, of all compositions
        self._noted: list[Tensor] = []

    def noting(self, activation: Activate) -> Activate:
        """The activation as the call takes it: each z that comes to it is kept."""

        def noted(z: Tensor) -> Tensor:
            self._noted.append(z.detach())
            return activation(z)

        return noted

    def other(self, rows: slice = slice(None)) -> Activate:
        """For one composition in float64, of these rows of the call: the activation's values, and its slopes but beside
        a kink, where they are the other side's.
        """
        noted = iter(self._noted)
        return lambda z: self._other(z, next(noted)[rows])

    def _other(self, z: Tensor, noted: Tensor) -> Tensor:
        exact, half = z.detach(), torch.finfo(self.dtype).eps / 2
        # How far off a z may be before it is rounded to the dtype: twice as far as PyTorch's, which may be lucky.
        off = ((noted.double() - exact).abs() - half * exact.abs()).nan_to_num(0.0, 0.0, 0.0)
        spare = torch.finfo(self.dtype).tiny * torch.finfo(self.dtype).eps
        if exact.numel():
            largest = exact.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
            spare += 2 * max(off.max().item(), 0.0) + 4 * torch.finfo(wide(self.dtype)).eps * largest
        at = exact
        for kink in self.kinks:
            width = spare + half * abs(kink)
            beside = (exact - kink).abs() <= width
            self.turned += int(beside.sum())
            below, above = exact.new_tensor([kink - width, kink + width])
            at = torch.where(beside, torch.where(exact > kink, below, above), at)
        slopes = self.activation(z + (at - exact))
        return self.activation(exact) + (slopes - slopes.detach())


def kinks(activation: Activate) -> list[float]:
    """Where the slope of an activation jumps, between −8 and 8."""

    def slope(z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return torch.autograd.grad(activation(z).sum(), z)[0]

    z = torch.arange(-8, 8, 2**-10, dtype=torch.float64)
    jumps = slope(z).diff().abs() > JUMP
    low, high = z[:-1][jumps], z[1:][jumps]
    for _ in range(60):  # a step of 2⁻¹⁰ down to neighbours in float64
        middle = (low + high) / 2
        below = (slope(middle) - slope(low)).abs() > (slope(high) - slope(middle)).abs()
        low, high = torch.where(below, low, middle), torch.where(below, middle, high)
    return sorted(set(high.tolist()))
