"""The products with the elementwise work in their epilogue: forward, and dgrad with the slope, plain and gated.

For bfloat16 and float16, with sums in float32. Every kernel walks the tiles of its result from its own number in steps
of the grid: a grid as large as the number of tiles has one tile for each program, a smaller one is persistent. Tensors
are pointers with strides, or, with TMA, descriptors; the text is the same.

Linear layers as PyTorch has them: W is (out, in). Forward reads the rows of x and W along K; dgrad multiplies dz, whose
columns are the outputs of the layer, by W itself, so its K is the layer's outputs and its N the layer's inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastbp.backends.triton.blocks import (
    beside,
    find_tile,
    load_tile,
    multiply_add,
    parameters,
    rounded,
    split_columns,
    store_tile,
)


@triton.jit
def multiply(
    a, stride_am, stride_ak, b, stride_bn, stride_bk, m, n, M, N, K,
    B_ROWS_ARE_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tile at (m, n) of a Bᵀ, where b is stored (N, K), or of a B, where it is stored (K, N)."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        a_tile = load_tile(a, stride_am, stride_ak, m, k, M, K, BLOCK_M, BLOCK_K, TMA)
        if B_ROWS_ARE_N:
            b_tile = load_tile(b, stride_bn, stride_bk, n, k, N, K, BLOCK_N, BLOCK_K, TMA).T
        else:
            b_tile = load_tile(b, stride_bk, stride_bn, k, n, K, N, BLOCK_K, BLOCK_N, TMA)
        acc = multiply_add(a_tile, b_tile, acc)
    return acc


@triton.jit
def add_bias(acc, bias, col, N, COLS: tl.constexpr):
    """acc + b, b None where there is none."""
    if bias is not None:
        cols = col + tl.arange(0, COLS)
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def finish_forward(
    acc, bias, y, z, stride_y, params, m, n, M, N,
    VALUE: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """z = acc + b, rounded as the residual is, and y = f(z): so y is to the bit what backward rebuilds.

    In PARTS of the columns, one after the other, for fewer registers.
    """
    if PARTS > 1:
        left, right = split_columns(acc, ROWS, COLS)
        half: tl.constexpr = COLS // 2
        finish_forward(left, bias, y, z, stride_y, params, m, n, M, N, VALUE, DTYPE, ROWS, half, PARTS // 2, TMA)
        finish_forward(
            right, bias, y, z, stride_y, params, m, n + half, M, N, VALUE, DTYPE, ROWS, half, PARTS // 2, TMA
        )
    else:
        pre = rounded(add_bias(acc, bias, n, N, COLS), DTYPE)
        if z is not None:
            store_tile(z, stride_y, pre, m, n, M, N, ROWS, COLS, TMA)
        value = rounded(VALUE(pre.to(tl.float32), *params), DTYPE)
        store_tile(y, stride_y, value, m, n, M, N, ROWS, COLS, TMA)


@triton.jit
def forward_kernel(
    x, weight, bias, y, z, p0: tl.float64, p1: tl.float64, M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_y,
    VALUE: tl.constexpr, NUM_PARAMS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """y = f(x Wᵀ + b), and z where it is kept: x (M, K), W (N, K), b (N,) or None, y and z (M, N)."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    params = parameters(p0, p1, NUM_PARAMS, tl.float32)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        row, col = find_tile(tile, tiles_m, tiles_n, GROUP_M)
        m, n = row * BLOCK_M, col * BLOCK_N
        acc = multiply(
            x, stride_xm, stride_xk, weight, stride_wn, stride_wk, m, n, M, N, K, True, BLOCK_M, BLOCK_N, BLOCK_K, TMA
        )
        finish_forward(acc, bias, y, z, stride_y, params, m, n, M, N, VALUE, DTYPE, BLOCK_M, BLOCK_N, PARTS, TMA)


