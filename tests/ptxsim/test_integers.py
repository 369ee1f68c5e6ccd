"""Integer, bit, comparison and move instructions against Python's integers."""

import numpy as np
import pytest

from .small_kernels import random_words, run

M32, M64 = (1 << 32) - 1, (1 << 64) - 1


def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def prmt(a, b, c):
    data, out = (b << 32 | a).to_bytes(8, "little"), 0
    for i in range(4):
        n = c >> 4 * i & 15
        byte = data[n & 7]
        out |= ((255 if byte & 128 else 0) if n & 8 else byte) << 8 * i
    return out


def bfe_signed(a, b, c):
    pos, n = b & 255, c & 255
    if n == 0:
        return 0
    sign = a >> min(pos + n - 1, 31) & 1
    return sum(((a >> (pos + i) & 1) if i < n and pos + i < 32 else sign) << i for i in range(32))


def bfi(a, b, pos, n):
    mask = sum(1 << i for i in range(pos, min(pos + n, 32)))
    return b & ~mask | (a << pos) & mask


def divided(a, b):
    return -(-a // b) if (a < 0) != (b < 0) else a // b


def each_half(function, a, b, signs):
    halves = [[signed(x >> s & 0xFFFF, 16) if signs else x >> s & 0xFFFF for s in (0, 16)] for x in (a, b)]
    low, high = (function(pair) & 0xFFFF for pair in zip(*halves, strict=True))
    return high << 16 | low


def lop3(a, b, c, table):
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))


def wide(a, b):
    return b << 32 | a


