"""What a kernel must compute: the documented formulas in plain PyTorch in float64, and how far a result may be off."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import numpy as np
import torch
from support import OTHER_PARAMS
from torch import Tensor

from fastbp import compression, side_formulas
from fastbp.activations import Bound, bind

TORCH = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
# Numbers of csrc/cuda/elementwise.h, `Keeps`.
KEEPS = {"preact": 0, "output": 1, "output_bits": 2, "output_lsb": 3, "fp8": 4}
# What arithmetic may be off before a result is rounded, relative to it and to its terms (tests/test_cuda_math.py).
SIXTH = torch.tensor(1 / 6, dtype=torch.float32).item()
ARITHMETIC = {torch.float64: 2.0**-49, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-18, torch.float16: 2.0**-18}


def activation_of(name: str) -> Bound:
    """With other parameters than the defaults, where it has some: a kernel that ignores them is wrong."""
    return bind(name, OTHER_PARAMS[name][0]) if name in OTHER_PARAMS else bind(name)


def policies_of(activation: Bound, gated: bool = False) -> list[str]:
    """What may be kept for the chain rule of an activation; a gated layer's is of z or of its codes."""
    row = activation.row
    found = ["preact", "fp8"]
    if not gated:
        found += ["output"] * (row.grad_from_output is not None and row.grad_reads_output)
        found += ["output_bits", "output_lsb"] * (row.minimum_at is not None)
    return found


def generator_of(case: object) -> torch.Generator:
    """Every case has its own numbers, the same in every process."""
    return torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))


def to_numpy(t: Tensor) -> np.ndarray:
    t = t.detach().contiguous()
    return t.view(torch.int16).numpy().view(np.uint16) if t.dtype in (torch.bfloat16, torch.float16) else t.numpy()


