"""The forward product on Hopper, y = f(x Wᵀ + b), with one tile's epilogue under another tile's product.

Written in Gluon, Triton's dialect in which a kernel says itself what each warp does. A program is one producer warp,
which fetches blocks of x and W by TMA into a ring of stages, and two consumers, a warpgroup each, which take the
program's tiles of y in turn. Only one consumer at a time multiplies; once its last product is issued it hands the
tensor cores to the other, and adds the bias, applies f and stores while the other multiplies.

For bfloat16 and float16 matrices that TMA can describe: adjacent columns, rows a multiple of 16 bytes apart, the first
at a multiple of 16 bytes, none empty. Any size else: TMA reads zeros beyond an edge and writes nothing there.
"""

from __future__ import annotations

import dis
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import triton
import triton.experimental.gluon as gluon
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastbp.backends.triton.blocks import warmed_up

# Triton 3.7 renamed the two copies, and later calling the old names is an error.
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
send = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

BLOCK_M, BLOCK_N, BLOCK_K = gl.constexpr(128), gl.constexpr(128), gl.constexpr(64)
PIECE_N = gl.constexpr(32)  # the columns that the epilogue works on at a time
STAGES = gl.constexpr(6)  # with the buffers of the results 224 of 227 KiB
GROUP_M = gl.constexpr(8)
# What 64 Ki registers allow: 2 · 4 · 32 · 240 for the consumers, 4 · 32 · 24 for the producer's warp and its fellows.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)

# Blocks in shared memory, swizzled over the bytes of a row, and tiles in registers, as wgmma leaves them.
SOURCE_BLOCK, RESULT_BLOCK = [BLOCK_M.value, BLOCK_K.value], [BLOCK_M.value, PIECE_N.value]
SOURCE_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
RESULT_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2))
TILE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
PIECE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 32, 16]))

# Why nobody waits for ever. Let t0, t1, … be a program's tiles and K have n steps. Step j of tile i is the program's
# step s = i n + j; it has stage s mod STAGES, and is that stage's use number s div STAGES.
# - The producer takes the steps in order. Before step s it waits until step s − STAGES is freed; a new barrier counts
#   as having ended an odd phase, so the first uses wait for nothing.
# - Step s is freed once the product of step s + 1 is issued, or by itself where it is its tile's last.
# - Consumer w takes tw, tw+2, …. ``turn[w]`` ends its phase m when w may multiply for the m-th of them: for t0 at the
#   start, for ti when the other consumer has issued the last product of ti-1, which exists if ti does.
# So the product of step s needs its fetch and the product of step s − 1, and the fetch of step s needs the product of
# step s − STAGES + 1 at most: by induction over s all of them happen. The turn handed over after the last tile is taken
# by nobody, and a consumer without a tile waits for nothing.
# A wait sees only whether a phase is odd, so nobody may be two phases off. The producer waits for every phase of
# ``freed``. A consumer begins its turn when all earlier steps have been waited for, so ``filled`` is in the phase it
# asks for or has just ended it. ``turn[w]`` cannot run ahead: the other consumer needs a turn from w in between.


@gluon.jit
def find_tile(tile, tiles_m, tiles_n):
    """First row and column of a tile: GROUP_M rows of tiles together, so that their part of W stays in the L2 cache."""
    group_size = GROUP_M * tiles_n
    first = tile // group_size * GROUP_M
    rows = gl.minimum(tiles_m - first, GROUP_M)
    return (first + tile % group_size % rows) * BLOCK_M, tile % group_size // rows * BLOCK_N


@gluon.jit
def produce(x, weight, x_stages, weight_stages, filled, freed):
    """Fetch the blocks of x and W for every tile of this program, as stages become free."""
    tiles_m, tiles_n = gl.cdiv(x.shape[0], BLOCK_M), gl.cdiv(weight.shape[0], BLOCK_N)
    step = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        row, col = find_tile(tile, tiles_m, tiles_n)
        for k in range(0, x.shape[1], BLOCK_K):
            stage, use = step % STAGES, step // STAGES
            mbarrier.wait(freed.index(stage), (use & 1) ^ 1)
            mbarrier.expect(filled.index(stage), x.block_type.nbytes + weight.block_type.nbytes)
            fetch(x, [row, k], filled.index(stage), x_stages.index(stage))
            fetch(weight, [col, k], filled.index(stage), weight_stages.index(stage))
            step += 1


