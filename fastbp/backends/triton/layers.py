"""One hidden layer each way, by the route that ``choice`` names: allocation, launches, and what PyTorch does itself.

Matrices are 2-D unless said otherwise. All that is allocated comes from PyTorch's allocator by way of ``new``, and
nothing here waits for the GPU, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbp.activations import wide
from fastbp.backends.triton import configs, launch
from fastbp.backends.triton.choice import device_of, tile_for
from fastbp.problem import Config

Maybe = Tensor | None


def new(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result or a scratch matrix, contiguous and not written yet."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to the current device, which must be that of the tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def rows_of(t: Tensor) -> Tensor:
    """A tensor (..., N) as a matrix; copied where no strides reach its rows."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _is_identity(config: Config) -> bool:
    return not config.row.grad_reads_output


def _packed(bias: Maybe) -> Maybe:
    return None if bias is None else bias.contiguous()


def forward(config: Config, x: Tensor, weight: Tensor, bias: Maybe, keep: bool) -> tuple[Tensor, Maybe]:
    """y = f(x Wᵀ + b) and, with ``keep``, z; x (..., K), y and z (..., N)."""
    rows = rows_of(x)
    (m, k), n = rows.shape, weight.shape[0]
    tile = tile_for("forward", config.row.name, (m, n, k), rows, weight)
    how, shape = launch.arithmetic(config, x.dtype), (*x.shape[:-1], n)
    if tile is not None:
        y, z = new(shape, x), new(shape, x) if keep else None
        out = None if z is None else z.view(m, n)
        launch.forward(how, tile, device_of(x.device).processors, rows, weight, _packed(bias), y.view(m, n), out)()
        return y, z
    z = F.linear(x, weight, bias)  # where cuBLASLt is used, it adds the bias in its epilogue
    if _is_identity(config):
        return (z.clone() if keep else z), z if keep else None  # one tensor must not be returned twice
    y = new(shape, x) if keep else z
    launch.activation(how, z, None, y)()
    return y, z if keep else None


