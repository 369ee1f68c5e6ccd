"""From tensors to launches: each function says which kernel runs on which grid with which arguments, and runs nothing.

So what is launched here, what ``benchmarks.static`` compiles for a GPU that is not there, and what the tests interpret
is one and the same. All matrices are 2-D, outputs have adjacent columns, and nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastbp.activations import rounded, wide
from fastbp.backends.triton import _activations, _activations_16, elementwise, gemm
from fastbp.backends.triton.configs import Strip, Tile, flat_block
from fastbp.compression import floor
from fastbp.problem import Config

ELEMENTWISE = dict(num_warps=4, enable_fp_fusion=True)
CODES = {"output_bits": "bits", "output_lsb": "lsb", "fp8": "fp8"}  # what the kernels call what is kept
_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Arithmetic(NamedTuple):
    """An activation as the kernels take it: functions of the precision that the dtype asks for, and parameters."""

    value: Callable[..., Any]
    grad: Callable[..., Any]
    params: dict[str, Any]  # p0, p1 and how many of them count
    types: dict[str, Any]  # the dtype of results, and of elementwise arithmetic
    code: str = ""  # what is kept, if it is not z or the output as they are (codes.py)
    at: float = 0.0  # the z that parts the sides of the minimum
    floor: float = 0.0  # the least y that is read back


@lru_cache(maxsize=1024)
def arithmetic(config: Config, dtype: torch.dtype) -> Arithmetic:
    """The activation of a config for tensors of this dtype; ``grad`` reads what the policy's backward reads."""
    source = _activations_16 if dtype.itemsize == 2 else _activations
    from_output = config.save == "output"
    params = rounded(config.params, dtype) if from_output and config.row.limits else config.params
    p0, p1 = (*params, 0.0, 0.0)[:2]
    code, at, least = CODES.get(config.save, ""), 0.0, 0.0
    if code in ("bits", "lsb"):
        assert config.row.minimum_at is not None and config.row.lowest is not None, config.row.name
        at, least = config.row.minimum_at, floor(config.row.lowest, dtype, config.save)
    origin = "_from_output" if from_output else "_from_side" if code in ("bits", "lsb") else ""
    return Arithmetic(
        getattr(source, f"{config.row.name}_value"),
        getattr(source, f"{config.row.name}_grad{origin}"),
        dict(p0=p0, p1=p1, NUM_PARAMS=len(params)),
        dict(DTYPE=_TYPES[dtype], COMPUTE=_TYPES[wide(dtype)]),
        code,
        at,
        least,
    )


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, its arguments by name, and how it is compiled."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


def describable(*matrices: Tensor) -> bool:
    """Whether TMA descriptors can say where these lie: adjacent columns, rows apart and beginning at 16 bytes."""
    return all(
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1]  # not one row for all, as of a gradient that was expanded
        and t.stride(0) * t.itemsize % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in matrices
    )


def _fused(
    kernel: Any, how: Arithmetic, tile: Tile, sizes: Sequence[int], programs: int, functions: Sequence[str],
    tensors: dict[str, tuple[Tensor | None, tuple[int, int] | None]], **others: Any,
) -> Launch:  # fmt: skip
    """A launch of one of the products. ``tensors`` come with the block that a descriptor of theirs has, if any."""
    m, n, k = sizes
    tiles = tile.count(m, n)
    if tile.tma:
        described = {
            name: t if t is None or block is None else TensorDescriptor.from_tensor(t, list(block))
            for name, (t, block) in tensors.items()
        }
    else:
        described = {name: t for name, (t, _) in tensors.items()}
    arguments = dict(
        described, **others, **how.params, M=m, N=n, K=k, DTYPE=how.types["DTYPE"], CODE=how.code,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        PARTS=tile.parts, TMA=tile.tma, FLATTEN=tile.persistent,
    )  # fmt: skip
    arguments |= {name: getattr(how, name.lower()) for name in functions}
    grid = min(tiles, programs * tile.blocks_per_sm) if tile.persistent else tiles
    return Launch(kernel, (grid,), arguments, tile.options)


def _output_block(tile: Tile) -> tuple[int, int]:
    return tile.block_m, tile.block_n // tile.parts


def _codes_block(how: Arithmetic, tile: Tile) -> tuple[int, int] | None:
    """The block of what may be e4m3, which is reached by pointers (codes.py)."""
    return None if how.code == "fp8" else _output_block(tile)


