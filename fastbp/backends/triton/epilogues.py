"""What is done to a tile of a product before it is stored: bias, activation, slope, column sums, and what is kept.

A tile may be taken in PARTS of its columns, one after the other, for fewer registers. CODE says what a policy keeps
(``codes.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastbp.backends.triton.blocks import beside, rounded, split_columns, store_tile
from fastbp.backends.triton.codes import finish_value, load_kept, store_kept


@triton.jit
def add_bias(acc, bias, col, N, COLS: tl.constexpr):
    """acc + b, b None where there is none."""
    if bias is not None:
        cols = col + tl.arange(0, COLS)
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def finish_forward(
    acc, bias, y, kept, scales, stride_y, stride_k, params, m, n, M, N,
    VALUE: tl.constexpr, DTYPE: tl.constexpr, CODE: tl.constexpr, AT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """z = acc + b, rounded as the residual is, and y = f(z): so y is to the bit what backward rebuilds from z."""
    if PARTS > 1:
        left, right = split_columns(acc, ROWS, COLS)
        half: tl.constexpr = COLS // 2
        finish_forward(
            left, bias, y, kept, scales, stride_y, stride_k, params, m, n, M, N,
            VALUE, DTYPE, CODE, AT, ROWS, half, PARTS // 2, TMA,
        )  # fmt: skip
        finish_forward(
            right, bias, y, kept, scales, stride_y, stride_k, params, m, n + half, M, N,
            VALUE, DTYPE, CODE, AT, ROWS, half, PARTS // 2, TMA,
        )  # fmt: skip
    else:
        pre = rounded(add_bias(acc, bias, n, N, COLS), DTYPE)
        store_kept(kept, scales, stride_k, pre, m, n, M, N, CODE, DTYPE, ROWS, COLS, TMA)
        wide = VALUE(pre.to(tl.float32), *params)
        if CODE == "bits":
            wide = beside(wide, acc)  # or f is computed twice: where its bits are stored from, and where y is
        value = finish_value(wide, pre, kept, stride_k, m, n, M, N, CODE, AT, DTYPE, ROWS, COLS)
        store_tile(y, stride_y, value, m, n, M, N, ROWS, COLS, TMA)


@triton.jit
def finish_gated_forward(
    gate_acc, up_acc, gate_bias, up_bias, y, gate, up, gate_scales, up_scales, stride_y, stride_k, params, m, n, M, N,
    VALUE: tl.constexpr, DTYPE: tl.constexpr, CODE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The same of g and u, and y = f(g) · u."""
    if PARTS > 1:
        gate_left, gate_right = split_columns(gate_acc, ROWS, COLS)
        up_left, up_right = split_columns(up_acc, ROWS, COLS)
        half: tl.constexpr = COLS // 2
        finish_gated_forward(
            gate_left, up_left, gate_bias, up_bias, y, gate, up, gate_scales, up_scales, stride_y, stride_k, params,
            m, n, M, N, VALUE, DTYPE, CODE, ROWS, half, PARTS // 2, TMA,
        )  # fmt: skip
        finish_gated_forward(
            gate_right, up_right, gate_bias, up_bias, y, gate, up, gate_scales, up_scales, stride_y, stride_k, params,
            m, n + half, M, N, VALUE, DTYPE, CODE, ROWS, half, PARTS // 2, TMA,
        )  # fmt: skip
    else:
        g = rounded(add_bias(gate_acc, gate_bias, n, N, COLS), DTYPE)
        u = rounded(add_bias(up_acc, up_bias, n, N, COLS), DTYPE)
        store_kept(gate, gate_scales, stride_k, g, m, n, M, N, CODE, DTYPE, ROWS, COLS, TMA)
        store_kept(up, up_scales, stride_k, u, m, n, M, N, CODE, DTYPE, ROWS, COLS, TMA)
        value = VALUE(g.to(tl.float32), *params) * u.to(tl.float32)
        store_tile(y, stride_y, rounded(value, DTYPE), m, n, M, N, ROWS, COLS, TMA)


@triton.jit
def narrowed(dh, DTYPE: tl.constexpr):
    """dh as eager keeps it where that matters: float16 overflows, and what overflows in eager overflows here."""
    if tl.float16 == DTYPE:
        dh = rounded(dh, DTYPE).to(tl.float32)
    return dh


