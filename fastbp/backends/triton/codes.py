"""What the compressed save policies keep, written and read by the kernels: the bits of ``fastbp/compression.py``.

CODE says what a kernel keeps, or what it reads: ``""`` for numbers of the dtype (z, or the output), else ``bits``,
``lsb`` or ``fp8``. Codes lie row after row without gaps, and are reached by pointers: a row of codes need not begin at
16 bytes. All arithmetic on them is on integers of 32 bits, so no architecture needs instructions for e4m3.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl

from fastbp import compression
from fastbp.backends.triton.blocks import beside, load_tile, rounded, store_tile, tile_mask, tile_pointers

BLOCK = tl.constexpr(compression.BLOCK)  # numbers that share a scale
LARGEST, LARGEST_HALF = (
    tl.constexpr(struct.unpack("<i", struct.pack("<f", compression.LARGEST[dtype]))[0])
    for dtype in (torch.float32, torch.float16)
)
# A byte of two numbers whose y is 0: with dh = 0 beside it, as beyond the last row, dz is 0. Two zeros would be NaN.
BEYOND = tl.constexpr(0x44)


@triton.jit
def integer(x):
    """The bits of float32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def number(bits):
    """float32 of these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.constexpr_function
def spare_bits(dtype):
    """The mantissa bits of float32 that a dtype lacks."""
    return tl.float32.fp_mantissa_width - dtype.fp_mantissa_width


@triton.jit
def store_codes(
    target, pitch, codes, row, col, num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr
):
    """Bytes into a matrix. WIDTH as in ``load_codes``."""
    pointers = tile_pointers(target, pitch, 1, row, col, ROWS, COLS, WIDTH)
    tl.store(pointers, codes.to(tl.uint8), mask=tile_mask(row, col, num_rows, num_cols, ROWS, COLS))


@triton.jit
def load_codes(
    source, pitch, row, col, num_rows, num_cols, other: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Bytes of a matrix, WIDTH of them a thread's: as many as it takes of the numbers that they belong to.

    It could take more at once. But the compiler would then compute everything twice, once where the codes lie and once
    where the numbers do.
    """
    pointers = tile_pointers(source, pitch, 1, row, col, ROWS, COLS, WIDTH)
    return tl.load(pointers, mask=tile_mask(row, col, num_rows, num_cols, ROWS, COLS), other=other).to(tl.int32)


@triton.constexpr_function
def adjacent(dtype):
    """How many numbers of a dtype a thread reads at once: 16 bytes."""
    return 128 // dtype.primitive_bitwidth


@triton.jit
def mark_side(y, z, AT: tl.constexpr, DTYPE: tl.constexpr):
    """y with the side of the minimum in the lowest bit where it is negative, and else in the sign."""
    wide, right = y.to(tl.float32), z.to(tl.float32) >= AT
    whole = integer(y) if tl.float32 == DTYPE else y.to(tl.int16, bitcast=True)
    lowest: tl.constexpr = -(1 << (whole.dtype.primitive_bitwidth - 1))  # -0.0
    marked = (whole & ~1) | right.to(whole.dtype)
    signed = tl.where(right, tl.where(wide == 0.0, 0, whole), tl.where(wide >= 0.0, lowest, whole))
    return tl.where(wide < 0.0, marked, signed.to(whole.dtype)).to(y.dtype, bitcast=True)