def _pitch(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def forward(
    how: Arithmetic, tile: Tile, programs: int,
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, z: Tensor | None, scales: Tensor | None = None,
) -> Launch:  # fmt: skip
    """y = f(x Wᵀ + b), and z unless it is None; or, by the policy, the bits or the e4m3 of z, and their scales."""
    if tile.pingpong:
        assert not how.code, how.code
        from fastbp.backends.triton import pingpong  # Gluon, which the interpreter does not know

        arguments = pingpong.arguments(x, weight, bias, y, z, how.value) | how.params
        return Launch(pingpong.forward_kernel, (min(programs, tile.count(*y.shape)),), arguments, tile.options)
    out, kept = _output_block(tile), None if how.code else _output_block(tile)
    return _fused(
        gemm.forward_kernel, how, tile, (*y.shape, x.shape[1]), programs, ("VALUE",),
        dict(
            x=(x, (tile.block_m, tile.block_k)), weight=(weight, (tile.block_n, tile.block_k)), bias=(bias, None),
            y=(y, out), kept=(z, kept), scales=(scales, None),
        ),
        stride_xm=x.stride(0), stride_xk=x.stride(1), stride_wn=weight.stride(0), stride_wk=weight.stride(1),
        stride_y=y.stride(0), stride_k=_pitch(z), AT=how.at,
    )  # fmt: skip


def gated_forward(
    how: Arithmetic, tile: Tile, programs: int,
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None],
    y: Tensor, gate: Tensor | None, up: Tensor | None,
    gate_scales: Tensor | None = None, up_scales: Tensor | None = None,
) -> Launch:  # fmt: skip
    """y = f(g) · u, and g and u, or their e4m3 with scales, unless they are None."""
    out, kept, block = _output_block(tile), _codes_block(how, tile), (tile.block_n, tile.block_k)
    return _fused(
        gemm.gated_forward_kernel, how, tile, (*y.shape, x.shape[1]), programs, ("VALUE",),
        dict(
            x=(x, (tile.block_m, tile.block_k)), gate_weight=(weights[0], block), up_weight=(weights[1], block),
            gate_bias=(biases[0], None), up_bias=(biases[1], None), y=(y, out), gate=(gate, kept), up=(up, kept),
            gate_scales=(gate_scales, None), up_scales=(up_scales, None),
        ),
        stride_xm=x.stride(0), stride_xk=x.stride(1), stride_gn=weights[0].stride(0), stride_gk=weights[0].stride(1),
        stride_un=weights[1].stride(0), stride_uk=weights[1].stride(1), stride_y=y.stride(0), stride_k=_pitch(gate),
    )  # fmt: skip


def dgrad(
    how: Arithmetic, tile: Tile, programs: int,
    d: Tensor, weight: Tensor, residual: Tensor, dz: Tensor, h: Tensor | None, sums: Tensor | None,
    extra: Tensor | None = None,
) -> Launch:  # fmt: skip
    """dz = dz(d W, r), h = f(r) unless it is None, and a row of column sums for each row of tiles.

    ``extra`` are the bits beside an output, or the scales of e4m3.
    """
    out = _output_block(tile)
    return _fused(
        gemm.dgrad_kernel, how, tile, (*dz.shape, d.shape[1]), programs, ("GRAD", "VALUE"),
        dict(
            d=(d, (tile.block_m, tile.block_k)), weight=(weight, (tile.block_k, tile.block_n)),
            kept=(residual, _codes_block(how, tile)), extra=(extra, None),
            dz=(dz, out), h=(h, out), sums=(sums, None),
        ),
        stride_dm=d.stride(0), stride_dk=d.stride(1), stride_wn=weight.stride(1), stride_wk=weight.stride(0),
        stride_r=residual.stride(0), stride_e=_pitch(extra), stride_out=dz.stride(0), FLOOR=how.floor,
    )  # fmt: skip


def gated_dgrad(
    how: Arithmetic, tile: Tile, programs: int,
    d: Tensor, weight: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor,
    h: Tensor | None, gate_sums: Tensor | None, up_sums: Tensor | None,
    gate_scales: Tensor | None = None, up_scales: Tensor | None = None,
) -> Launch:  # fmt: skip
    """dg = dh · u · f'(g) and du = dh · f(g) with dh = d W; h = f(g) · u unless it is None; sums as in ``dgrad``."""
    out, kept = _output_block(tile), _codes_block(how, tile)
    return _fused(
        gemm.gated_dgrad_kernel, how, tile, (*dgate.shape, d.shape[1]), programs, ("GRAD", "VALUE"),
        dict(
            d=(d, (tile.block_m, tile.block_k)), weight=(weight, (tile.block_k, tile.block_n)),
            gate=(gate, kept), up=(up, kept), gate_scales=(gate_scales, None), up_scales=(up_scales, None),
            dgate=(dgate, out), dup=(dup, out), h=(h, out), gate_sums=(gate_sums, None), up_sums=(up_sums, None),
        ),
        stride_dm=d.stride(0), stride_dk=d.stride(1), stride_wn=weight.stride(1), stride_wk=weight.stride(0),
        stride_r=gate.stride(0), stride_e=_pitch(gate_scales), stride_out=dgate.stride(0),
    )  # fmt: skip


