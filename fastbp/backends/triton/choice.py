"""Which way a call is computed, and with which tile: measured, else proven and promising, else PyTorch's own product.

Three routes. ``eager``: PyTorch's operations throughout, where a call is so small that the time is the host's.
``library``: PyTorch's products and one elementwise kernel of ours each way. ``fused``: products of ours with the
elementwise work in the epilogue, one by one where they serve (bfloat16, float16) and pay.

Nothing is ever measured in a call: ``tuning`` does that, on request, and remembers it; here it is looked up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastbp.backends.triton import configs, tuning
from fastbp.backends.triton.configs import Tile
from fastbp.backends.triton.launch import describable
from fastbp.problem import Config

ROUTES = ("eager", "library", "fused")
# Numbers of the widest hidden layer below which PyTorch serves: a step of a layer then takes a GPU less than about 0.1
# ms, and the host sets the pace, to which a launch of Triton's costs more than one of PyTorch's. By arithmetic, and not
# yet measured; what was measured of single products changes nothing below it.
SMALL = 1 << 22

# (family, product) of the fused kernels that were run and found right on that architecture: docs/gpu-status.md.
# An unmeasured call takes no others.
PROVEN: frozenset[tuple[str, str]] = frozenset()


class _Forced(NamedTuple):
    route: str
    tile: Tile | None


def _check_route(route: str, where: str) -> str:
    if route not in ROUTES:
        raise ValueError(f"{where}: unknown route {route!r}; there are {', '.join(ROUTES)}")
    return route


_named = os.environ.get("FASTBP_TRITON_ROUTE")  # for experiments: every call takes this route where it can
_forced = _Forced(_check_route(_named, "FASTBP_TRITON_ROUTE"), None) if _named else None


@contextmanager
def forced(route: str, tile: Tile | None = None) -> Iterator[None]:
    """Every call takes this route where it can, and every fused product this tile. For tests and measurements."""
    global _forced
    before, _forced = _forced, _Forced(_check_route(route, "forced"), tile)
    try:
        yield
    finally:
        _forced = before


class Device(NamedTuple):
    """What the choice depends on."""

    family: str
    processors: int


@lru_cache(maxsize=64)
def device_of(device: torch.device) -> Device:
    """The family and the multiprocessors of a GPU; of the interpreter, made up and small."""
    if device.type != "cuda":
        return Device("sm_90", 4)
    properties = torch.cuda.get_device_properties(device)
    return Device(configs.family_of((properties.major, properties.minor)), properties.multi_processor_count)


def stays_eager(config: Config, numbers: int) -> bool:
    """Whether a call whose widest hidden layer has so many numbers is left to PyTorch altogether."""
    if _forced:
        return _forced.route == "eager"
    return not config.route and numbers < SMALL


def tile_for(kind: str, config: Config, sizes: tuple[int, int, int], *operands: Tensor, code: str = "") -> Tile | None:
    """The tile with which a product (m, n, k) runs as a kernel of ours, or None for PyTorch's and a pass of its own.

    ``operands`` are the matrices it reads. What TMA cannot describe (rows that do not begin at 16 bytes, columns that
    are not adjacent) is read by pointers. ``code`` is what a compressed policy keeps (codes.py).
    """
    tile = _tile_for(kind, config, sizes, operands, bool(code))
    return configs.for_code(tile, kind, code) if code and tile is not None else tile


def _tile_for(
    kind: str, config: Config, sizes: tuple[int, int, int], operands: Sequence[Tensor], compressed: bool
) -> Tile | None:
    """What was measured counts for every policy, for what is kept is a small part of a product.

    But the ping-pong kernel knows no codes. Where it was the fastest, a compressed policy takes what an unmeasured call
    would.
    """
    dtype, device = operands[0].dtype, operands[0].device
    if dtype.itemsize != 2:
        return None
    m, n, k = sizes
    described = describable(*operands) and n * dtype.itemsize % 16 == 0
    family, processors = device_of(device)
    if _forced:
        if _forced.route != "fused":
            return None
        forced_tile = _forced.tile
        if forced_tile is None or (compressed and forced_tile.pingpong):
            forced_tile = configs.rule(kind, family, m, n, processors) if described else configs.ODD
        return forced_tile if described else replace(forced_tile, tma=False)
    if config.route == "library":
        return None
    found = tuning.recall(device, kind, config.row.name, dtype, sizes)
    if found is not None and not (compressed and found.tile is not None and found.tile.pingpong):
        return found.tile if described or found.tile is None or not found.tile.tma else None
    if (family, kind) in PROVEN and described and configs.worthwhile(kind, m, n, k, family, processors):
        return configs.rule(kind, family, m, n, processors)
    return None
