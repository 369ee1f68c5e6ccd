"""Floating-point formats and roundings as functions over the 32 lanes (ISA, "Floating Point", "cvt")."""

from __future__ import annotations

import numpy as np

from .dtypes import LANES, f2, f4, f8, u2, u4
from .integers import pack2


def to_bf16(x):
    """float32 to bfloat16 as unsigned 16 bits: to the nearest, ties to even."""
    u = x.view(u4)
    out = ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(u2)
    if np.isnan(x).any():
        out = np.where(np.isnan(x), np.uint16(0x7FFF), out)
    return out


def from_bf16(x):
    return (x.astype(u4) << np.uint32(16)).view(f4)


def fma4(a, b, c):
    return (a.astype(f8) * b.astype(f8) + c.astype(f8)).astype(f4)


def fma8(a, b, c):
    """Exactly rounded but for what an unfused sum loses: products split into two doubles."""
    p = a * b
    split = 134217729.0
    ah = a * split
    ah = ah - (ah - a)
    bh = b * split
    bh = bh - (bh - b)
    al, bl = a - ah, b - bh
    e = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    s = p + c
    t = s - p
    r = (p - (s - t)) + (c - t)
    out = s + (e + r)
    return np.where(np.isfinite(out), out, p + c)


def ftz(x):
    return np.where(np.abs(x) < np.float32(1.1754943508222875e-38), np.copysign(np.float32(0), x), x)


def _e4m3_table():
    out = np.zeros(256, f4)
    for code in range(256):
        e, m = code >> 3 & 15, code & 7
        value = np.nan if e == 15 and m == 7 else m * 2.0**-9 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        out[code] = -value if code & 128 else value
    return out


E4M3 = _e4m3_table()
_POSITIVE = E4M3[:127].astype(f8)


def to_e4m3(x):
    """To the nearest, ties to even, what is too large to 448 (satfinite)."""
    size = np.abs(x).astype(f8)
    low = np.clip(np.searchsorted(_POSITIVE, size, side="right") - 1, 0, 126)
    high = np.minimum(low + 1, 126)
    below, above = size - _POSITIVE[low], _POSITIVE[high] - size
    code = np.where(below < above, low, np.where(below > above, high, np.where(low % 2 == 0, low, high)))
    code = np.where(size >= 448, 126, code)
    code = np.where(np.isnan(x), 127, code)
    return (code | np.where(np.signbit(x) & ~np.isnan(x), 128, 0)).astype(u2)


def float_to_int(x, dtype, how):
    x = x.astype(f8)
    x = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[how](x)
    info = np.iinfo(dtype)
    inside = np.where(np.isnan(x), 0.0, x)
    out = np.clip(
        inside, float(info.min), float(info.max) if dtype.itemsize < 8 else np.nextafter(float(info.max), 0)
    ).astype(dtype)
    return np.where(inside >= float(info.max), dtype.type(info.max), out)


def halves(x):
    """f16x2 as two float arrays, low and high."""
    both = x.view(u2).reshape(LANES, 2)
    return both[:, 0].copy().view(f2).astype(f4), both[:, 1].copy().view(f2).astype(f4)


def bhalves(x):
    return (x << np.uint32(16)).view(f4), (x & np.uint32(0xFFFF0000)).view(f4)


def pack_f16x2(low, high):
    return pack2(low.astype(f2).view(u2), high.astype(f2).view(u2))


def pack_bf16x2(low, high):
    return pack2(to_bf16(low), to_bf16(high))
