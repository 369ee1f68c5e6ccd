"""What the compressed save policies keep, in plain torch: the yardstick of the kernels, which keep the same bits.

A row of N numbers has, next to one another,

    bits     ceil(N / 2) bytes: number 2 j in the low half of byte j, number 2 j + 1 in the high half
    fp8      N bytes of e4m3, and ceil(N / 32) scales: a power of two for each 32 numbers, as in the OCP's MX formats

The four bits of a number are 8 if z is not left of the activation's minimum, plus the next three mantissa bits of y: of
the float32 y that was rounded to 16 bits, floor(8 ((y32 - y) / ulp + 1/2)), counted in magnitude, by integers alone. A
float32 y has no next bits; they are 0 there.

A y read back is taken to be no lower than ``floor``: next to the minimum, where the slope goes like √(y - y*), all that
is rounded to one y with the minimum would else count as the minimum itself.

In the lowest-bit form a negative y carries the side in the lowest bit of its mantissa. A left y of either zero (f is
rounded to +0.0 by some) becomes -0.0, and a right one +0.0, so that the sign bit and the lowest bit together always
tell the side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 32  # numbers that share a scale
SPARE_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}  # mantissa bits of float32 that a dtype lacks
_ABOVE = {"output_bits": 1 / 80, "output_lsb": 1 / 5}
_INTEGERS = {2: torch.int16, 4: torch.int32}
_E4M3 = torch.float8_e4m3fn
_HALF = 0x600000  # of the mantissa: 448 = 1.75 · 2⁸ is the largest number of e4m3
# The largest number of e4m3 and a scale that each dtype has: beyond it a number would be read back as inf.
LARGEST = {torch.float32: 1.875 * 2.0**127, torch.bfloat16: 1.875 * 2.0**127, torch.float16: 1.875 * 2.0**15}
DTYPES = tuple(SPARE_BITS)


def _filled(t: Tensor, multiple: int) -> Tensor:
    """The last dimension filled up with zeros to a multiple."""
    return torch.nn.functional.pad(t, (0, -t.shape[-1] % multiple))


def encode_bits(z: Tensor, wide_y: Tensor, y: Tensor, minimum_at: float) -> Tensor:
    """The codes of y (..., N), which is ``wide_y`` rounded: (..., ceil(N / 2)) uint8."""
    right = (z.float() >= minimum_at).int()
    spare, code = SPARE_BITS[y.dtype], 8 * right
    if spare:
        beyond = wide_y.view(torch.int32) - y.float().view(torch.int32) + (1 << (spare - 1))
        code = code + (beyond >> (spare - 3)).clamp(0, 7)
    code = _filled(code, 2)
    return (code[..., 0::2] + 16 * code[..., 1::2]).to(torch.uint8)


def floor(lowest: float, dtype: torch.dtype, policy: str) -> float:
    """The least y that is read back, for an activation whose minimum is ``lowest``; of no effect in float32.

    A fraction of ulp(y*) above y*: a quarter of what the minimum's cell has, on average over the activations.
    """
    return lowest + _ABOVE[policy] * 2.0 ** (math.frexp(lowest)[1] - 24 + SPARE_BITS[dtype])


def decode_bits(y: Tensor, bits: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """y in float32 with its next bits, and 1.0 where z is not left of the minimum."""
    code = torch.stack([bits & 15, bits >> 4], -1).flatten(-2)[..., : y.shape[-1]].int()
    spare, wide_y = SPARE_BITS[y.dtype], y.float()
    if spare:
        middle = (1 << (spare - 4)) - (1 << (spare - 1))
        # inf becomes NaN on the way, which is what its gradient is to be
        wide_y = (wide_y.view(torch.int32) + ((code & 7) << (spare - 3)) + middle).view(torch.float32)
    return torch.where(wide_y < floor, floor, wide_y), (code >> 3).float()


def encode_lsb(z: Tensor, y: Tensor, minimum_at: float) -> Tensor:
    """y with the side in the lowest bit where it is negative, and else in the sign."""
    right = z.float() >= minimum_at
    whole = y.view(_INTEGERS[y.itemsize])
    marked = ((whole & ~1) | right).view(y.dtype)
    # -0.0 + 0.0 is +0.0. A y above 0 on the left is an error of f's, which this takes away: the slope there is about 0.
    return torch.where(y < 0, marked, torch.where(right, y + 0.0, torch.where(y >= 0, -0.0, y)))


def decode_lsb(y: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """y in float32, and 1.0 where z is not left of the minimum."""
    wide_y = y.float()
    right = ~y.signbit() | (y.view(_INTEGERS[y.itemsize]) & 1).bool()
    return torch.where(wide_y < floor, floor, wide_y), right.float()


def encode_fp8(z: Tensor) -> tuple[Tensor, Tensor]:
    """z (..., N) as e4m3 (..., N) and scales (..., ceil(N / 32)), both uint8; what is not finite becomes NaN.

    A scale s stands for 2^(s - 127), the least for which the largest number of the block is at most 448. What is beyond
    ``LARGEST`` counts as that.
    """
    blocks = _filled(z.float(), BLOCK).unflatten(-1, (-1, BLOCK))
    finite = blocks.isfinite()
    blocks = blocks.clamp(-LARGEST[z.dtype], LARGEST[z.dtype])
    largest = torch.where(finite, blocks.abs(), 0.0).amax(-1).view(torch.int32)
    scale = ((largest >> 23) - 8 + ((largest & 0x7FFFFF) > _HALF).int()).clamp(min=1)
    factor = ((254 - scale) << 23).view(torch.float32)
    scaled = torch.where(finite, blocks * factor[..., None], torch.nan)
    return scaled.to(_E4M3).view(torch.uint8).flatten(-2)[..., : z.shape[-1]].contiguous(), scale.to(torch.uint8)


def decode_fp8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """z again, in a dtype."""
    factor = (scales.int() << 23).view(torch.float32).repeat_interleave(BLOCK, -1)[..., : codes.shape[-1]]
    return (codes.view(_E4M3).float() * factor).to(dtype)
