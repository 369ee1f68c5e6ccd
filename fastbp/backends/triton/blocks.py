"""What the kernels share: tiles in and out, the product, rounding, an activation's parameters, the order of tiles.

A tile comes from a pointer and two strides, or from a TMA descriptor, which knows its tensor. Offsets are 64 bits wide
before they are multiplied by a stride, so no tensor is too large. What the interpreter (TRITON_INTERPRET=1) computes
otherwise than a GPU is here and in ``primitives_16.py``, and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def warmed_up(kernel: Any) -> Any:
    """A kernel that refuses to be compiled and loaded while a CUDA graph is captured, which that would break.

    Asked only where Triton has no compiled kernel for a launch: one that has costs what it cost.
    """
    compile_kernel = getattr(kernel, "_do_compile", None)  # the interpreter has none
    if compile_kernel is not None:

        def compile_unless_capturing(*arguments: Any, **options: Any) -> Any:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"fastbp: a CUDA graph is being captured, and the Triton kernel {kernel.fn.__name__} is not "
                    "compiled for these tensors yet; run the same step once before the capture, forward and backward, "
                    "on a side stream as torch.cuda.graph asks"
                )
            return compile_kernel(*arguments, **options)

        kernel._do_compile = compile_unless_capturing
    return kernel


@triton.jit
def find_tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: GROUP_M rows of tiles together, so that what they read of W stays in the L2 cache."""
    group_size = GROUP_M * tiles_n
    first = tile // group_size * GROUP_M
    rows = min(tiles_m - first, GROUP_M)
    return first + tile % group_size % rows, tile % group_size // rows


@triton.jit
def tile_pointers(
    base, stride_row, stride_col, row, col, ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr = 0
):
    """To a tile's elements. WIDTH: so many in a row, at most, are to be one thread's; 0 leaves that to the compiler."""
    rows = row + tl.arange(0, ROWS).to(tl.int64)
    cols = col + tl.arange(0, COLS).to(tl.int64)
    pointers = base + rows[:, None] * stride_row + cols[None, :] * stride_col
    if WIDTH > 0:
        pointers = tl.max_contiguous(pointers, (1, WIDTH))
    return pointers


@triton.jit
def tile_mask(row, col, num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    return (row + tl.arange(0, ROWS) < num_rows)[:, None] & (col + tl.arange(0, COLS) < num_cols)[None, :]


@triton.jit
def load_tile(
    source, stride_row, stride_col, row, col, num_rows, num_cols,
    ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix, 0 beyond its edges."""
    if TMA:
        tile = source.load([row, col])
    else:
        pointers = tile_pointers(source, stride_row, stride_col, row, col, ROWS, COLS)
        tile = tl.load(pointers, mask=tile_mask(row, col, num_rows, num_cols, ROWS, COLS), other=0.0)
    return tile


@triton.jit
def store_tile(
    target, stride_row, tile, row, col, num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr
):
    """A tile into a matrix with adjacent columns; nothing beyond its edges."""
    if TMA:
        target.store([row, col], tile)
    else:
        pointers = tile_pointers(target, stride_row, 1, row, col, ROWS, COLS)
        tl.store(pointers, tile, mask=tile_mask(row, col, num_rows, num_cols, ROWS, COLS))


@triton.jit
def multiply_add(a, b, acc):
    """acc + a b, summed in float32. The interpreter's product of bfloat16 is wrong, so there a and b are widened."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x, of float32 or float64, rounded to the nearest of ``dtype``.

    To 16 bits by the instruction that rounds two: the compiler takes the one for one, 16 a cycle and multiprocessor,
    where the result is read again. The interpreter's own cast to bfloat16 cuts off and gets subnormal numbers wrong, so
    there the bits are made by hand.
    """
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            y = tl.where(x == x, nearest, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            y = x.to(dtype)
    elif dtype == tl.bfloat16:
        y = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, True, 2)
    elif dtype == tl.float16:
        y = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.float16, True, 2)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def beside(x, acc):
    """x, of float32 or int32, in the registers of those threads that hold the same elements of ``acc``.

    Left to itself, the compiler computes an activation once in the layout in which x was loaded and again in that of
    the product. The instruction that pretends to read both, and may not be repeated, makes it settle on one.
    """
    if not INTERPRETED:
        kinds: tl.constexpr = "=r,r,f" if x.dtype == tl.int32 else "=f,f,f"
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", kinds, [x, acc], dtype=x.dtype, is_pure=False, pack=1)
    return x


@triton.jit
def parameters(p0, p1, NUM: tl.constexpr, dtype: tl.constexpr):
    """The first NUM parameters of an activation in the dtype of the arithmetic. They come in float64, to be exact."""
    if NUM == 0:
        return ()
    elif NUM == 1:
        return (tl.full((), p0, dtype),)
    else:
        return (tl.full((), p0, dtype), tl.full((), p1, dtype))


@triton.jit
def split_columns(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))