def to_torch(a: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(a.view(np.int16) if a.dtype == np.uint16 else a).view(dtype)


def value_terms(z: Tensor) -> Tensor:
    """The size of the terms of f(z), which may cancel; beyond |z| = 20 nothing does."""
    return 1 + z.double().abs().clamp(max=20)


def rounding(wanted: Tensor, dtype: torch.dtype, units: float = 0.51) -> Tensor:
    """So many units of the last place."""
    info = torch.finfo(dtype)
    return units * info.eps * wanted.abs().clamp(min=info.tiny)


def error(found: Tensor, wanted: Tensor, terms: Tensor | float = 0.0, units: float = 0.51) -> float:
    """The largest error of results, in units of what is allowed. What is not finite must be wanted so."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    allowed = rounding(wanted, found.dtype, units) + ARITHMETIC[found.dtype] * (wanted.abs() + terms)
    return worst(found.double(), wanted, allowed)


def worst(found: Tensor, wanted: Tensor, allowed: Tensor) -> float:
    finite = wanted.isfinite()
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    off = torch.where(finite, (found - wanted).abs() / allowed, torch.where(same, 0.0, math.inf))
    return float(torch.where(off.isnan(), math.inf, off).max().detach()) if off.numel() else 0.0


def sums_error(found: Tensor, terms: Tensor, sizes: Tensor, rows: int) -> float:
    """Of the sums of ``rows`` rows each: the rounding of as many terms, and the terms' own error."""
    parts = [slice(i, i + rows) for i in range(0, max(len(terms), 1), rows)]
    wanted = torch.stack([terms[p].sum(0) for p in parts])
    size = torch.stack([(terms[p].abs() + sizes[p]).nan_to_num(posinf=0.0).sum(0) for p in parts])
    arithmetic = 2.0**-46 if found.dtype == torch.float64 else 2.0**-18
    return worst(found.double(), wanted, 2 * arithmetic * size + 1e-30)


def same_bytes(found: np.ndarray, wanted: Tensor) -> float:
    """0 where they are equal, else inf."""
    return 0.0 if np.array_equal(found, to_numpy(wanted).view(found.dtype)) else math.inf


def bits_error(found: np.ndarray, z: Tensor, wide: Tensor, y: Tensor, minimum_at: float) -> float:
    """The sides must be right. What comes next in y may be off by one and by as much as the arithmetic is."""
    wanted, mine = compression.encode_bits(z, wide.float(), y, minimum_at), torch.from_numpy(found)
    if ((wanted ^ mine) & 0x88).any() or (z.shape[-1] % 2 and (mine[..., -1] > 15).any()):
        return math.inf
    steps = torch.stack([(wanted >> s & 7).int() - (mine >> s & 7).int() for s in (0, 4)], -1).abs()
    if y.dtype == torch.float32:
        return math.inf if steps.any() else 0.0
    unit = torch.finfo(y.dtype).eps * y.double().abs().clamp(min=torch.finfo(y.dtype).tiny) / 2  # at least half of one
    allowed = 1 + 8 * ARITHMETIC[y.dtype] * (wide.abs() + value_terms(z)) / unit
    padded = torch.nn.functional.pad(allowed, (0, -allowed.shape[-1] % 2), value=8.0)
    return float((steps.flatten(-2) / padded.ceil()).max())


def marks_error(found: Tensor, z: Tensor, minimum_at: float) -> float:
    """Whether y tells the side, bit for bit; y itself is the caller's to look at."""
    side = compression.decode_lsb(found, -math.inf)[1]
    return 0.0 if torch.equal(side.bool(), z.float() >= minimum_at) else math.inf


def value(activation: Bound, z: Tensor, up: Tensor | None = None) -> Tensor:
    y = activation(z.double())
    return y if up is None else y * up.double()


def slope_product(activation: Bound, dy: Tensor, z: Tensor) -> Tensor:
    """dy · f'(z), of finite and other dy, by PyTorch's autograd."""
    z = z.double().requires_grad_()
    (dz,) = torch.autograd.grad(activation(z), z, dy.double())
    # In float64 too PyTorch multiplies hardsigmoid's by a sixth of float32.
    return dz * (1 / 6 / SIXTH) if activation.row.name == "hardsigmoid" else dz


class Kept:
    """What a policy keeps of z, and the chain rule from it."""

    def __init__(self, activation: Bound, policy: str, z: Tensor):
        self.activation, self.policy = activation, policy
        self.codes, self.beside = z, None
        row, dtype = activation.row, z.dtype
        if policy == "fp8":
            self.codes, self.beside = compression.encode_fp8(z)
            self.z = compression.decode_fp8(self.codes, self.beside, dtype)
        elif policy == "preact":
            self.z = z
        else:
            wide = value(activation, z).float()
            self.codes = wide.to(dtype)
            if policy != "output":
                least = compression.floor(row.lowest, dtype, policy)
            if policy == "output_bits":
                self.beside = compression.encode_bits(z, wide, self.codes, row.minimum_at)
                self.side = compression.decode_bits(self.codes, self.beside, least)
            elif policy == "output_lsb":
                self.codes = compression.encode_lsb(z, self.codes, row.minimum_at)
                self.side = compression.decode_lsb(self.codes, least)

    def chain_rule(self, dy: Tensor) -> tuple[Tensor, Tensor]:
        """dz, and the size of its terms."""
        row, dy = self.activation.row, dy.double()
        size = dy.abs().nan_to_num(posinf=0.0)
        if self.policy in ("preact", "fp8"):
            return slope_product(self.activation, dy, self.z), size * value_terms(self.z)
        if self.policy == "output":
            params = self.activation.params_for(self.codes.dtype)
            return row.grad_from_output(dy, self.codes.double(), *params), size * value_terms(self.codes)
        formula: Callable[..., Tensor] = getattr(
            side_formulas, f"{row.name}_grad_from_side" + ("_16" if self.codes.itemsize == 2 else "")
        )
        y, right = (t.double() for t in self.side)
        size = size * value_terms(y)
        if self.codes.dtype == torch.float32:
            # Next to the minimum it takes the root of what y is above it: float32's constants cancel, and what a
            # rounding of y changes is no longer small.
            low, high = (formula(dy, y * (1 + off), right) for off in (-(2.0**-22), 2.0**-22))
            size = 16 * size + (high - low).abs().nan_to_num(0.0) / ARITHMETIC[torch.float32]
        return formula(dy, y, right), size

    def params(self) -> tuple[float, float]:
        """As the kernel is given them."""
        params = self.activation.params_for(self.codes.dtype) if self.policy == "output" else self.activation.params
        return (*params, 0.0, 0.0)[:2]
