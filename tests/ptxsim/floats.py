"""Floating-point formats and roundings as functions over the 32 lanes (ISA, "Floating Point", "cvt")."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from .dtypes import LANES, f2, f4, f8, u2, u4, u8
from .integers import pack2


def to_bf16(x):
    """float32 to bfloat16 as unsigned 16 bits: to the nearest, ties to even."""
    u = x.view(u4)
    out = ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(u2)
    nan = np.isnan(x)
    return np.where(nan, np.uint16(0x7FFF), out) if nan.any() else out


def from_bf16(x):
    return (x.astype(u4) << np.uint32(16)).view(f4)


def odd_sum(a, b):
    """a + b of doubles, rounded to odd: a second rounding, to fewer bits, is then as if it were the only one."""
    s = a + b
    t = s - a
    e = (a - (s - t)) + (b - t)
    fix = (e != 0) & np.isfinite(s) & (s.view(u8) & np.uint64(1) == 0)
    return np.where(fix, np.nextafter(s, np.copysign(np.inf, e)), s) if fix.any() else s


LOW_28, LOW_29 = np.full(LANES, 36, u8), np.full(LANES, 35, u8)  # shifted by so many, these bits of a double are left
HIGH_BIT, LEAST_NORMAL = np.uint64(1 << 63), 2.0**-126


def fma4(a, b, c):
    """Rounded once: products of floats are exact in double, and a sum is looked at anew where it might lie half way."""
    p, c = a.astype(f8) * b.astype(f8), c.astype(f8)
    s = p + c
    low = s.view(u8) << LOW_28
    if np.count_nonzero(low) != LANES:
        half = (s.view(u8) << LOW_29 == HIGH_BIT) | (np.abs(s) < LEAST_NORMAL) & (s != 0)
        if half.any():
            s = odd_sum(p, c)
    return s.astype(f4)


def fma_half(a, b, c):
    """Of halves held as floats: the odd rounding to 24 bits leaves the one to a half format exact."""
    s = odd_sum(a.astype(f8) * b.astype(f8), c.astype(f8))
    low = s.astype(f4)
    inexact = (low.astype(f8) != s) & np.isfinite(low)
    toward = np.where(np.abs(low) > np.abs(s), np.nextafter(low, f4.type(0)), low)  # truncated
    odd = (toward.view(u4) | np.uint32(1)).view(f4)
    return np.where(inexact, odd, low)


def directed4(x, mode: str):
    """Doubles to float: "rz", "rm" (down) or "rp" (up)."""
    near = x.astype(f4)
    if mode == "rz":
        beyond, to = np.abs(near) > np.abs(x), f4.type(0)
    elif mode == "rm":
        beyond, to = near > x, f4.type(-np.inf)
    else:
        beyond, to = near < x, f4.type(np.inf)
    return np.where(beyond, np.nextafter(near, to), near)


def add4(a, b, mode: str):
    return directed4(odd_sum(a.astype(f8), b.astype(f8)), mode)


def mul4(a, b, mode: str):
    return directed4(a.astype(f8) * b.astype(f8), mode)


def fma4_directed(a, b, c, mode: str):
    return directed4(odd_sum(a.astype(f8) * b.astype(f8), c.astype(f8)), mode)


def two_product(a, b):
    p, split = a * b, 134217729.0
    ah, bh = a * split, b * split
    ah, bh = ah - (ah - a), bh - (bh - b)
    al, bl = a - ah, b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def two_sum(a, b):
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def fma8(a, b, c):
    """Rounded once (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums"); by fractions at the edges."""
    uh, ul = two_product(a, b)
    th, tl = two_sum(c, ul)
    vh, vl = two_sum(uh, th)
    out = vh + odd_sum(tl, vl)
    edge = ~((np.abs(a) < 2.0**500) & (np.abs(b) < 2.0**500) & (np.abs(c) < 2.0**1000)) | (
        (np.abs(uh) < 2.0**-900) & (uh != 0)
    )
    if not edge.any():
        return np.where(uh == 0, a * b + c, out)
    return np.array([_fma8_exact(*x) if e else y for *x, e, y in zip(a, b, c, edge, out, strict=True)])


def _fma8_exact(a, b, c) -> float:
    naive = a * b + c
    if not (np.isfinite(a) and np.isfinite(b) and np.isfinite(c)) or a == 0 or b == 0:
        return naive
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return naive
    try:
        return float(exact)
    except OverflowError:
        return np.copysign(np.inf, float(exact > 0) - 0.5)


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


def float_to_int(x, dtype, how: str, of_nan: int):
    """Clamped to the range of the integer; a NaN becomes what the ISA says, which depends on the two types."""
    x = x.astype(f8)
    nan = np.isnan(x)
    x = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[how](np.where(nan, 0.0, x))
    info = np.iinfo(dtype)
    top = float(info.max) if dtype.itemsize < 8 else np.nextafter(float(info.max), 0)
    out = np.where(x >= float(info.max), dtype.type(info.max), np.clip(x, float(info.min), top).astype(dtype))
    return np.where(nan, np.array(of_nan, f"u{dtype.itemsize}").view(dtype), out) if nan.any() else out


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
