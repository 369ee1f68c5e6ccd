"""The products with the elementwise work in their epilogue: forward, and dgrad with the slope, plain and gated.

For bfloat16 and float16, with sums in float32; the epilogues themselves are in ``epilogues.py``. Every kernel walks the
tiles of its result from its own number in steps of the grid: a grid as large as the number of tiles has one tile for
each program, a smaller one is persistent. Tensors are pointers with strides, or, with TMA, descriptors; the text is the
same.

Linear layers as PyTorch has them: W is (out, in). Forward reads the rows of x and W along K; dgrad multiplies dz, whose
columns are the outputs of the layer, by W itself, so its K is the layer's outputs and its N the layer's inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastbp.backends.triton.blocks import find_tile, load_tile, multiply_add, parameters, warmed_up
from fastbp.backends.triton.epilogues import (
    finish_dgrad,
    finish_forward,
    finish_gated_dgrad,
    finish_gated_forward,
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


@warmed_up
@triton.jit(do_not_specialize=["M"])  # or other batches would be compiled anew
def forward_kernel(
    x, weight, bias, y, kept, scales, p0: tl.float64, p1: tl.float64, M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_y, stride_k,
    VALUE: tl.constexpr, NUM_PARAMS: tl.constexpr, DTYPE: tl.constexpr, CODE: tl.constexpr, AT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """y = f(x Wᵀ + b), and z where it is kept: x (M, K), W (N, K), b (N,) or None, y and z (M, N).

    Or what CODE keeps of z: bits (M, ceil(N / 2)), nothing, or e4m3 (M, N) and its scales (M, ceil(N / 32)).
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    params = parameters(p0, p1, NUM_PARAMS, tl.float32)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        row, col = find_tile(tile, tiles_m, tiles_n, GROUP_M)
        m, n = row * BLOCK_M, col * BLOCK_N
        acc = multiply(
            x, stride_xm, stride_xk, weight, stride_wn, stride_wk, m, n, M, N, K, True, BLOCK_M, BLOCK_N, BLOCK_K, TMA
        )
        finish_forward(
            acc, bias, y, kept, scales, stride_y, stride_k, params, m, n, M, N,
            VALUE, DTYPE, CODE, AT, BLOCK_M, BLOCK_N, PARTS, TMA,
        )  # fmt: skip


@warmed_up
@triton.jit(do_not_specialize=["M"])  # or other batches would be compiled anew
def gated_forward_kernel(
    x, gate_weight, up_weight, gate_bias, up_bias, y, gate, up, gate_scales, up_scales,
    p0: tl.float64, p1: tl.float64, M, N, K,
    stride_xm, stride_xk, stride_gn, stride_gk, stride_un, stride_uk, stride_y, stride_k,
    VALUE: tl.constexpr, NUM_PARAMS: tl.constexpr, DTYPE: tl.constexpr, CODE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """y = f(g) · u with g = x Wgᵀ + bg and u = x Wuᵀ + bu, which are stored where they are kept, or as e4m3.

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
            gate_acc, up_acc, gate_bias, up_bias, y, gate, up, gate_scales, up_scales, stride_y, stride_k, params,
            m, n, M, N, VALUE, DTYPE, CODE, BLOCK_M, BLOCK_N, PARTS, TMA,
        )  # fmt: skip


@warmed_up
@triton.jit(do_not_specialize=["M"])  # or other batches would be compiled anew
def dgrad_kernel(
    d, weight, kept, extra, dz, h, sums, p0: tl.float64, p1: tl.float64, M, N, K,
    stride_dm, stride_dk, stride_wn, stride_wk, stride_r, stride_e, stride_out,
    GRAD: tl.constexpr, VALUE: tl.constexpr, NUM_PARAMS: tl.constexpr, DTYPE: tl.constexpr,
    CODE: tl.constexpr, FLOOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """The delta rule: dz_{l-1} = (dz_l W_l) · f'(z_{l-1}), and with it h_{l-1} and the sums for the bias gradient.

    d (M, K), W (K, N), what is kept (z, y or e4m3), dz and h (M, N), sums (tiles_m, N) in float32, a row for each row
    of tiles: what is added up does not depend on the order in which tiles are finished. dz may be the kept z itself.
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
            acc, kept, extra, dz, h, sums, stride_r, stride_e, stride_out, params, row, m, n, M, N,
            GRAD, VALUE, DTYPE, CODE, FLOOR, BLOCK_M, BLOCK_N, PARTS, TMA,
        )  # fmt: skip


@warmed_up
@triton.jit(do_not_specialize=["M"])  # or other batches would be compiled anew
def gated_dgrad_kernel(
    d, weight, gate, up, gate_scales, up_scales, dgate, dup, h, gate_sums, up_sums,
    p0: tl.float64, p1: tl.float64, M, N, K,
    stride_dm, stride_dk, stride_wn, stride_wk, stride_r, stride_e, stride_out,
    GRAD: tl.constexpr, VALUE: tl.constexpr, NUM_PARAMS: tl.constexpr, DTYPE: tl.constexpr,
    CODE: tl.constexpr,
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
            acc, gate, up, gate_scales, up_scales, dgate, dup, h, gate_sums, up_sums, stride_r, stride_e, stride_out,
            params, row, m, n, M, N, GRAD, VALUE, DTYPE, CODE, BLOCK_M, BLOCK_N, PARTS, TMA,
        )  # fmt: skip
