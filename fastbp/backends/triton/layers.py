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
from fastbp.compression import BLOCK
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


class Kept(NamedTuple):
    """What one hidden linear left for backward: z, its output or its e4m3, and beside it bits or scales."""

    main: Maybe
    extra: Maybe = None


def _kept_of(code: str, shape: Sequence[int], x: Tensor, keep: bool) -> Kept:
    """Memory for what forward keeps of a z of this shape: z itself with ``keep``, or what the policy makes of it."""
    if code in ("bits", "fp8"):
        rows, n = shape[:-1], shape[-1]
        bytes_of = new((*rows, n if code == "fp8" else -(-n // 2)), x, torch.uint8)
        return Kept(bytes_of, new((*rows, -(-n // BLOCK)), x, torch.uint8) if code == "fp8" else None)
    return Kept(new(shape, x) if keep else None)


def _listed(kept: Sequence[Kept]) -> list[Tensor]:
    return [t for each in kept for t in each if t is not None]


def _as_matrix(t: Maybe, m: int) -> Maybe:
    return None if t is None else t.view(m, t.shape[-1])


def forward(config: Config, x: Tensor, weight: Tensor, bias: Maybe, keep: bool) -> list[Tensor]:
    """y = f(x Wᵀ + b) and, with ``keep``, z, or what a compressed policy keeps; x (..., K), y and z (..., N)."""
    rows = rows_of(x)
    (m, k), n = rows.shape, weight.shape[0]
    how, shape = launch.arithmetic(config, x.dtype), (*x.shape[:-1], n)
    tile = tile_for("forward", config, (m, n, k), rows, weight, code=how.code)
    processors = device_of(x.device).processors
    if tile is not None:
        y, kept = new(shape, x), _kept_of(how.code, shape, x, keep)
        out = [_as_matrix(t, m) for t in kept]
        launch.forward(how, tile, processors, rows, weight, _packed(bias), y.view(m, n), *out)()
        return [y, *_listed([kept])]
    z = F.linear(x, weight, bias)  # where cuBLASLt is used, it adds the bias in its epilogue
    if _is_identity(config):
        return [z.clone(), z] if keep else [z]  # one tensor must not be returned twice
    y = new(shape, x) if keep else z
    compressed = _activate(how, [z], y)
    return [y, z] if keep else [y, *compressed]


def _activate(how: launch.Arithmetic, zs: Sequence[Tensor], y: Tensor) -> list[Tensor]:
    """y = f(z), or f(g) · u, where y may be z or g, and what a compressed policy keeps of them; all (..., N), dense."""
    if not how.code:
        launch.activation(how, zs[0], zs[1] if len(zs) > 1 else None, y)()
        return []
    z, *up = (rows_of(t) for t in zs)
    m, n = z.shape
    kept = [_kept_of(how.code, y.shape, y, keep=False) for _ in zs]
    strip = configs.strip(m, n, y.itemsize, device_of(y.device).processors)
    matrices = (_as_matrix(t, m) for each in kept for t in each)
    launch.compress(how, strip, z, up[0] if up else None, y.view(m, n), *matrices)()
    return _listed(kept)


def output_of(config: Config, zs: Sequence[Tensor]) -> list[Tensor]:
    """f(z), or f(g) · u, of what the caller has, (..., N), and what a compressed policy keeps of that."""
    zs = [z.contiguous() for z in zs]
    if len(zs) == 1 and _is_identity(config):
        return [zs[0].clone() if config.save == "output" else zs[0]]  # an input must not be returned
    y = new(zs[0].shape, zs[0])
    return [y, *_activate(launch.arithmetic(config, y.dtype), zs, y)]


def gated_forward(
    config: Config, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Maybe], keep: bool
) -> list[Tensor]:
    """y = f(g) · u and, with ``keep``, g and u, or what a compressed policy keeps; x (..., K), the others (..., N)."""
    rows = rows_of(x)
    (m, k), n = rows.shape, weights[0].shape[0]
    how, shape = launch.arithmetic(config, x.dtype), (*x.shape[:-1], n)
    tile = tile_for("gated_forward", config, (m, n, k), rows, *weights, code=how.code)
    processors = device_of(x.device).processors
    if tile is not None:
        kept = [_kept_of(how.code, shape, x, keep) for _ in range(2)]
        (gate, gate_scales), (up, up_scales) = ((_as_matrix(t, m) for t in pair) for pair in kept)
        y = new(shape, x)
        packed, out = [_packed(bias) for bias in biases], (gate, up, gate_scales, up_scales)
        launch.gated_forward(how, tile, processors, rows, weights, packed, y.view(m, n), *out)()
        return [y, *_listed(kept)]
    g, u = (F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    y = new(shape, x) if keep else g
    compressed = _activate(how, [g, u], y)
    return [y, g, u] if keep else [y, *compressed]


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


def _main(kept: Kept) -> Tensor:
    """Of what backward is about to read, which is there: ``saving.kept`` says so."""
    assert kept.main is not None
    return kept.main


def chain_rule(config: Config, dh: Tensor, kept: Kept, rebuild: bool, bias: bool, over: Maybe = None) -> Slope:
    """dz = dz(dh, r), h = f(r) with ``rebuild``, Σ dz with ``bias``; dz is written over ``over`` if that is given."""
    m, n = dh.shape
    if _is_identity(config):  # which reads nothing, so nothing need be kept
        return Slope(dh, kept.main if rebuild else None, dh.sum(0) if bias else None)
    residual = _main(kept)
    strip = configs.strip(m, n, dh.itemsize, device_of(dh.device).processors)
    dz = new((m, n), dh) if over is None else over
    h = new((m, n), dh) if rebuild else None
    sums = new((strip.strips(m), n), dh, wide(dh.dtype)) if bias else None
    launch.chain_rule(launch.arithmetic(config, dh.dtype), strip, dh, residual, dz, h, sums, kept.extra)()
    return Slope(dz, h, _total(sums, dh.dtype))


def _described(how: launch.Arithmetic, *kept: Tensor) -> Sequence[Tensor]:
    """Those of the kept tensors that TMA is to describe: codes are reached by pointers."""
    return () if how.code == "fp8" else kept


def dgrad(config: Config, d: Tensor, weight: Tensor, kept: Kept, rebuild: bool, bias: bool, overwrite: bool) -> Slope:
    """The delta rule from the linear above: ``chain_rule`` of dh = d W. With ``overwrite`` the kept z is used up."""
    (m, k), n, how, tile = d.shape, weight.shape[1], launch.arithmetic(config, d.dtype), None
    if not _is_identity(config):
        described = _described(how, _main(kept))
        tile = tile_for("dgrad", config, (m, n, k), d, weight, *described, code=how.code)
    if tile is None:
        dh = d.mm(weight)
        return chain_rule(config, dh, kept, rebuild, bias, over=dh)
    residual = _main(kept)
    dz = residual if overwrite else new((m, n), d)
    h = new((m, n), d) if rebuild else None
    sums = new((-(-m // tile.block_m), n), d, torch.float32) if bias else None
    launch.dgrad(how, tile, device_of(d.device).processors, d, weight, residual, dz, h, sums, kept.extra)()
    return Slope(dz, h, _total(sums, d.dtype))


def gated_chain_rule(
    config: Config, dh: Tensor, gate: Kept, up: Kept, wanted: Sequence[bool], biases: Sequence[bool],
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
        up = Kept(None)
    scales = (gate.extra, up.extra)
    launch.gated_chain_rule(how, strip, dh, _main(gate), up.main, dgate, dup, h, sums[0], sums[1], *scales)()
    return GatedSlope(dgate, dup, h, *(_total(s, dh.dtype) for s in sums))


def gated_dgrad(
    config: Config, d: Tensor, weight: Tensor, gate: Kept, up: Kept, wanted: Sequence[bool],
    biases: Sequence[bool], rebuild: bool, overwrite: bool,
) -> GatedSlope:  # fmt: skip
    """``gated_chain_rule`` of dh = d W, W the linear above. With ``overwrite`` gate and up are used up."""
    (m, k), n, how = d.shape, weight.shape[1], launch.arithmetic(config, d.dtype)
    g, u, tile = _main(gate), up.main, None
    if u is not None and all(wanted):
        described = _described(how, g, u)
        tile = tile_for("gated_dgrad", config, (m, n, k), d, weight, *described, code=how.code)
    if tile is None or u is None:
        dh = d.mm(weight)
        over = g if overwrite else None
        return gated_chain_rule(config, dh, gate, up, wanted, biases, rebuild, over_gate=over, over_up=dh)
    dgate, dup = (g, u) if overwrite else (new((m, n), d), new((m, n), d))
    h = new((m, n), d) if rebuild else None
    sums = [new((-(-m // tile.block_m), n), d, torch.float32) if bias else None for bias in biases]
    scales, processors = (gate.extra, up.extra), device_of(d.device).processors
    launch.gated_dgrad(how, tile, processors, d, weight, g, u, dgate, dup, h, sums[0], sums[1], *scales)()
    return GatedSlope(dgate, dup, h, *(_total(s, d.dtype) for s in sums))


def value(config: Config, dtype: torch.dtype, gate: Kept, up: Kept | None = None) -> Tensor:
    """f(z) with z, or its e4m3, in ``gate``, or f(g) · u; contiguous matrices."""
    how, z = launch.arithmetic(config, dtype), _main(gate)
    y = new(z.shape, z, dtype)
    if not how.code:
        launch.activation(how, z, None if up is None else _main(up), y)()
        return y
    strip = configs.strip(z.shape[0], z.shape[1], y.itemsize, device_of(z.device).processors)
    if up is None:
        launch.chain_rule(how, strip, None, z, None, y, None, gate.extra)()
    else:
        scales = (gate.extra, up.extra)
        launch.gated_chain_rule(how, strip, None, z, _main(up), None, None, y, None, None, *scales)()
    return y
