"""Integer and bit-field instructions as functions over the 32 lanes (ISA, "Integer Arithmetic", "Logic and Shift")."""

from __future__ import annotations

import numpy as np

from .dtypes import LANES, i4, i8, u1, u2, u4, u8


def shl(a, s):
    bits = a.itemsize * 8
    return np.where(s >= bits, a.dtype.type(0), a << (s & np.uint32(bits - 1)).astype(a.dtype))


def shr(a, s):
    bits = a.itemsize * 8
    return (
        a >> np.minimum(s, bits - 1).astype(a.dtype)
        if a.dtype.kind == "i"
        else np.where(s >= bits, a.dtype.type(0), a >> (s & np.uint32(bits - 1)).astype(a.dtype))
    )


def div_int(a, b):
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(b == 0, a.dtype.type(np.iinfo(a.dtype).max), a // safe)
    q = (
        np.abs(a.astype(object)) // np.abs(safe.astype(object))
        if a.dtype == i8
        else np.abs(a.astype(i8)) // np.abs(safe.astype(i8))
    )
    return np.where((a < 0) != (safe < 0), -q, q).astype(a.dtype)


def rem_int(a, b):
    safe = np.where(b == 0, b.dtype.type(1), b)
    return a - div_int(a, safe) * safe


def mul_hi(a, b):
    if a.itemsize == 4:
        wide = i8 if a.dtype.kind == "i" else u8
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(32)).astype(a.dtype)
    if a.itemsize == 2:
        return ((a.astype(i4) * b.astype(i4)) >> np.int32(16)).astype(a.dtype)
    return np.array([(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=True)], dtype=a.dtype)


def bfi(a, b, pos, length):
    t = b.dtype.type
    bits = b.itemsize * 8
    pos, length = pos & np.uint32(255), length & np.uint32(255)
    length = np.minimum(length, np.maximum(bits - pos.astype(i4), 0)).astype(u4)
    ones = np.where(
        length >= bits, t(np.iinfo(b.dtype).max), (t(1) << np.minimum(length, bits - 1).astype(b.dtype)) - t(1)
    )
    ones = np.where(length == 0, t(0), ones)
    mask = shl(ones, pos)
    return (b & ~mask) | (shl(a, pos) & mask)


def bfe(a, pos, length):
    bits = a.itemsize * 8
    out = []
    for x, p, n in zip(a.tolist(), (pos & np.uint32(255)).tolist(), (length & np.uint32(255)).tolist(), strict=True):
        x &= (1 << bits) - 1
        if n == 0:
            out.append(0)
            continue
        field = (x >> p) & ((1 << min(n, bits)) - 1)
        if a.dtype.kind == "i":
            top = min(p + n - 1, bits - 1)
            sign = (x >> top) & 1
            have = max(0, min(n, bits - p))
            if sign:
                field |= ((1 << bits) - 1) & ~((1 << have) - 1)
                field -= 1 << bits
        out.append(field)
    return np.array(out, dtype=a.dtype)


def prmt(a, b, selector):
    """Bytes of {b, a} by nibbles of the selector; the high bit of a nibble repeats the sign."""
    bytes_ = np.stack([a, b]).T.copy().view(u1).reshape(LANES, 8)
    out = np.zeros((LANES, 4), u1)
    rows = np.arange(LANES)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        value = bytes_[rows, nibble & np.uint32(7)]
        out[:, i] = np.where(nibble & np.uint32(8), np.where(value & 128, 255, 0), value)
    return out.view(u4).reshape(LANES)


def lop3(a, b, c, table):
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def shf(a, b, c, left, wrap):
    n = (c & np.uint32(31)) if wrap else np.minimum(c, 32)
    both = (b.astype(u8) << np.uint64(32)) | a.astype(u8)
    n = n.astype(u8)
    return ((both << n) >> np.uint64(32)).astype(u4) if left else (both >> n).astype(u4)


def popc(a):
    return np.bitwise_count(a).astype(u4)


def clz(a):
    bits = a.itemsize * 8
    return np.array([bits - int(x).bit_length() for x in a], u4)


def brev(a):
    bits = a.itemsize * 8
    return np.array([int(f"{int(x):0{bits}b}"[::-1], 2) for x in a], a.dtype)


def bfind(a):
    return np.array(
        [(int(x) & ((1 << 64) - 1)).bit_length() - 1 if x >= 0 else (~int(x)).bit_length() - 1 for x in a], i4
    ).view(u4)


def pack2(low, high):
    return low.astype(u4) | (high.astype(u4) << np.uint32(16))


def low4(x):
    return x.view(u4)[0::2].copy()


def high4(x):
    return x.view(u4)[1::2].copy()


def join8(low, high):
    return low.astype(u8) | (high.astype(u8) << np.uint64(32))


def low2(x):
    return x.view(u2)[0::2].copy()


def high2(x):
    return x.view(u2)[1::2].copy()
