"""The elementwise kernels around products of PyTorch's own (cuBLAS): one pass each way, for every dtype.

Arithmetic is in float32, in float64 for float64. Rows have any stride; columns are adjacent in all that the kernels
write. CODE says what a policy keeps (``codes.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastbp.backends.triton.blocks import load_tile, parameters, rounded, store_tile, warmed_up
from fastbp.backends.triton.codes import finish_value, load_kept, store_kept


# Triton compiles anew for sizes that are 1 or a multiple of 16. The rows of a batch are none of its business: what the
# kernels know of alignment comes from the columns.
@triton.jit
def activate(
    gate, up, y, index, inside, params,
    VALUE: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The numbers of ``activation_kernel`` at ``index``, where they are ``inside``."""
    value = VALUE(tl.load(gate + index, mask=inside, other=0.0).to(COMPUTE), *params)
    if up is not None:
        value = value * tl.load(up + index, mask=inside, other=0.0).to(COMPUTE)
    tl.store(y + index, rounded(value, DTYPE), mask=inside)


@warmed_up
@triton.jit(do_not_specialize=["size"])
def activation_kernel(
    gate, up, y, p0: tl.float64, p1: tl.float64, size: tl.int64,
    VALUE: tl.constexpr, NUM_PARAMS: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = f(z) with z in ``gate``, or y = f(g) · u; all of ``size`` adjacent numbers. y may be one of the others."""
    params = parameters(p0, p1, NUM_PARAMS, COMPUTE)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    # In groups of 16 bytes, of which the compiler sees that they lie inside or outside as one, and then what is left.
    WIDTH: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    grouped = size // WIDTH * WIDTH
    index = first + tl.arange(0, BLOCK)
    activate(gate, up, y, index, index < grouped, params, VALUE, DTYPE, COMPUTE)
    if first + BLOCK > size:
        rest = grouped + tl.arange(0, 128)  # one for each thread: no other may read what y is written over
        activate(gate, up, y, rest, rest < size, params, VALUE, DTYPE, COMPUTE)


@warmed_up
@triton.jit(do_not_specialize=["M", "rows_each"])
def compress_kernel(
    gate, up, y, gate_kept, gate_scales, up_kept, up_scales, p0: tl.float64, p1: tl.float64, M, N, rows_each, stride_k,
    VALUE: tl.constexpr, NUM_PARAMS: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    CODE: tl.constexpr, AT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``activation_kernel`` of matrices (M, N), and what a compressed policy keeps of them: bits, or e4m3 with scales.

    All contiguous. y may be ``gate`` or ``up``. A program takes ``rows_each`` rows.
    """
    params = parameters(p0, p1, NUM_PARAMS, COMPUTE)
    n, first = tl.program_id(0) * BLOCK_N, tl.program_id(1) * rows_each
    last = min(first + rows_each, M)
    for m in tl.range(first, last, BLOCK_M):
        z = load_tile(gate, N, 1, m, n, last, N, BLOCK_M, BLOCK_N, False)
        value = VALUE(z.to(COMPUTE), *params)
        store_kept(gate_kept, gate_scales, stride_k, z, m, n, last, N, CODE, DTYPE, BLOCK_M, BLOCK_N, False)
        if up is not None:
            u = load_tile(up, N, 1, m, n, last, N, BLOCK_M, BLOCK_N, False)
            store_kept(up_kept, up_scales, stride_k, u, m, n, last, N, CODE, DTYPE, BLOCK_M, BLOCK_N, False)
            value = value * u.to(COMPUTE)
        value = finish_value(value, z, gate_kept, stride_k, m, n, last, N, CODE, AT, DTYPE, BLOCK_M, BLOCK_N)
        store_tile(y, N, value, m, n, last, N, BLOCK_M, BLOCK_N, False)


@warmed_up
@triton.jit(do_not_specialize=["M", "rows_each"])
def chain_rule_kernel(
    dh, kept, extra, dz, h, sums, p0: tl.float64, p1: tl.float64, M, N, rows_each,
    stride_dm, stride_dn, stride_r, stride_e,
    GRAD: tl.constexpr, VALUE: tl.constexpr, NUM_PARAMS: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    CODE: tl.constexpr, FLOOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz = dz(dh, r), r the kept z or y, with h = f(z) again where it is wanted, and the sums of dz's columns.

    dh (M, N) of any strides, what is kept (M, N), dz and h (M, N) contiguous; dz may be dh or the kept z, and both may
    be None where h alone is wanted. A program takes ``rows_each`` rows, and writes its sums into its row of sums
    (programs, N).
    """
    params = parameters(p0, p1, NUM_PARAMS, COMPUTE)
    n, first = tl.program_id(0) * BLOCK_N, tl.program_id(1) * rows_each
    last = min(first + rows_each, M)
    total = tl.zeros((BLOCK_N,), COMPUTE)
    for m in tl.range(first, last, BLOCK_M):
        if dz is not None:
            d = load_tile(dh, stride_dm, stride_dn, m, n, last, N, BLOCK_M, BLOCK_N, False).to(COMPUTE)
        r = load_kept(
            kept, extra, stride_r, stride_e, None, m, n, last, N, CODE, FLOOR, DTYPE, COMPUTE, BLOCK_M, BLOCK_N, False
        )
        if h is not None:
            store_tile(h, N, rounded(VALUE(r[0], *params), DTYPE), m, n, last, N, BLOCK_M, BLOCK_N, False)
        if dz is not None:
            grad = GRAD(d, *r, *params)
            if sums is not None:
                total += tl.sum(grad, 0)  # rows beyond the last add nothing: dz(0, 0) is 0 for every activation
            store_tile(dz, N, rounded(grad, DTYPE), m, n, last, N, BLOCK_M, BLOCK_N, False)
    if sums is not None:
        cols = n + tl.arange(0, BLOCK_N)
        tl.store(sums + tl.program_id(1).to(tl.int64) * N + cols, total, mask=cols < N)


@warmed_up
@triton.jit(do_not_specialize=["M", "rows_each"])
def gated_chain_rule_kernel(
    dh, gate, up, gate_scales, up_scales, dgate, dup, h, gate_sums, up_sums,
    p0: tl.float64, p1: tl.float64, M, N, rows_each,
    stride_dm, stride_dn, stride_r, stride_e,
    GRAD: tl.constexpr, VALUE: tl.constexpr, NUM_PARAMS: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    CODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same through a gated layer: dg = dh · u · f'(g), du = dh · f(g), h = f(g) · u.

    Any of dgate, dup, h and the sums may be None, ``up`` where neither dgate nor h is wanted, and dh where only h is.
    dgate may be gate, dup may be dh or up.
    """
    params = parameters(p0, p1, NUM_PARAMS, COMPUTE)
    n, first = tl.program_id(0) * BLOCK_N, tl.program_id(1) * rows_each
    last = min(first + rows_each, M)
    gate_total, up_total = tl.zeros((BLOCK_N,), COMPUTE), tl.zeros((BLOCK_N,), COMPUTE)
    for m in tl.range(first, last, BLOCK_M):
        if dh is not None:
            d = load_tile(dh, stride_dm, stride_dn, m, n, last, N, BLOCK_M, BLOCK_N, False).to(COMPUTE)
        g = load_kept(
            gate,
            gate_scales,
            stride_r,
            stride_e,
            None,
            m,
            n,
            last,
            N,
            CODE,
            0.0,
            DTYPE,
            COMPUTE,
            BLOCK_M,
            BLOCK_N,
            False,
        )[0]
        value = VALUE(g, *params)
        if up is not None:
            u = load_kept(
                up,
                up_scales,
                stride_r,
                stride_e,
                None,
                m,
                n,
                last,
                N,
                CODE,
                0.0,
                DTYPE,
                COMPUTE,
                BLOCK_M,
                BLOCK_N,
                False,
            )[0]
            if h is not None:
                store_tile(h, N, rounded(value * u, DTYPE), m, n, last, N, BLOCK_M, BLOCK_N, False)
            if dgate is not None:
                dg = GRAD(rounded(d * u, DTYPE).to(COMPUTE), g, *params)
                if gate_sums is not None:
                    gate_total += tl.sum(dg, 0)
                store_tile(dgate, N, rounded(dg, DTYPE), m, n, last, N, BLOCK_M, BLOCK_N, False)
        if dup is not None:
            du = d * value
            if up_sums is not None:
                up_total += tl.sum(du, 0)
            store_tile(dup, N, rounded(du, DTYPE), m, n, last, N, BLOCK_M, BLOCK_N, False)
    cols = n + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64) * N
    if gate_sums is not None:
        tl.store(gate_sums + row + cols, gate_total, mask=cols < N)
    if up_sums is not None:
        tl.store(up_sums + row + cols, up_total, mask=cols < N)


@warmed_up
@triton.jit(do_not_specialize=["P"])
def column_sum_kernel(
    sums, out, P, N, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The second stage of a bias gradient: out (N,) = Σ_p sums (P, N), in one order, always the same."""
    n = tl.program_id(0) * BLOCK_N
    total = tl.zeros((BLOCK_P, BLOCK_N), COMPUTE)
    for p in tl.range(0, P, BLOCK_P):
        total += load_tile(sums, N, 1, p, n, P, N, BLOCK_P, BLOCK_N, False)
    cols = n + tl.arange(0, BLOCK_N)
    tl.store(out + cols, rounded(tl.sum(total, 0), DTYPE), mask=cols < N)
