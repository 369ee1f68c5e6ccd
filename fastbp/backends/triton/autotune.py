"""Measuring the candidates for one product of ours on this machine, each checked before it is timed.

The candidates are PyTorch's own product with one elementwise kernel, and every tile that is shipped for the
architecture. What is right is plain PyTorch in float64, and how exact a candidate must be plain PyTorch in the dtype
(``acceptance``): nothing here is its own yardstick. A candidate that is not as good, or does not run, is named with its
reason and left out, so a kernel that nobody has proven on this GPU may be tried. ``tuning.remember`` makes the fastest
what calls take.

All of it runs in the process that asks. A kernel that hangs or writes where it must not takes that process with it:
``fastbp.tune`` has one of its own for this (``fastbp/tuning/isolation.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbp.acceptance import Exact, Originals, first_line, poisoned, rows_at_a_time
from fastbp.activations import Bound, bind
from fastbp.backends.triton import choice, configs, interpreting, launch, layers, tuning
from fastbp.backends.triton.configs import Tile
from fastbp.backends.triton.layers import Kept
from fastbp.problem import Config, configure

Clock = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]  # milliseconds of each, taken in turn
Told = Callable[[str, str | None], None]  # a candidate begins; or it is refused, and why
FORMS = dict(zip(configs.KINDS, ("linear_act", "gated_linear_act", "mlp", "gated_mlp"), strict=True))
# The results of each kind, in the order in which layers.* returns them.
RESULTS = {
    "forward": ("y", "z"),
    "gated_forward": ("y", "gate", "up"),
    "dgrad": ("dz", "h", "db"),
    "gated_dgrad": ("dgate", "dup", "h", "dgate_bias", "dup_bias"),
}
SUMS = {"db": "dz", "dgate_bias": "dgate", "dup_bias": "dup"}  # over the rows, and of what


class Outcome(NamedTuple):
    """What became of the candidates of one product."""

    milliseconds: dict[str, float]  # by the tile's name, or ``library``
    errors: dict[str, float]  # of those that were timed, the largest relative RMS error against float64
    refused: dict[str, str]  # why a candidate was not timed

    @property
    def fastest(self) -> str:
        return min(self.milliseconds, key=self.milliseconds.__getitem__)


def candidates(kind: str, device: torch.device, pingpong: bool = False) -> dict[str, Tile | None]:
    """Every way to compute a product on this device, by name; None is PyTorch's own.

    The ping-pong kernel only where it is asked for: its warps wait for each other, and until it has run on a GPU nobody
    knows that none waits for ever. The interpreter does not know Gluon.
    """
    tiles = configs.tiles(kind, choice.device_of(device).family)
    usable = [tile for tile in tiles if not tile.pingpong or (pingpong and not interpreting())]
    return {tuning.LIBRARY: None} | {tile.name: tile for tile in usable}


def tune(
    kind: str, activation: str, dtype: torch.dtype, sizes: tuple[int, int, int], device: torch.device, clock: Clock,
    remember: bool = True, pingpong: bool = False, without: Collection[str] = (),
    told: Told = lambda name, refused: None,
) -> Outcome:  # fmt: skip
    """Check, then time the candidates for ``kind`` (``configs.KINDS``) with sizes (m, n, k); 16-bit dtypes.

    Training is what is measured: forward keeps z, dgrad rebuilds h and adds up the bias gradient. ``clock`` takes
    functions and gives the milliseconds of each. With ``remember`` calls of these sizes take the fastest from now on.
    ``told`` hears of each candidate before it runs, and of each that is refused; those of ``without`` take no part.
    """
    config = configure(FORMS[kind], activation, bind(activation).params, "preact", "triton")
    with layers.on(device):
        entered = {name: tile for name, tile in candidates(kind, device, pingpong).items() if name not in without}
        try:
            operands = draw(kind, dtype, sizes, device)
            exact = yardstick(kind, bind(activation), operands)
            originals = Originals(operands)
        except Exception as error:  # a lack of memory, for the most part
            return Outcome({}, {}, dict.fromkeys(entered, f"its reference in float64: {first_line(error)}"))
        steps: dict[str, Callable[[], object]] = {}
        errors: dict[str, float] = {}
        refused: dict[str, str] = {}
        described = launch.describable(*(t for t in operands if t.dim() == 2)) and sizes[1] % 8 == 0
        run = call_of(kind, config, operands)
        reason: str | None
        for name, tile in entered.items():
            told(name, None)
            step = _under(tile, run)
            if tile is not None and tile.tma and not described:
                worst, reason = 0.0, "TMA cannot describe matrices of these sizes: rows do not begin at 16 bytes"
            else:
                worst, reason = _judged(step, exact)
            reason = reason or originals.overwritten()
            if reason:
                refused[name] = reason
                told(name, reason)
            else:
                steps[name], errors[name] = step, worst
        del exact, originals
        times = dict(clock(steps)) if steps else {}
        if remember and times:
            tuning.remember(device, tuning.key(kind, activation, dtype, sizes), times)
    return Outcome(times, errors, refused)


def _judged(step: Callable[[], Sequence[Tensor | None]], exact: Sequence[Exact]) -> tuple[float, str | None]:
    """The largest error of the whole of a candidate's results, and why it is refused."""
    try:
        with poisoned():
            found = [t for t in step() if t is not None]
        reasons = [truth.refusal(t) for truth, t in zip(exact, found, strict=True)]
        worst = max(truth.errors(t).largest[0] for truth, t in zip(exact, found, strict=True))
    except Exception as error:  # whatever a compiler or a driver says of a kernel
        return float("inf"), first_line(error)
    return worst, next(filter(None, reasons), None)


