"""The Triton products, by pointers, by TMA and ping-pong, from their PTX: one launch against float64.

Imported where Triton compiles (``compiled.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from ptxsim import Schedule
from support import OTHER_PARAMS
from torch import Tensor

from emulated import triton_reference as reference
from emulated.jobs import Job, Verdict, judged
from emulated.triton_drawn import Drawn
from emulated.triton_run import FAMILIES, execute
from fastbp.activations import ROWS, Bound, bind
from fastbp.backends.triton import configs, launch
from fastbp.backends.triton.configs import Tile
from fastbp.problem import configure


@dataclass(frozen=True)
class Case:
    """One product; ``tile`` is its number in ``configs.tiles``."""

    kind: str
    family: str
    tile: int
    m: int
    n: int
    k: int
    activation: str = "gelu"
    params: tuple[float, ...] = ()
    dtype: str = "bfloat16"
    programs: int = 2
    bias: bool = True
    keep: bool = True  # forward stores z; dgrad rebuilds h and sums columns
    overwrite: bool = False  # dgrad writes dz over what was kept
    transposed: bool = False  # operands whose columns are not adjacent
    policy: str = "preact"

    @property
    def shape(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    def __str__(self) -> str:
        traits = [t for t in ("keep", "bias", "overwrite", "transposed") if getattr(self, t)]
        words = [self.kind, self.family, self.found.name, self.shape, self.bound]
        return " ".join(map(str, [*words, self.dtype, self.policy, f"{self.programs} programs", *traits]))

    @property
    def bound(self) -> Bound:
        return bind(self.activation, self.params or None)

    @property
    def found(self) -> Tile:
        return configs.tiles(self.kind, self.family)[self.tile]


class Operands(Drawn):
    """Operands as the case says: with columns that are not adjacent."""

    def numbers(self, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = self.normal(*shape, scale=scale)
        return drawn.mT.contiguous().mT if self.case.transposed and drawn.dim() > 1 else drawn


def run(case: Case, seed: int, change: Callable[[str], str] | None = None) -> Verdict:
    """The verdict on a case under one schedule."""
    return judged(_run, case, Schedule.of(seed), seed, change)


def _run(case: Case, schedule: Schedule, seed: int, change: Callable[[str], str] | None) -> Verdict:
    drawn = Operands(case, seed)
    config = configure("linear_act", case.activation, case.bound.params, case.policy, "triton")
    how = launch.arithmetic(config, drawn.dtype)
    f = reference.function(case.bound)
    parts = {"forward": _forward, "gated_forward": _gated_forward, "dgrad": _dgrad, "gated_dgrad": _gated_dgrad}
    made, errors = parts[case.kind](case, how, f, drawn)
    result = execute(made, case.family, schedule, change, str(case))
    return Verdict.of(case, errors(), result.instructions)


Parts = tuple[launch.Launch, Callable[[], Iterator[tuple[str, float]]]]


def _forward(case: Case, how: launch.Arithmetic, f: Any, drawn: Operands) -> Parts:
    x, w = drawn.numbers(case.m, case.k), drawn.numbers(case.n, case.k, scale=case.k**-0.5)
    b = drawn.normal(case.n) if case.bias else None
    y, z = drawn.space(case.m, case.n), drawn.space(case.m, case.n) if case.keep else None

    def errors() -> Iterator[tuple[str, float]]:
        wanted, spare = reference.products(x, w, b)
        if z is None:
            yield "y", reference.value_of_unknown(y, f, wanted, spare)
        else:
            yield "z", reference.rounded_once(z, wanted, spare)
            yield "y", reference.value(y, f, z)

    return launch.forward(how, case.found, case.programs, x, w, b, y, z), errors


def _gated_forward(case: Case, how: launch.Arithmetic, f: Any, drawn: Operands) -> Parts:
    x, ws = drawn.numbers(case.m, case.k), [drawn.numbers(case.n, case.k, scale=case.k**-0.5) for _ in range(2)]
    bs = [drawn.normal(case.n) if case.bias else None for _ in range(2)]
    y, g, u = (drawn.space(case.m, case.n) for _ in range(3))

    def errors() -> Iterator[tuple[str, float]]:
        for name, found, w, b in zip("gu", (g, u), ws, bs, strict=True):
            yield name, reference.rounded_once(found, *reference.products(x, w, b))
        yield "y", reference.value(y, f, g, u.double())

    return launch.gated_forward(how, case.found, case.programs, x, ws, bs, y, g, u), errors


def _upper(case: Case, drawn: Operands) -> tuple[Tensor, Tensor]:
    """dz of the layer above, and its weight."""
    return drawn.numbers(case.m, case.k), drawn.numbers(case.k, case.n, scale=case.k**-0.5)


def _spared(dh: Tensor, spare: Tensor, dtype: torch.dtype) -> Tensor:
    """What dh may be off by."""
    return spare + 2 * reference.half_unit(dh, dtype) if dtype == torch.float16 else spare


def _dgrad(case: Case, how: launch.Arithmetic, f: Any, drawn: Operands) -> Parts:
    (d, w), z = _upper(case, drawn), drawn.normal(case.m, case.n)
    before, rows = z.clone(), case.found.block_m
    dz, h = z if case.overwrite else drawn.space(case.m, case.n), drawn.space(case.m, case.n) if case.keep else None
    sums = drawn.space(-(-case.m // rows), case.n, dtype=torch.float32) if case.keep else None

    def errors() -> Iterator[tuple[str, float]]:
        dh, spare = reference.products(d, w.mT)
        spare = _spared(dh, spare, drawn.dtype)
        dh = reference.narrowed(dh, drawn.dtype)
        wanted = reference.slope(f, before, dh)
        spare = reference.slope_spare(dh, f, before, drawn.dtype) + 1.2 * spare
        yield "dz", reference.rounded_once(dz, wanted, spare)
        if h is not None and sums is not None:
            yield "h", reference.value(h, f, before)
            yield "sums", reference.column_sums(sums, wanted, rows, spare)

    return launch.dgrad(how, case.found, case.programs, d, w, z, dz, h, sums), errors


def _gated_dgrad(case: Case, how: launch.Arithmetic, f: Any, drawn: Operands) -> Parts:
    (d, w), kept = _upper(case, drawn), [drawn.normal(case.m, case.n) for _ in range(2)]
    g, u = (t.double() for t in kept)
    dg, du = kept if case.overwrite else [drawn.space(case.m, case.n) for _ in range(2)]
    h, rows = drawn.space(case.m, case.n) if case.keep else None, case.found.block_m
    shape = -(-case.m // rows), case.n
    sums = [drawn.space(*shape, dtype=torch.float32) if case.keep else None for _ in range(2)]

    def errors() -> Iterator[tuple[str, float]]:
        dh, spare = reference.products(d, w.mT)
        spare = _spared(dh, spare, drawn.dtype)
        dh = reference.narrowed(dh, drawn.dtype)
        value = f(g)
        dy = reference.narrowed(dh * u, drawn.dtype)
        lost = reference.slope_spare(dy, f, g, drawn.dtype) + 1.2 * _spared(dy, spare * u.abs(), drawn.dtype)
        pairs = [(dg, reference.slope(f, g, dy), lost)]
        pairs.append((du, dh * value, spare * value.abs() + reference.lost(dh * value, g, dh, drawn.dtype)))
        for name, (found, wanted, off), total in zip(("dg", "du"), pairs, sums, strict=True):
            yield name, reference.rounded_once(found, wanted, off)
            if total is not None:
                yield f"sums of {name}", reference.column_sums(total, wanted, rows, off)
        if h is not None:
            yield "h", reference.value(h, f, g, u)

    made = launch.gated_dgrad(how, case.found, case.programs, d, w, kept[0], kept[1], dg, du, h, *sums)
    return made, errors


# m, n, k and programs: one tile, fewer tiles than programs, several tiles for each, edges in every size.
SHAPES = [
    (128, 256, 64, 2), (1, 8, 8, 1), (37, 24, 200, 4), (300, 200, 328, 1), (256, 264, 448, 2), (390, 520, 72, 3),
    (129, 136, 640, 1),
]  # fmt: skip
ODD = [(130, 77, 41, 2), (65, 129, 333, 2), (1, 1, 1, 1), (200, 130, 96, 3)]  # whose rows do not begin at 16 bytes


def campaign() -> Iterator[Job]:
    """Every activation with every kind and family, and every tile with every shape, in both dtypes."""
    for kind, family in product(configs.KINDS, FAMILIES):
        for number, tile in enumerate(configs.tiles(kind, family)):
            shapes = SHAPES if tile.tma else SHAPES + ODD
            for i, (m, n, k, programs) in enumerate(shapes):
                for dtype in ("bfloat16", "float16") if i % 3 == number % 3 else ("bfloat16",):
                    traits = dict(
                        keep=i % 3 != 1, bias=i % 2 == 0, overwrite=i % 2 == 1, transposed=(m, n, k) in ODD[:2]
                    )
                    yield job(Case(kind, family, number, m, n, k, dtype=dtype, programs=programs, **traits))
        smallest = len(FAMILY_TILES[kind, family]) - 1
        for name in ROWS:
            for params in ((), *OTHER_PARAMS.get(name, ())):
                if kind != "dgrad" or ROWS[name].grad_reads_output:  # identity: its dz is dh, and no kernel runs
                    yield job(Case(kind, family, smallest, 150, 136, 104, name, params))


FAMILY_TILES = {(kind, family): configs.FAMILIES[family][kind] for kind in configs.KINDS for family in FAMILIES}


def job(case: Case, share: float = 0.25) -> Job:
    return Job.of(f"{'ping-pong' if case.found.pingpong else 'triton'} {case.kind}", case, run, share)