def gated_forward(
    config: Config, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Maybe], keep: bool
) -> tuple[Tensor, Maybe, Maybe]:
    """y = f(g) · u and, with ``keep``, g and u; x (..., K), the others (..., N)."""
    rows = rows_of(x)
    (m, k), n = rows.shape, weights[0].shape[0]
    tile = tile_for("gated_forward", config.row.name, (m, n, k), rows, *weights)
    how, shape = launch.arithmetic(config, x.dtype), (*x.shape[:-1], n)
    if tile is not None:
        y = new(shape, x)
        gate, up = (new(shape, x), new(shape, x)) if keep else (None, None)
        flat = [None if t is None else t.view(m, n) for t in (gate, up)]
        packed = [_packed(bias) for bias in biases]
        launch.gated_forward(how, tile, device_of(x.device).processors, rows, weights, packed, y.view(m, n), *flat)()
        return y, gate, up
    g, u = (F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    y = new(shape, x) if keep else g
    launch.activation(how, g, u, y)()
    return (y, g, u) if keep else (y, None, None)


class Slope(NamedTuple):
    """What backward makes of one layer: dz, the layer's output again, and the bias gradient, None where not asked."""

    dz: Tensor
    h: Maybe
    db: Maybe


class GatedSlope(NamedTuple):
    """The same of a gated layer."""

    dgate: Maybe
    dup: Maybe
    h: Maybe
    dgate_bias: Maybe
    dup_bias: Maybe


def _total(sums: Maybe, dtype: torch.dtype) -> Maybe:
    """The second stage of a bias gradient."""
    if sums is None:
        return None
    total = new(sums.shape[1:], sums, dtype)
    launch.column_sum(sums, total)()
    return total


def chain_rule(config: Config, dh: Tensor, residual: Tensor, rebuild: bool, bias: bool, over: Maybe = None) -> Slope:
    """dz = dz(dh, r), h = f(r) with ``rebuild``, Σ dz with ``bias``; dz is written over ``over`` if that is given."""
    m, n = dh.shape
    if _is_identity(config):
        return Slope(dh, residual if rebuild else None, dh.sum(0) if bias else None)
    strip = configs.strip(m, n, dh.itemsize, device_of(dh.device).processors)
    dz = new((m, n), dh) if over is None else over
    h = new((m, n), dh) if rebuild else None
    sums = new((strip.strips(m), n), dh, wide(dh.dtype)) if bias else None
    launch.chain_rule(launch.arithmetic(config, dh.dtype), strip, dh, residual, dz, h, sums)()
    return Slope(dz, h, _total(sums, dh.dtype))


def dgrad(
    config: Config, d: Tensor, weight: Tensor, residual: Tensor, rebuild: bool, bias: bool, overwrite: bool
) -> Slope:
    """The delta rule from the linear above: ``chain_rule`` of dh = d W. With ``overwrite`` the residual is used up."""
    (m, k), n = d.shape, weight.shape[1]
    tile = tile_for("dgrad", config.row.name, (m, n, k), d, weight, residual)
    if tile is None or _is_identity(config):
        dh = d.mm(weight)
        return chain_rule(config, dh, residual, rebuild, bias, over=dh)
    dz = residual if overwrite else new((m, n), d)
    h = new((m, n), d) if rebuild else None
    sums = new((-(-m // tile.block_m), n), d, torch.float32) if bias else None
    how, processors = launch.arithmetic(config, d.dtype), device_of(d.device).processors
    launch.dgrad(how, tile, processors, d, weight, residual, dz, h, sums)()
    return Slope(dz, h, _total(sums, d.dtype))


def gated_chain_rule(
    config: Config, dh: Tensor, gate: Tensor, up: Maybe, wanted: Sequence[bool], biases: Sequence[bool],
    rebuild: bool, over_gate: Maybe = None, over_up: Maybe = None,
) -> GatedSlope:  # fmt: skip
    """dg = dh · u · f'(g) and du = dh · f(g) as ``wanted``, h = f(g) · u with ``rebuild``, the sums of dg and du."""
    m, n = dh.shape
    processors = device_of(dh.device).processors
    strip = configs.strip(m, n, dh.itemsize, processors)
    dgate = (new((m, n), dh) if over_gate is None else over_gate) if wanted[0] else None
    dup = (new((m, n), dh) if over_up is None else over_up) if wanted[1] else None
    h = new((m, n), dh) if rebuild else None
    sums = [new((strip.strips(m), n), dh, wide(dh.dtype)) if bias else None for bias in biases]
    how = launch.arithmetic(config, dh.dtype)
    if dgate is None and h is None:
        up = None
    launch.gated_chain_rule(how, strip, dh, gate, up, dgate, dup, h, *sums)()
    return GatedSlope(dgate, dup, h, *(_total(s, dh.dtype) for s in sums))


def gated_dgrad(
    config: Config, d: Tensor, weight: Tensor, gate: Tensor, up: Maybe, wanted: Sequence[bool],
    biases: Sequence[bool], rebuild: bool, overwrite: bool,
) -> GatedSlope:  # fmt: skip
    """``gated_chain_rule`` of dh = d W, W the linear above. With ``overwrite`` gate and up are used up."""
    (m, k), n = d.shape, weight.shape[1]
    tile = None
    if up is not None and all(wanted):
        tile = tile_for("gated_dgrad", config.row.name, (m, n, k), d, weight, gate, up)
    if tile is None or up is None:
        dh = d.mm(weight)
        over = gate if overwrite else None
        return gated_chain_rule(config, dh, gate, up, wanted, biases, rebuild, over_gate=over, over_up=dh)
    dgate, dup = (gate, up) if overwrite else (new((m, n), d), new((m, n), d))
    h = new((m, n), d) if rebuild else None
    sums = [new((-(-m // tile.block_m), n), d, torch.float32) if bias else None for bias in biases]
    how, processors = launch.arithmetic(config, d.dtype), device_of(d.device).processors
    launch.gated_dgrad(how, tile, processors, d, weight, gate, up, dgate, dup, h, *sums)()
    return GatedSlope(dgate, dup, h, *(_total(s, d.dtype) for s in sums))


def value(config: Config, gate: Tensor, up: Maybe = None) -> Tensor:
    """f(z) with z in ``gate``, or f(g) · u; contiguous."""
    y = new(gate.shape, gate)
    launch.activation(launch.arithmetic(config, gate.dtype), gate, up, y)()
    return y