def _under(tile: Tile | None, run: Callable[[], Sequence[Tensor | None]]) -> Callable[[], Sequence[Tensor | None]]:
    route = "library" if tile is None else "fused"

    def step() -> Sequence[Tensor | None]:
        with choice.forced(route, tile):
            return run()

    return step


def draw(kind: str, dtype: torch.dtype, sizes: tuple[int, int, int], device: torch.device) -> list[Tensor]:
    """What a product reads: x or d, the weights, and the biases or what was kept of each row."""
    m, n, k = sizes
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    dgrad, width = kind.endswith("dgrad"), 2 if kind.startswith("gated") else 1
    a = random(m, k)
    weights = [random(k, n, scale=k**-0.5) for _ in range(1 if dgrad else width)]
    if not dgrad:
        weights = [w.mT.contiguous() for w in weights]
    return [a, *weights, *(random(m, n) if dgrad else random(n) for _ in range(width))]


def call_of(kind: str, config: Config, operands: Sequence[Tensor]) -> Callable[[], Sequence[Tensor | None]]:
    """The call that is measured."""
    first = operands[0]
    rest: list[Any] = list(operands[1:])
    if kind == "forward":
        return lambda: layers.forward(config, first, rest[0], rest[1], keep=True)
    if kind == "gated_forward":
        return lambda: layers.gated_forward(config, first, rest[:2], rest[2:], keep=True)
    if kind == "dgrad":
        return lambda: tuple(layers.dgrad(config, first, rest[0], Kept(rest[1]), True, True, False))

    def gated_dgrad() -> Sequence[Tensor | None]:
        both = (True, True)
        gate, up = map(Kept, rest[1:3])
        return tuple(layers.gated_dgrad(config, first, rest[0], gate, up, both, both, True, False))

    return gated_dgrad


def plain(kind: str, activation: Bound, operands: Sequence[Tensor]) -> list[Tensor]:
    """The results by PyTorch's own operations and its own derivatives, in the dtype of the operands."""
    if kind == "forward":
        z = F.linear(*operands)
        return [activation(z), z]
    if kind == "gated_forward":
        x, gate_weight, up_weight, gate_bias, up_bias = operands
        gate, up = F.linear(x, gate_weight, gate_bias), F.linear(x, up_weight, up_bias)
        return [activation(gate) * up, gate, up]
    d, weight, *kept = operands
    with torch.enable_grad():
        kept = [t.detach().requires_grad_() for t in kept]
        h = activation(kept[0]) if len(kept) == 1 else activation(kept[0]) * kept[1]
        grads = torch.autograd.grad(h, kept, d.mm(weight))
    return [*grads, h.detach(), *(grad.sum(0) for grad in grads)]


def yardstick(kind: str, activation: Bound, operands: Sequence[Tensor]) -> list[Exact]:
    """What the results should be, in float64 by blocks of rows, and how far off they may be."""
    names, (m, k) = RESULTS[kind], operands[0].shape
    by_rows = [t is not operands[1] if kind.endswith("dgrad") else t is operands[0] for t in operands]
    whole = [t if rows else t.double() for t, rows in zip(operands, by_rows, strict=True)]
    own = dict(zip(names, plain(kind, activation, operands), strict=True))
    exact = {name: Exact(t, name) for name, t in own.items()}
    sums = {name: torch.zeros_like(own[name], dtype=torch.float64) for name in names if name in SUMS}
    squares = dict.fromkeys(SUMS.values(), 0.0)
    step = rows_at_a_time(max(k, own[names[0]].shape[1]))
    for start in range(0, m, step):
        part = [t[start : start + step].double() if rows else t for t, rows in zip(whole, by_rows, strict=True)]
        for name, block in zip(names, plain(kind, activation, part), strict=True):
            if name in SUMS:
                sums[name] += block
            else:
                exact[name].put(start, block)
            if name in squares:
                squares[name] += block.square().sum().item()
    for name, truth in exact.items():
        entered = 0.0
        if name in SUMS:
            truth.put(0, sums[name])
            entered = (squares[SUMS[name]] / sums[name].numel()) ** 0.5
        truth.allow(own[name], entered=entered)
    return list(exact.values())