@triton.jit
def store_sums(sums, dz, row, n, N, COLS: tl.constexpr):
    """The sums of a tile's columns into row ``row`` of sums (tiles_m, N), if they are wanted."""
    if sums is not None:
        cols = n + tl.arange(0, COLS)  # rows beyond M add nothing: dz(0, 0) is 0 for every activation
        tl.store(sums + row.to(tl.int64) * N + cols, tl.sum(dz, 0), mask=cols < N)


@triton.jit
def finish_dgrad(
    acc, kept, extra, dz, h, sums, stride_r, stride_e, stride_d, params, row, m, n, M, N,
    GRAD: tl.constexpr, VALUE: tl.constexpr, DTYPE: tl.constexpr, CODE: tl.constexpr, FLOOR: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dz from dh and what was kept; h = f(z) again where the next wgrad asks for it; the sums of dz's columns."""
    if PARTS > 1:
        left, right = split_columns(acc, ROWS, COLS)
        half: tl.constexpr = COLS // 2
        finish_dgrad(
            left, kept, extra, dz, h, sums, stride_r, stride_e, stride_d, params, row, m, n, M, N,
            GRAD, VALUE, DTYPE, CODE, FLOOR, ROWS, half, PARTS // 2, TMA,
        )  # fmt: skip
        finish_dgrad(
            right, kept, extra, dz, h, sums, stride_r, stride_e, stride_d, params, row, m, n + half, M, N,
            GRAD, VALUE, DTYPE, CODE, FLOOR, ROWS, half, PARTS // 2, TMA,
        )  # fmt: skip
    else:
        r = load_kept(kept, extra, stride_r, stride_e, acc, m, n, M, N, CODE, FLOOR, DTYPE, tl.float32, ROWS, COLS, TMA)
        if h is not None:
            value = rounded(VALUE(r[0], *params), DTYPE)
            store_tile(h, stride_d, value, m, n, M, N, ROWS, COLS, TMA)
        grad = GRAD(narrowed(acc, DTYPE), *r, *params)
        store_sums(sums, grad, row, n, N, COLS)
        store_tile(dz, stride_d, rounded(grad, DTYPE), m, n, M, N, ROWS, COLS, TMA)


@triton.jit
def finish_gated_dgrad(
    acc, gate, up, gate_scales, up_scales, dgate, dup, h, gate_sums, up_sums, stride_r, stride_e, stride_d, params, row,
    m, n, M, N,
    GRAD: tl.constexpr, VALUE: tl.constexpr, DTYPE: tl.constexpr, CODE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The same of a gated layer: dg = dh · u · f'(g), du = dh · f(g), and h = f(g) · u again."""
    if PARTS > 1:
        left, right = split_columns(acc, ROWS, COLS)
        half: tl.constexpr = COLS // 2
        finish_gated_dgrad(
            left, gate, up, gate_scales, up_scales, dgate, dup, h, gate_sums, up_sums, stride_r, stride_e, stride_d,
            params, row, m, n, M, N, GRAD, VALUE, DTYPE, CODE, ROWS, half, PARTS // 2, TMA,
        )  # fmt: skip
        finish_gated_dgrad(
            right, gate, up, gate_scales, up_scales, dgate, dup, h, gate_sums, up_sums, stride_r, stride_e, stride_d,
            params, row, m, n + half, M, N, GRAD, VALUE, DTYPE, CODE, ROWS, half, PARTS // 2, TMA,
        )  # fmt: skip
    else:
        dh = narrowed(acc, DTYPE)
        g = load_kept(
            gate, gate_scales, stride_r, stride_e, dh, m, n, M, N, CODE, 0.0, DTYPE, tl.float32, ROWS, COLS, TMA
        )[0]
        u = load_kept(up, up_scales, stride_r, stride_e, dh, m, n, M, N, CODE, 0.0, DTYPE, tl.float32, ROWS, COLS, TMA)[
            0
        ]
        value = VALUE(g, *params)
        if h is not None:
            store_tile(h, stride_d, rounded(value * u, DTYPE), m, n, M, N, ROWS, COLS, TMA)
        du = dh * value
        store_sums(up_sums, du, row, n, N, COLS)
        store_tile(dup, stride_d, rounded(du, DTYPE), m, n, M, N, ROWS, COLS, TMA)
        dg = GRAD(narrowed(dh * u, DTYPE), g, *params)
        store_sums(gate_sums, dg, row, n, N, COLS)
        store_tile(dgate, stride_d, rounded(dg, DTYPE), m, n, M, N, ROWS, COLS, TMA)