@gluon.jit
def store_piece(value, target, row, col, buffer):
    """A piece of a tile on its way to memory. Two buffers take turns: with one store pending, this one is free."""
    tma.store_wait(pendings=1)
    buffer.store(value)
    fence_async_shared()
    send(target, [row, col], buffer)


@gluon.jit
def finish(
    acc, bias, y, z, row, col, p0, p1, buffers, BUFFER: gl.constexpr, NUMBER: gl.constexpr,
    VALUE: gl.constexpr, NUM_PARAMS: gl.constexpr, HAS_BIAS: gl.constexpr, SAVE_Z: gl.constexpr,
):  # fmt: skip
    """z = acc + b, rounded as it is kept, and y = f(z), piece by piece: so y is to the bit what backward rebuilds.

    The branch around a piece saves the work beyond the edge, and keeps the pieces apart: without it ptxas computes all
    of them at once, for which there are not enough registers.
    """
    WIDTH: gl.constexpr = acc.shape[1]
    if WIDTH > PIECE_N:
        left, right = acc.reshape((BLOCK_M, 2, WIDTH // 2)).permute((0, 2, 1)).split()
        finish(left, bias, y, z, row, col, p0, p1, buffers, BUFFER, 2 * NUMBER,
               VALUE, NUM_PARAMS, HAS_BIAS, SAVE_Z)  # fmt: skip
        finish(right, bias, y, z, row, col + WIDTH // 2, p0, p1, buffers, BUFFER, 2 * NUMBER + 1,
               VALUE, NUM_PARAMS, HAS_BIAS, SAVE_Z)  # fmt: skip
    elif col < y.shape[1]:
        total = gl.convert_layout(acc, PIECE, assert_trivial=True)
        if HAS_BIAS:
            cols = col + gl.arange(0, PIECE_N, gl.SliceLayout(0, PIECE))
            b = gl.load(bias + cols, mask=cols < y.shape[1], other=0.0)
            total += gl.expand_dims(b.to(gl.float32), 0)
        pre = total.to(y.dtype)
        if SAVE_Z:
            store_piece(pre, z, row, col, buffers.index(BUFFER))
        if NUM_PARAMS == 0:
            value = VALUE(pre.to(gl.float32))
        elif NUM_PARAMS == 1:
            value = VALUE(pre.to(gl.float32), p0)
        else:
            value = VALUE(pre.to(gl.float32), p0, p1)
        store_piece(value.to(y.dtype), y, row, col, buffers.index(BUFFER + (1 if SAVE_Z else NUMBER % 2)))


@gluon.jit
def consume(
    WHICH: gl.constexpr, x, weight, bias, y, z, p0, p1, x_stages, weight_stages, filled, freed, turn, buffers,
    VALUE: gl.constexpr, NUM_PARAMS: gl.constexpr, HAS_BIAS: gl.constexpr, SAVE_Z: gl.constexpr,
):  # fmt: skip
    """Every second tile of this program, from number WHICH on."""
    tiles_m, tiles_n = gl.cdiv(x.shape[0], BLOCK_M), gl.cdiv(weight.shape[0], BLOCK_N)
    steps = gl.cdiv(x.shape[1], BLOCK_K)
    for number in range(WHICH, gl.cdiv(tiles_m * tiles_n - gl.program_id(0), gl.num_programs(0)), 2):
        row, col = find_tile(gl.program_id(0) + number * gl.num_programs(0), tiles_m, tiles_n)
        step = number * steps
        acc = warpgroup_mma_init(gl.zeros((BLOCK_M, BLOCK_N), gl.float32, TILE))
        mbarrier.wait(turn.index(WHICH), (number // 2) & 1)
        for k in range(steps):
            stage, use = step % STAGES, step // STAGES
            mbarrier.wait(filled.index(stage), use & 1)
            acc = warpgroup_mma(x_stages.index(stage), weight_stages.index(stage).permute((1, 0)), acc, is_async=True)
            # With this product in flight, the one before is done with its stage.
            acc = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=1, deps=(acc,)))
            mbarrier.arrive(freed.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        mbarrier.arrive(turn.index(1 - WHICH), count=1)
        total = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(freed.index((step + STAGES - 1) % STAGES), count=1)
        tma.store_wait(pendings=0)  # of the tile before, as its last buffer may be the first again
        finish(total, bias, y, z, row, col, p0, p1, buffers, 2 * WHICH, 0, VALUE, NUM_PARAMS, HAS_BIAS, SAVE_Z)
    tma.store_wait(pendings=0)  # shared memory must outlive the stores that read it


@warmed_up
@gluon.jit
def forward_kernel(
    x, weight, bias, y, z, p0: tl.float64, p1: tl.float64,
    VALUE: gl.constexpr, NUM_PARAMS: gl.constexpr, HAS_BIAS: gl.constexpr, SAVE_Z: gl.constexpr,
):  # fmt: skip
    """y = f(x Wᵀ + b), and z where it is kept: descriptors of x (M, K), W (N, K), y and z (M, N), a pointer to b."""
    x_stages = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, BLOCK_K], SOURCE_SHARED)
    weight_stages = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_N, BLOCK_K], SOURCE_SHARED)
    buffers = gl.allocate_shared_memory(x.dtype, [4, BLOCK_M, PIECE_N], RESULT_SHARED)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(freed.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()  # TMA must see the barriers as they are now
    mbarrier.arrive(turn.index(0), count=1)
    p0, p1 = p0.to(gl.float32), p1.to(gl.float32)
    gl.warp_specialize(
        [
            (consume, (0, x, weight, bias, y, z, p0, p1, x_stages, weight_stages, filled, freed, turn, buffers,
                       VALUE, NUM_PARAMS, HAS_BIAS, SAVE_Z)),
            (consume, (1, x, weight, bias, y, z, p0, p1, x_stages, weight_stages, filled, freed, turn, buffers,
                       VALUE, NUM_PARAMS, HAS_BIAS, SAVE_Z)),
            (produce, (x, weight, x_stages, weight_stages, filled, freed)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


# For functions written for Triton: a constant block takes the layout of what it meets.
GLUON_LANGUAGE = ModuleType(tl.__name__)
vars(GLUON_LANGUAGE).update(vars(tl), full=gl.full)


@cache
def in_gluon(function: Any) -> Any:
    """A function written for Triton, and all it calls, for Gluon: the same text, where ``tl`` is GLUON_LANGUAGE."""
    python = function.fn
    loaded = {step.argval for step in dis.get_instructions(python) if step.opname == "LOAD_GLOBAL"}
    names = {name: python.__globals__[name] for name in loaded & python.__globals__.keys()}
    replaced = {name: in_gluon(value) for name, value in names.items() if isinstance(value, triton.JITFunction)}
    replaced |= {name: GLUON_LANGUAGE for name, value in names.items() if value is tl}
    return gluon.jit(FunctionType(python.__code__, {**python.__globals__, **replaced}, python.__name__))


def arguments(x: Any, weight: Any, bias: Any, y: Any, z: Any, value: Any) -> dict[str, Any]:
    """What ``forward_kernel`` takes beside an activation's parameters; None for no bias or z. A program for each SM."""

    def source(matrix: Any) -> Any:
        return TensorDescriptor.from_tensor(matrix, SOURCE_BLOCK, SOURCE_SHARED.value)

    def result(matrix: Any) -> Any:
        return TensorDescriptor.from_tensor(matrix, RESULT_BLOCK, RESULT_SHARED.value)

    return dict(
        x=source(x), weight=source(weight), bias=bias, y=result(y), z=None if z is None else result(z),
        VALUE=in_gluon(value), HAS_BIAS=bias is not None, SAVE_Z=z is not None,
    )  # fmt: skip
