"""What the Triton kernels must give, in plain PyTorch and float64, and by how much they may miss it.

Allowed is, for each element: half a unit in the last place of the result, as it is rounded once; what float32 loses in
the sums; and what the arithmetic of the dtype loses (``primitives_16.py`` and ``primitives.py`` of the Triton backend).
An error is given in units of what is allowed, so 1 is the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from support import stock
from torch import Tensor, nn

from emulated.reference import SIXTH
from fastbp.activations import Bound

# Of f and of the terms of its slope, relative: Φ of few instructions, float32 of a few units, float64.
ARITHMETIC = {torch.bfloat16: 4e-4, torch.float16: 4e-4, torch.float32: 2e-6, torch.float64: 1e-14}
# Below -5.5 the kernels' Φ is off by as much as 1 + erf is in float32, where eager computes it.
TAIL_OF_GELU = 1.5e-7

Function = Callable[[Tensor], Tensor]


def function(bound: Bound) -> Function:
    """PyTorch's own activation."""
    return stock(bound)


def slope(f: Function, z: Tensor, dy: Tensor) -> Tensor:
    """dz by autograd."""
    z = z.detach().double().requires_grad_()
    (found,) = torch.autograd.grad(f(z), z, dy.double())
    # In float64 too PyTorch multiplies by a sixth of float32.
    return found * (1 / 6 / SIXTH) if isinstance(f, nn.Hardsigmoid) else found


def half_unit(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of what is rounded to a dtype."""
    info = torch.finfo(dtype)
    size = t.abs().double().clamp(min=info.smallest_normal)
    return torch.exp2(torch.floor(torch.log2(size))) * (info.eps / 2)


def error(found: Tensor, wanted: Tensor, allowed: Tensor) -> float:
    """The largest error of any element in units of what is allowed there; inf where a number is missing."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    if found.numel() == 0:
        return 0.0
    missing = found.isnan() & ~wanted.isnan() | found.isinf() & ~wanted.isinf()
    if missing.any():
        return math.inf
    return float(((found.double() - wanted).abs() / allowed).max())


def rounded_once(found: Tensor, wanted: Tensor, spare: Tensor | float = 0.0) -> float:
    """``error`` of a result that was rounded to its dtype, with so much lost before."""
    dtype = found.dtype
    return error(found, wanted, 1.001 * half_unit(wanted.abs() + spare, dtype) + spare)


def lost(wanted: Tensor, z: Tensor, factor: Tensor | float, dtype: torch.dtype) -> Tensor:
    """What arithmetic may lose of f(z) · factor. Of 16 bits the tails keep their digits, but for that of GELU."""
    size = (torch.as_tensor(factor) * torch.ones_like(wanted)).abs()
    if dtype.itemsize == 2:
        return ARITHMETIC[dtype] * wanted.abs() + TAIL_OF_GELU * size * (z < -5.4)
    return ARITHMETIC[dtype] * (wanted.abs() + z.double().abs() * size)


def value(found: Tensor, f: Function, z: Tensor, factor: Tensor | float = 1.0) -> float:
    """The error of f(z) · factor, of a z that is known."""
    wanted = f(z.double()) * factor
    return rounded_once(found, wanted, lost(wanted, z, factor, found.dtype))


def value_of_unknown(found: Tensor, f: Function, z: Tensor, spare: Tensor) -> float:
    """The error of f(z) where z, off by ``spare``, was rounded to the dtype of y and not kept."""
    dtype = found.dtype
    low, high = f((z - spare).to(dtype).double()), f((z + spare).to(dtype).double())
    wanted = (low + high) / 2
    return rounded_once(found, wanted, lost(wanted, z, 1.0, dtype) + (high - low).abs() / 2)


def products(a: Tensor, b: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """a bᵀ + bias, and what float32 may lose in it."""
    a, b = a.double(), b.double()
    whole, size = a @ b.mT, a.abs() @ b.abs().mT
    if bias is not None:
        whole, size = whole + bias.double(), size + bias.double().abs()
    return whole, size * 2.0**-21 + 1e-30


def narrowed(dh: Tensor, dtype: torch.dtype) -> Tensor:
    """dh as an epilogue goes on with it: float16 overflows, so there it is rounded as eager rounds it."""
    return dh.to(dtype).double() if dtype == torch.float16 else dh


def column_sums(found: Tensor, each: Tensor, rows: int, spare: Tensor) -> float:
    """The error of sums, a row for every so many rows, of terms that may each be off by ``spare``."""
    parts = range(0, each.shape[0], rows)
    wanted = torch.stack([each[i : i + rows].sum(0) for i in parts])
    size = torch.stack([each[i : i + rows].abs().sum(0) for i in parts])
    off = torch.stack([spare[i : i + rows].sum(0) for i in parts])
    unit = 2.0**-49 if found.dtype == torch.float64 else 2.0**-20
    return error(found, wanted, unit * size + off + 1e-30)


def slope_spare(dh: Tensor, f: Function, z: Tensor, dtype: torch.dtype) -> Tensor:
    """What may be lost of dz: of the terms of the slope, whose sum may cancel, and so be much smaller than they."""
    size = slope(f, z, torch.ones_like(dh)).abs().clamp(min=0.2)
    if dtype.itemsize > 2:
        size = size * (1 + z.double().square())
    return ARITHMETIC[dtype] * dh.abs().double() * size