@triton.jit
def store_bits(
    target,
    pitch,
    z,
    wide_y,
    y,
    m,
    n,
    M,
    N,
    AT: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The side of the minimum and the next three bits of y, two numbers a byte, into target (M, ceil(N / 2))."""
    spare: tl.constexpr = spare_bits(DTYPE)
    code = (z.to(tl.float32) >= AT).to(tl.int32) << 3
    if spare > 0:
        beyond = integer(wide_y) - integer(y.to(tl.float32)) + (1 << (spare - 1))
        code += tl.minimum(tl.maximum(beyond >> (spare - 3), 0), 7)
    code = tl.where((n + tl.arange(0, COLS) < N)[None, :], code, 0)
    low, high = tl.split(tl.reshape(beside(code, wide_y), (ROWS, COLS // 2, 2)))
    pair = low | (high << 4)
    store_codes(target, pitch, pair, m, n // 2, M, tl.cdiv(N, 2), ROWS, COLS // 2, adjacent(DTYPE) // 2)


@triton.jit
def load_bits(source, pitch, acc, m, n, M, N, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The codes of ``store_bits``, a number each."""
    half: tl.constexpr = COLS // 2
    pair = load_codes(source, pitch, m, n // 2, M, tl.cdiv(N, 2), BEYOND, ROWS, half, adjacent(DTYPE) // 2)
    if acc is not None:
        pair = beside(pair, tl.split(tl.reshape(acc, (ROWS, half, 2)))[0])
    return tl.reshape(tl.join(pair & 15, pair >> 4), (ROWS, COLS))


@triton.jit
def side_of(y, DTYPE: tl.constexpr):
    """1 where y, marked by ``mark_side``, is not left of the minimum."""
    whole = integer(y) if tl.float32 == DTYPE else y.to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(whole >= 0, 1, whole & 1)


@triton.constexpr_function
def largest_bits(dtype):
    """Of the largest number that e4m3 and a scale give back in a dtype, as float32."""
    return (LARGEST_HALF if dtype.is_fp16() else LARGEST).value


@triton.jit
def store_fp8(
    codes, scales, pitch, z, m, n, M, N, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """z as e4m3 into codes (M, N), and a power of two for each 32 numbers into scales (M, ceil(N / 32))."""
    blocks: tl.constexpr = COLS // BLOCK
    size = integer(z.to(tl.float32)) & 0x7FFFFFFF
    finite = size < 0x7F800000
    size = tl.where(finite, tl.minimum(size, largest_bits(DTYPE)), 0)
    largest = tl.max(tl.reshape(size, (ROWS, blocks, BLOCK)), 2)
    scale = tl.maximum((largest >> 23) - 8 + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32), 1)
    scales_pitch = tl.cdiv(N, BLOCK)
    store_tile(scales, scales_pitch, scale.to(tl.uint8), m, n // BLOCK, M, scales_pitch, ROWS, blocks, False)
    # |z| as it is in e4m3: rounded by adding 2¹⁴, whose unit is that of the smallest numbers, or half a unit.
    scaled = number(size) * per_element(number((254 - scale) << 23), ROWS, COLS)
    bits = integer(scaled)
    small = integer(scaled + 16384.0) - 0x46800000
    whole = (bits + 0x7FFFF + ((bits >> 20) & 1) - (120 << 23)) >> 20
    code = tl.where(bits < (121 << 23), small, whole) | ((integer(z.to(tl.float32)) >> 24) & 0x80)
    code = tl.where(finite, code, 0x7F)
    store_codes(codes, pitch, code, m, n, M, N, ROWS, COLS, adjacent(DTYPE))


@triton.jit
def load_fp8(
    codes, scales, pitch, scales_pitch, acc, m, n, M, N, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """z of ``store_fp8`` again, rounded to the dtype, in float32. A tile of fewer columns than a block lies in one."""
    blocks: tl.constexpr = (COLS + BLOCK - 1) // BLOCK
    code = load_codes(codes, pitch, m, n, M, N, 0, ROWS, COLS, adjacent(DTYPE))
    if acc is not None:
        code = beside(code, acc)
    edge = tl.cdiv(N, BLOCK)
    scale = load_tile(scales, scales_pitch, 1, m, n // BLOCK, M, edge, ROWS, blocks, False).to(tl.int32)
    # Seven bits as the end of an exponent and the beginning of a mantissa, which 2¹²⁰ puts where they belong.
    size = number((code & 0x7F) << 20) * 1.329227995784916e36 * per_element(number(scale << 23), ROWS, COLS)
    size = tl.where((code & 0x7F) == 0x7F, float("nan"), size)
    return rounded(tl.where(code >= 0x80, -size, size), DTYPE).to(tl.float32)


@triton.jit
def per_element(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A number for each block as a number for each element."""
    blocks: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[:, :, None], (ROWS, blocks, COLS // blocks)), (ROWS, COLS))


@triton.jit
def store_kept(
    kept, scales, pitch, z, m, n, M, N,
    CODE: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """What is kept of a tile of z alone: z or e4m3, rows ``pitch`` apart; nothing where ``kept`` is None."""
    if kept is not None:
        if CODE == "fp8":
            store_fp8(kept, scales, pitch, z, m, n, M, N, DTYPE, ROWS, COLS)
        elif CODE != "bits":
            store_tile(kept, pitch, z, m, n, M, N, ROWS, COLS, TMA)


@triton.jit
def finish_value(
    wide_y, z, bits, pitch, m, n, M, N,
    CODE: tl.constexpr, AT: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """f(z) as it is stored: rounded, with its bits stored beside it, or the side of the minimum in it."""
    y = rounded(wide_y, DTYPE)
    if CODE == "bits":
        store_bits(bits, pitch, z, wide_y, y, m, n, M, N, AT, DTYPE, ROWS, COLS)
    elif CODE == "lsb":
        y = mark_side(y, z, AT, DTYPE)
    return y


@triton.jit
def load_kept(
    kept, extra, stride, stride_e, acc, m, n, M, N,
    CODE: tl.constexpr, FLOOR: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """What the slope of a tile is computed from: z or y, or y and its side of the minimum.

    ``extra`` is what lies beside the rows of ``kept``: bits, or scales. With ``acc``, which is there for results of 16
    bits, all lies where its elements do.
    """
    if CODE == "bits" or CODE == "lsb":
        y = load_tile(kept, stride, 1, m, n, M, N, ROWS, COLS, TMA)
        whole = integer(y.to(tl.float32))
        if CODE == "bits":
            if acc is not None:
                whole = beside(whole, acc)
            code = load_bits(extra, stride_e, acc, m, n, M, N, DTYPE, ROWS, COLS)
        else:
            code = side_of(y, DTYPE)
            if acc is not None:  # the side in the bits that y lacks, for one register
                whole = beside(whole | code, acc)
                code, whole = whole & 1, whole & ~1
        right = code
        if CODE == "bits":
            right = code >> 3
            spare: tl.constexpr = spare_bits(DTYPE)
            if spare > 0:
                whole += ((code & 7) << (spare - 3)) + ((1 << (spare - 4)) - (1 << (spare - 1)))
        wide = number(whole)
        return (tl.where(wide < FLOOR, FLOOR, wide), right.to(tl.float32))
    else:
        if CODE == "fp8":
            z = load_fp8(kept, extra, stride, stride_e, acc, m, n, M, N, DTYPE, ROWS, COLS)
        else:
            z = load_tile(kept, stride, 1, m, n, M, N, ROWS, COLS, TMA).to(COMPUTE)
            if acc is not None:
                z = beside(z, acc)
        return (z,)
