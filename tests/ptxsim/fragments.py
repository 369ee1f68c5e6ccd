"""Operands and fragments of wgmma and mma (ISA, "Matrix descriptor", "Register Fragments")."""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np

from .tensor_map import swizzled

MODES = {0: 0, 1: 128, 2: 64, 3: 32}


@cache
def _k_major(rows: int, stride: int, span: int) -> np.ndarray:
    """Addresses from the start of the 16-byte parts of 16 steps: (rows, 2)."""
    row = np.arange(rows)[:, None]
    return (row // 8) * stride + (row % 8) * span + np.arange(2)[None, :] * 16


@cache
def _mn_major(columns: int, leading: int, stride: int, span: int) -> np.ndarray:
    """The same of an operand whose rows are the 16 steps: (16, columns / 8)."""
    k, c = np.arange(16)[:, None], np.arange(columns // 8)[None, :]
    each = span // 16
    return (c // each) * leading + (k // 8) * stride + (k % 8) * span + (c % each) * 16


@cache
def _no_swizzle_k(rows: int, leading: int, stride: int) -> np.ndarray:
    row = np.arange(rows)[:, None]
    return (row // 8) * stride + (row % 8) * 16 + np.arange(2)[None, :] * leading


@lru_cache(maxsize=4096)
def operand_addresses(descriptor: int, rows: int, mn_major: bool, first_row: int = 0) -> np.ndarray:
    """Byte addresses in shared memory of a 16-bit operand's parts, PTX ISA, "Matrix descriptor": K-major (rows, 2), or
    MN-major (16, rows / 8)."""
    start = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    offset = descriptor >> 49 & 7
    span = MODES[descriptor >> 62 & 3]
    if offset:
        raise ValueError("a base offset in a matrix descriptor is not supported")
    if not span:
        if mn_major:
            raise ValueError("MN-major without a swizzle is not supported")
        relative = _no_swizzle_k(rows + first_row, leading, stride)[first_row:]
    elif mn_major:
        relative = _mn_major(rows, leading, stride, span)
    else:
        relative = _k_major(rows + first_row, stride, span)[first_row:]
    return swizzled(start + relative, span)


def halves_to_float(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


_LANE = np.arange(32)


@cache
def accumulator_places(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns, (registers, 32), of a warp's 16 rows of results."""
    number = np.arange(columns // 2)[:, None]
    row = _LANE // 4 + 8 * (number % 4 // 2)
    column = number // 4 * 8 + 2 * (_LANE % 4) + number % 2
    return row, column


def fragment_a(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """(16, 16) of four registers of two 16-bit numbers, m16k16."""
    out = np.zeros((16, 16), np.uint16)
    for number, register in enumerate(registers):
        both = register.view(np.uint16).reshape(32, 2)
        row, column = _LANE // 4 + 8 * (number % 2), 2 * (_LANE % 4) + 8 * (number // 2)
        out[row, column], out[row, column + 1] = both[:, 0], both[:, 1]
    return halves_to_float(out, kind)


def fragment_b(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """(16, 8), k16n8."""
    out = np.zeros((16, 8), np.uint16)
    for number, register in enumerate(registers):
        both = register.view(np.uint16).reshape(32, 2)
        k, n = 2 * (_LANE % 4) + 8 * number, _LANE // 4
        out[k, n], out[k + 1, n] = both[:, 0], both[:, 1]
    return halves_to_float(out, kind)


def tf32_a(registers: list[np.ndarray]) -> np.ndarray:
    """m16k8 of tf32: the low 13 bits of a float are not looked at."""
    out = np.zeros((16, 8), np.float32)
    for number, register in enumerate(registers):
        out[_LANE // 4 + 8 * (number % 2), _LANE % 4 + 4 * (number // 2)] = _tf32(register)
    return out


def tf32_b(registers: list[np.ndarray]) -> np.ndarray:
    out = np.zeros((8, 8), np.float32)
    for number, register in enumerate(registers):
        out[_LANE % 4 + 4 * number, _LANE // 4] = _tf32(register)
    return out


def _tf32(register: np.ndarray) -> np.ndarray:
    return (register.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