@triton.jit
def gated_forward_kernel(
    x, gate_weight, up_weight, gate_bias, up_bias, y, gate, up, p0: tl.float64, p1: tl.float64, M, N, K,
    stride_xm, stride_xk, stride_gn, stride_gk, stride_un, stride_uk, stride_y,
    VALUE: tl.constexpr, NUM_PARAMS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """y = f(g) · u with g = x Wgᵀ + bg and u = x Wuᵀ + bu, which are stored where they are kept.

    One product twice as wide: a tile of x meets BLOCK_N rows of the one weight and the same rows of the other.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    params = parameters(p0, p1, NUM_PARAMS, tl.float32)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        row, col = find_tile(tile, tiles_m, tiles_n, GROUP_M)
        m, n = row * BLOCK_M, col * BLOCK_N
        gate_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            x_tile = load_tile(x, stride_xm, stride_xk, m, k, M, K, BLOCK_M, BLOCK_K, TMA)
            gate_tile = load_tile(gate_weight, stride_gn, stride_gk, n, k, N, K, BLOCK_N, BLOCK_K, TMA)
            up_tile = load_tile(up_weight, stride_un, stride_uk, n, k, N, K, BLOCK_N, BLOCK_K, TMA)
            gate_acc = multiply_add(x_tile, gate_tile.T, gate_acc)
            up_acc = multiply_add(x_tile, up_tile.T, up_acc)
        finish_gated_forward(
            gate_acc, up_acc, gate_bias, up_bias, y, gate, up, stride_y, params, m, n, M, N,
            VALUE, DTYPE, BLOCK_M, BLOCK_N, PARTS, TMA,
        )  # fmt: skip


@triton.jit
def finish_gated_forward(
    gate_acc, up_acc, gate_bias, up_bias, y, gate, up, stride_y, params, m, n, M, N,
    VALUE: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    if PARTS > 1:
        gate_left, gate_right = split_columns(gate_acc, ROWS, COLS)
        up_left, up_right = split_columns(up_acc, ROWS, COLS)
        half: tl.constexpr = COLS // 2
        finish_gated_forward(
            gate_left, up_left, gate_bias, up_bias, y, gate, up, stride_y, params, m, n, M, N,
            VALUE, DTYPE, ROWS, half, PARTS // 2, TMA,
        )  # fmt: skip
        finish_gated_forward(
            gate_right, up_right, gate_bias, up_bias, y, gate, up, stride_y, params, m, n + half, M, N,
            VALUE, DTYPE, ROWS, half, PARTS // 2, TMA,
        )  # fmt: skip
    else:
        g = rounded(add_bias(gate_acc, gate_bias, n, N, COLS), DTYPE)
        u = rounded(add_bias(up_acc, up_bias, n, N, COLS), DTYPE)
        if gate is not None:
            store_tile(gate, stride_y, g, m, n, M, N, ROWS, COLS, TMA)
            store_tile(up, stride_y, u, m, n, M, N, ROWS, COLS, TMA)
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
    acc, residual, dz, h, sums, stride_r, stride_d, params, row, m, n, M, N,
    GRAD: tl.constexpr, VALUE: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dz = dz(dh, r), r the kept z or y; h = f(z) again where the next wgrad asks for it; the sums of dz's columns."""
    if PARTS > 1:
        left, right = split_columns(acc, ROWS, COLS)
        half: tl.constexpr = COLS // 2
        finish_dgrad(
            left, residual, dz, h, sums, stride_r, stride_d, params, row, m, n, M, N,
            GRAD, VALUE, DTYPE, ROWS, half, PARTS // 2, TMA,
        )  # fmt: skip
        finish_dgrad(
            right, residual, dz, h, sums, stride_r, stride_d, params, row, m, n + half, M, N,
            GRAD, VALUE, DTYPE, ROWS, half, PARTS // 2, TMA,
        )  # fmt: skip
    else:
        r = beside(load_tile(residual, stride_r, 1, m, n, M, N, ROWS, COLS, TMA).to(tl.float32), acc)
        if h is not None:
            value = rounded(VALUE(r, *params), DTYPE)
            store_tile(h, stride_d, value, m, n, M, N, ROWS, COLS, TMA)
        grad = GRAD(narrowed(acc, DTYPE), r, *params)
        store_sums(sums, grad, row, n, N, COLS)
        store_tile(dz, stride_d, rounded(grad, DTYPE), m, n, M, N, ROWS, COLS, TMA)


@triton.jit
def dgrad_kernel(
    d, weight, residual, dz, h, sums, p0: tl.float64, p1: tl.float64, M, N, K,
    stride_dm, stride_dk, stride_wn, stride_wk, stride_r, stride_out,
    GRAD: tl.constexpr, VALUE: tl.constexpr, NUM_PARAMS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """The delta rule: dz_{l-1} = (dz_l W_l) · f'(z_{l-1}), and with it h_{l-1} and the sums for the bias gradient.

    d (M, K), W (K, N), residual, dz and h (M, N), sums (tiles_m, N) in float32, a row for each row of tiles: what is
    added up does not depend on the order in which tiles are finished. dz may be the residual itself.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    params = parameters(p0, p1, NUM_PARAMS, tl.float32)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        row, col = find_tile(tile, tiles_m, tiles_n, GROUP_M)
        m, n = row * BLOCK_M, col * BLOCK_N
        acc = multiply(
            d, stride_dm, stride_dk, weight, stride_wn, stride_wk, m, n, M, N, K, False, BLOCK_M, BLOCK_N, BLOCK_K, TMA
        )
        finish_dgrad(
            acc, residual, dz, h, sums, stride_r, stride_out, params, row, m, n, M, N,
            GRAD, VALUE, DTYPE, BLOCK_M, BLOCK_N, PARTS, TMA,
        )  # fmt: skip


@triton.jit
def gated_dgrad_kernel(
    d, weight, gate, up, dgate, dup, h, gate_sums, up_sums, p0: tl.float64, p1: tl.float64, M, N, K,
    stride_dm, stride_dk, stride_wn, stride_wk, stride_r, stride_out,
    GRAD: tl.constexpr, VALUE: tl.constexpr, NUM_PARAMS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """The same through a gated layer: with dh = d W, dg = dh · u · f'(g) and du = dh · f(g), and h = f(g) · u again.

    d (M, K), W (K, N), gate, up, dgate, dup and h (M, N); sums as in ``dgrad_kernel``, one for each bias.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    params = parameters(p0, p1, NUM_PARAMS, tl.float32)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        row, col = find_tile(tile, tiles_m, tiles_n, GROUP_M)
        m, n = row * BLOCK_M, col * BLOCK_N
        acc = multiply(
            d, stride_dm, stride_dk, weight, stride_wn, stride_wk, m, n, M, N, K, False, BLOCK_M, BLOCK_N, BLOCK_K, TMA
        )
        finish_gated_dgrad(
            acc, gate, up, dgate, dup, h, gate_sums, up_sums, stride_r, stride_out, params, row, m, n, M, N,
            GRAD, VALUE, DTYPE, BLOCK_M, BLOCK_N, PARTS, TMA,
        )  # fmt: skip


@triton.jit
def finish_gated_dgrad(
    acc, gate, up, dgate, dup, h, gate_sums, up_sums, stride_r, stride_d, params, row, m, n, M, N,
    GRAD: tl.constexpr, VALUE: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    if PARTS > 1:
        left, right = split_columns(acc, ROWS, COLS)
        half: tl.constexpr = COLS // 2
        finish_gated_dgrad(
            left, gate, up, dgate, dup, h, gate_sums, up_sums, stride_r, stride_d, params, row, m, n, M, N,
            GRAD, VALUE, DTYPE, ROWS, half, PARTS // 2, TMA,
        )  # fmt: skip
        finish_gated_dgrad(
            right, gate, up, dgate, dup, h, gate_sums, up_sums, stride_r, stride_d, params, row, m, n + half, M, N,
            GRAD, VALUE, DTYPE, ROWS, half, PARTS // 2, TMA,
        )  # fmt: skip
    else:
        dh = narrowed(acc, DTYPE)
        g = beside(load_tile(gate, stride_r, 1, m, n, M, N, ROWS, COLS, TMA).to(tl.float32), dh)
        u = beside(load_tile(up, stride_r, 1, m, n, M, N, ROWS, COLS, TMA).to(tl.float32), dh)
        value = VALUE(g, *params)
        if h is not None:
            store_tile(h, stride_d, rounded(value * u, DTYPE), m, n, M, N, ROWS, COLS, TMA)
        du = dh * value
        store_sums(up_sums, du, row, n, N, COLS)
        store_tile(dup, stride_d, rounded(du, DTYPE), m, n, M, N, ROWS, COLS, TMA)
        dg = GRAD(narrowed(dh * u, DTYPE), g, *params)
        store_sums(gate_sums, dg, row, n, N, COLS)
        store_tile(dgate, stride_d, rounded(dg, DTYPE), m, n, M, N, ROWS, COLS, TMA)