CASES = {
    "add.s32 %r20, %r10, %r11;": lambda a, b, c: a + b,
    "sub.s32 %r20, %r10, %r11;": lambda a, b, c: a - b,
    "mul.lo.u32 %r20, %r10, %r11;": lambda a, b, c: a * b,
    "mul.hi.s32 %r20, %r10, %r11;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mul.hi.u32 %r20, %r10, %r11;": lambda a, b, c: a * b >> 32,
    "mul.wide.s32 %rd20, %r10, %r11; shr.u64 %rd21, %rd20, 30; cvt.u32.u64 %r20, %rd21;": lambda a, b, c: (
        (signed(a) * signed(b) & M64) >> 30
    ),
    "mad.lo.s32 %r20, %r10, %r11, %r12;": lambda a, b, c: a * b + c,
    "mad.hi.u32 %r20, %r10, %r11, %r12;": lambda a, b, c: (a * b >> 32) + c,
    "div.s32 %r20, %r10, 7;": lambda a, b, c: divided(signed(a), 7),
    "rem.s32 %r20, %r10, -7;": lambda a, b, c: signed(a) + 7 * divided(signed(a), -7),
    "or.b32 %r13, %r11, 1; div.u32 %r20, %r10, %r13;": lambda a, b, c: a // (b | 1),
    "and.b32 %r13, %r11, 63; shl.b32 %r20, %r10, %r13;": lambda a, b, c: a << (b & 63),
    "and.b32 %r13, %r11, 63; shr.s32 %r20, %r10, %r13;": lambda a, b, c: signed(a) >> (b & 63),
    "and.b32 %r13, %r11, 63; shr.u32 %r20, %r10, %r13;": lambda a, b, c: a >> (b & 63),
    "mov.b64 %rd20, {%r10, %r11}; shr.s64 %rd21, %rd20, 9; cvt.u32.u64 %r20, %rd21;": lambda a, b, c: wide(a, b) >> 9,
    "min.s16x2 %r20, %r10, %r11;": lambda a, b, c: each_half(min, a, b, True),
    "max.u16x2 %r20, %r10, %r11;": lambda a, b, c: each_half(max, a, b, False),
    "prmt.b32 %r20, %r10, %r11, %r12;": prmt,
    "bfe.s32 %r20, %r10, %r11, %r12;": bfe_signed,
    "bfe.u32 %r20, %r10, 5, 9;": lambda a, b, c: a >> 5 & 511,
    "bfi.b32 %r20, %r10, %r11, 7, 12;": lambda a, b, c: bfi(a, b, 7, 12),
    "bfi.b32 %r20, %r10, %r11, %r12, 5;": lambda a, b, c: bfi(a, b, c & 255, 5),
    "shf.l.wrap.b32 %r20, %r10, %r11, %r12;": lambda a, b, c: (wide(a, b) << (c & 31)) >> 32,
    "shf.r.wrap.b32 %r20, %r10, %r11, %r12;": lambda a, b, c: wide(a, b) >> (c & 31),
    "shf.l.clamp.b32 %r20, %r10, %r11, %r12;": lambda a, b, c: (wide(a, b) << min(c, 32)) >> 32,
    "shf.r.clamp.b32 %r20, %r10, %r11, %r12;": lambda a, b, c: wide(a, b) >> min(c, 32),
    "lop3.b32 %r20, %r10, %r11, %r12, 0x96;": lambda a, b, c: lop3(a, b, c, 0x96),
    "lop3.b32 %r20, %r10, %r11, %r12, 0xD2;": lambda a, b, c: lop3(a, b, c, 0xD2),
    "not.b32 %r13, %r10; xor.b32 %r20, %r13, %r11;": lambda a, b, c: ~a ^ b,
    "popc.b32 %r20, %r10;": lambda a, b, c: a.bit_count(),
    "clz.b32 %r20, %r10;": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 %r20, %r10;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "bfind.u32 %r20, %r10;": lambda a, b, c: a.bit_length() - 1,
    "abs.s32 %r20, %r10;": lambda a, b, c: abs(signed(a)),
    "neg.s32 %r20, %r10;": lambda a, b, c: -a,
    "max.s32 %r20, %r10, %r11;": lambda a, b, c: max(signed(a), signed(b)),
    "min.u32 %r20, %r10, %r11;": lambda a, b, c: min(a, b),
    "setp.lt.s32 %p1, %r10, %r11; selp.b32 %r20, %r12, 5, %p1;": lambda a, b, c: c if signed(a) < signed(b) else 5,
    "setp.lo.u32 %p1|%p2, %r10, %r11; selp.b32 %r20, 1, 2, %p2;": lambda a, b, c: 2 if a < b else 1,
    "setp.ge.s32 %p1, %r10, 0; setp.gt.and.u32 %p2, %r11, %r12, %p1; selp.b32 %r20, 1, 0, %p2;": lambda a, b, c: int(
        b > c and not a >> 31
    ),
    "set.eq.u32.s32 %r20, %r10, %r11;": lambda a, b, c: M32 if a == b else 0,
    "slct.s32.s32 %r20, %r10, %r11, %r12;": lambda a, b, c: b if c >> 31 else a,
    "mov.b32 {%h1, %h2}, %r10; mov.b32 %r20, {%h2, %h1};": lambda a, b, c: a >> 16 | (a & 0xFFFF) << 16,
    "cvt.s64.s32 %rd20, %r10; shr.u64 %rd20, %rd20, 32; cvt.u32.u64 %r20, %rd20;": lambda a, b, c: M32 * (a >> 31),
    "cvt.u16.u32 %h1, %r10; cvt.s32.s16 %r20, %h1;": lambda a, b, c: signed(a & 0xFFFF, 16),
    "cvt.sat.s8.s32 %r20, %r10;": lambda a, b, c: max(-128, min(127, signed(a))),
    "@%p9 mov.u32 %r20, 1; mov.u32 %r20, %r12; setp.ge.u32 %p3, %r1, 9; @%p3 mov.u32 %r20, %r10;": None,
}


@pytest.mark.parametrize("operations", CASES)
def test_words(operations):
    words = random_words(len(operations))
    found = run(operations, words)
    for lane, (a, b, c) in enumerate(words.tolist()):
        wanted = CASES[operations](a, b, c) if CASES[operations] else (a if lane >= 9 else c)
        assert int(found[lane]) == wanted & M32, (lane, a, b, c)


def test_lanes_that_part_and_meet():
    loop = """mov.u32 %r20, 0; and.b32 %r13, %r10, 15;
    L1: setp.eq.u32 %p1, %r13, 0; @%p1 bra L2; add.u32 %r20, %r20, %r13; sub.u32 %r13, %r13, 1; bra L1;
    L2: shl.b32 %r20, %r20, 1;"""
    words = np.arange(96).reshape(32, 3)
    for seed in range(6):
        found = run(loop, words, seed=seed)
        assert [int(x) for x in found] == [2 * sum(range((int(a) & 15) + 1)) for a in words[:, 0]]


def test_a_jump_through_a_table():
    body = """and.b32 %r13, %r10, 0; ts: .branchtargets L0, L1; add.u32 %r13, %r13, 1; brx.idx %r13, ts;
    L0: mov.u32 %r20, 7; bra L2; L1: mov.u32 %r20, 8; L2: add.u32 %r20, %r20, %r11;"""
    words = random_words(3)
    assert (run(body, words) == words[:, 1] + np.uint32(8)).all()