def activation(how: Arithmetic, gate: Tensor, up: Tensor | None, y: Tensor) -> Launch:
    """y = f(z) with z in ``gate``, or y = f(g) · u. All contiguous; y may be one of the others."""
    block = flat_block(y.itemsize)
    arguments = dict(gate=gate, up=up, y=y, size=y.numel(), VALUE=how.value, **how.params, **how.types, BLOCK=block)
    return Launch(elementwise.activation_kernel, (-(-y.numel() // block),), arguments, ELEMENTWISE)


def compress(
    how: Arithmetic, strip: Strip, gate: Tensor, up: Tensor | None, y: Tensor,
    gate_kept: Tensor | None, gate_scales: Tensor | None,
    up_kept: Tensor | None = None, up_scales: Tensor | None = None,
) -> Launch:  # fmt: skip
    """``activation`` of matrices, and what a compressed policy keeps of them."""
    arguments = dict(
        gate=gate, up=up, y=y, gate_kept=gate_kept, gate_scales=gate_scales, up_kept=up_kept, up_scales=up_scales,
        stride_k=_pitch(gate_kept), VALUE=how.value, AT=how.at, **_strips(how, strip, gate),
    )  # fmt: skip
    return Launch(elementwise.compress_kernel, strip.grid(*gate.shape), arguments, strip.options)


def chain_rule(
    how: Arithmetic, strip: Strip, dh: Tensor | None, residual: Tensor, dz: Tensor | None, h: Tensor | None,
    sums: Tensor | None, extra: Tensor | None = None,
) -> Launch:  # fmt: skip
    """dz = dz(dh, r) and h = f(r), each unless it is None; column sums, a row for each strip of rows.

    dz and h contiguous; ``extra`` as in ``dgrad``.
    """
    arguments = dict(
        dh=dh, kept=residual, extra=extra, dz=dz, h=h, sums=sums, GRAD=how.grad, VALUE=how.value, FLOOR=how.floor,
        **_strips(how, strip, residual), **_strides(dh, residual, extra),
    )  # fmt: skip
    return Launch(elementwise.chain_rule_kernel, strip.grid(*residual.shape), arguments, strip.options)


def gated_chain_rule(
    how: Arithmetic, strip: Strip, dh: Tensor | None, gate: Tensor, up: Tensor | None,
    dgate: Tensor | None, dup: Tensor | None, h: Tensor | None, gate_sums: Tensor | None, up_sums: Tensor | None,
    gate_scales: Tensor | None = None, up_scales: Tensor | None = None,
) -> Launch:  # fmt: skip
    """dg = dh · u · f'(g), du = dh · f(g), h = f(g) · u, each unless it is None."""
    arguments = dict(
        dh=dh, gate=gate, up=up, gate_scales=gate_scales, up_scales=up_scales, dgate=dgate, dup=dup, h=h,
        gate_sums=gate_sums, up_sums=up_sums, GRAD=how.grad, VALUE=how.value,
        **_strips(how, strip, gate), **_strides(dh, gate, gate_scales),
    )  # fmt: skip
    return Launch(elementwise.gated_chain_rule_kernel, strip.grid(*gate.shape), arguments, strip.options)


def _strips(how: Arithmetic, strip: Strip, matrix: Tensor) -> dict[str, Any]:
    return dict(
        M=matrix.shape[0], N=matrix.shape[1], rows_each=strip.rows, CODE=how.code,
        BLOCK_M=strip.block_m, BLOCK_N=strip.block_n, **how.params, **how.types,
    )  # fmt: skip


def _strides(dh: Tensor | None, residual: Tensor, extra: Tensor | None) -> dict[str, int]:
    stride_dm, stride_dn = (0, 0) if dh is None else dh.stride()
    return dict(stride_dm=stride_dm, stride_dn=stride_dn, stride_r=residual.stride(0), stride_e=_pitch(extra))


def column_sum(sums: Tensor, out: Tensor) -> Launch:
    """out (N,) = Σ sums (P, N)."""
    block_p, block_n = 32, 64
    types = dict(DTYPE=_TYPES[out.dtype], COMPUTE=_TYPES[sums.dtype])
    arguments = dict(sums=sums, out=out, P=sums.shape[0], N=sums.shape[1], BLOCK_P=block_p, BLOCK_N=block_n, **types)
    return Launch(elementwise.column_sum_kernel, (-(-sums.shape[1] // block_n),), arguments, ELEMENTWISE)
