"""Measuring the candidates for one product of ours on this machine, each checked before it is timed.

The candidates are PyTorch's own product with one elementwise kernel, and every tile that is shipped for the
architecture. A candidate that is not as good as PyTorch's, or does not run, is named with its reason and left out, so a
kernel that nobody has proven on this GPU may be tried. ``tuning.remember`` makes the fastest what calls take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbp.activations import bind
from fastbp.backends.triton import choice, configs, interpreting, launch, layers, tuning
from fastbp.backends.triton.configs import Tile
from fastbp.backends.triton.layers import Kept
from fastbp.problem import Config, configure

Clock = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]  # milliseconds of each, taken in turn
FORMS = dict(zip(configs.KINDS, ("linear_act", "gated_linear_act", "mlp", "gated_mlp"), strict=True))


class Outcome(NamedTuple):
    """What became of the candidates of one product."""

    milliseconds: dict[str, float]  # by the tile's name, or ``library``
    errors: dict[str, float]  # the largest relative RMS error against float64
    refused: dict[str, str]  # why a candidate was not timed

    @property
    def fastest(self) -> str:
        return min(self.milliseconds, key=self.milliseconds.__getitem__)


def candidates(kind: str, device: torch.device, pingpong: bool = False) -> dict[str, Tile | None]:
    """Every way to compute a product on this device, by name; None is PyTorch's own.

    The ping-pong kernel only where it is asked for: its warps wait for each other, and until it has run on a GPU nobody
    knows that none waits for ever, which no check can catch. The interpreter does not know Gluon.
    """
    tiles = configs.tiles(kind, choice.device_of(device).family)
    usable = [tile for tile in tiles if not tile.pingpong or (pingpong and not interpreting())]
    return {tuning.LIBRARY: None} | {tile.name: tile for tile in usable}


def tune(
    kind: str, activation: str, dtype: torch.dtype, sizes: tuple[int, int, int], device: torch.device, clock: Clock,
    remember: bool = True, pingpong: bool = False,
) -> Outcome:  # fmt: skip
    """Check, then time the candidates for ``kind`` (``configs.KINDS``) with sizes (m, n, k); 16-bit dtypes.

    Training is what is measured: forward keeps z, dgrad rebuilds h and adds up the bias gradient. ``clock`` takes
    functions and gives the milliseconds of each. With ``remember`` calls of these sizes take the fastest from now on.
    """
    config = configure(FORMS[kind], activation, bind(activation).params, "preact", "triton")
    product = _product(kind, config, dtype, sizes, device)
    exact = [
        t for t in _product(kind, config, torch.float64, sizes, device, like=product.operands).run() if t is not None
    ]
    steps: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    described = launch.describable(*(t for t in product.operands if t.dim() == 2)) and sizes[1] % 8 == 0
    for name, tile in candidates(kind, device, pingpong).items():
        if tile is not None and tile.tma and not described:
            refused[name] = "TMA cannot describe matrices of these sizes: rows do not begin at 16 bytes"
            continue
        step = _under(tile, product.run)
        try:
            found = [t for t in step() if t is not None]
        except Exception as error:  # whatever a compiler or a driver says of a kernel
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        errors[name] = max(map(_error, found, exact))
        allowed = 2 * errors.get(tuning.LIBRARY, 0.0) + torch.finfo(dtype).eps
        if errors[name] <= allowed:
            steps[name] = step
        else:
            refused[name] = f"error {errors[name]:.3g} against float64, where {allowed:.3g} is allowed"
    times = dict(clock(steps))
    if remember and times:
        tuning.remember(device, tuning.key(kind, activation, dtype, sizes), times)
    return Outcome(times, errors, refused)


def _under(tile: Tile | None, run: Callable[[], Sequence[Tensor | None]]) -> Callable[[], Sequence[Tensor | None]]:
    route = "library" if tile is None else "fused"

    def step() -> Sequence[Tensor | None]:
        with choice.forced(route, tile):
            return run()

    return step


class _Product(NamedTuple):
    operands: list[Tensor]
    run: Callable[[], Sequence[Tensor | None]]


def _product(
    kind: str, config: Config, dtype: torch.dtype, sizes: tuple[int, int, int], device: torch.device,
    like: list[Tensor] | None = None,
) -> _Product:  # fmt: skip
    """The call that is measured, on random matrices, or on those of ``like`` in another dtype."""
    m, n, k = sizes
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    gated, dgrad = kind.startswith("gated"), kind.endswith("dgrad")
    width = 2 if gated else 1
    if like is None:
        a = draw(m, k)
        weights = [draw(k, n, scale=k**-0.5) for _ in range(1 if dgrad else width)]
        if not dgrad:
            weights = [w.mT.contiguous() for w in weights]
        operands = [a, *weights, *(draw(m, n) if dgrad else draw(n) for _ in range(width))]
    else:
        operands = [t.to(dtype) for t in like]
    first = operands[0]
    rest: list[Any] = operands[1:]
    if kind == "forward":
        return _Product(operands, lambda: layers.forward(config, first, rest[0], rest[1], keep=True))
    if kind == "gated_forward":
        return _Product(operands, lambda: layers.gated_forward(config, first, rest[:2], rest[2:], keep=True))
    if kind == "dgrad":
        return _Product(operands, lambda: tuple(layers.dgrad(config, first, rest[0], Kept(rest[1]), True, True, False)))

    def gated_dgrad() -> Sequence[Tensor | None]:
        both = (True, True)
        gate, up = map(Kept, rest[1:3])
        return tuple(layers.gated_dgrad(config, first, rest[0], gate, up, both, both, True, False))

    return _Product(operands, gated_dgrad)


def _error(found: Tensor, exact: Tensor) -> float:
    """The RMS error over the RMS value; infinite where a NaN is."""
    error = ((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()
    return error if error == error else float("inf")
