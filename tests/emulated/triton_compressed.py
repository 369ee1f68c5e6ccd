"""What the compressed policies keep and read, by the Triton kernels from their PTX: codes byte for byte.

The yardstick of the codes is ``fastbp/compression.py``; that of z is the kernel's own, where it stores z as well: the
three next bits belong to the float32 y that was rounded, which only a neighbour's rounding may change by one.
Imported where Triton compiles (``compiled.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from ptxsim import Schedule
from torch import Tensor

from emulated import triton_reference as reference
from emulated.jobs import Job, Verdict, judged
from emulated.triton_run import FAMILIES, execute
from fastbp import compression, side_formulas
from fastbp.activations import ROWS, bind
from fastbp.backends.triton import configs, launch
from fastbp.backends.triton.launch import Launch
from fastbp.problem import configure

KERNELS = ("compress", "gated_compress", "chain_rule", "forward", "dgrad")
PROCESSORS = 2


@dataclass(frozen=True)
class Case:
    """One launch; ``tile`` is a number in ``configs.tiles`` for the products."""

    kernel: str
    family: str
    save: str
    m: int
    n: int
    activation: str = "gelu"
    dtype: str = "bfloat16"
    tile: int = 0
    k: int = 72

    @property
    def shape(self) -> str:
        return f"{self.m}x{self.n}" + (f"x{self.k}" if self.kernel in configs.KINDS else "")

    def __str__(self) -> str:
        tile = f" tile {self.tile}" if self.kernel in configs.KINDS else ""
        return f"{self.kernel} {self.family}{tile} {self.shape} {self.activation} {self.dtype} {self.save}"


Errors = Iterator[tuple[str, float]]
Parts = tuple[Launch, Callable[[], Errors]]


def run(case: Case, seed: int, change: Callable[[str], str] | None = None) -> Verdict:
    """The verdict on a case under one schedule."""
    return judged(_run, case, seed, change)


def _run(case: Case, seed: int, change: Callable[[str], str] | None) -> Verdict:
    generator, dtype = torch.Generator().manual_seed(seed), getattr(torch, case.dtype)
    config = configure("linear_act", case.activation, bind(case.activation).params, case.save, "triton")

    def numbers(*shape: int, scale: float = 2.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    parts = {
        "compress": _compress, "gated_compress": _compress, "chain_rule": _chain_rule, "forward": _forward,
        "dgrad": _dgrad,
    }  # fmt: skip
    made, errors = parts[case.kernel](case, launch.arithmetic(config, dtype), numbers, dtype)
    result = execute(made, case.family, Schedule.of(seed), change, str(case))
    return reference.verdict(case, errors(), result)


def _equal(found: Tensor, wanted: Tensor) -> float:
    return float("inf") if found.shape != wanted.shape or not torch.equal(found, wanted) else 0.0


def _space(case: Case, save: str, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """For bits, or e4m3 and scales; 0xAA where nothing was written."""
    columns = {"output_bits": -(-case.n // 2), "fp8": case.n}.get(save)
    scales = torch.full((case.m, -(-case.n // compression.BLOCK)), 0xAA, dtype=torch.uint8) if save == "fp8" else None
    return None if columns is None else torch.full((case.m, columns), 0xAA, dtype=torch.uint8), scales


def _kept_errors(case: Case, z: Tensor, y: Tensor, kept: Tensor | None, scales: Tensor | None) -> Errors:
    """Of what was kept of a z that is known, and of y beside it."""
    row, f = ROWS[case.activation], reference.function(bind(case.activation))
    if case.save == "fp8":
        codes, wanted = compression.encode_fp8(z)
        nan = (codes & 127) == 127  # of which the sign is anybody's
        assert kept is not None and scales is not None
        yield "scales", _equal(scales, wanted)
        yield "codes", _equal(torch.where(nan, kept & 127, kept), torch.where(nan, codes & 127, codes))
        return
    assert row.minimum_at is not None
    right = z.float() >= row.minimum_at
    wide = f(z.double())
    if case.save == "output_bits":
        assert kept is not None
        bits = compression.encode_bits(z, wide.float(), y, row.minimum_at)
        yield "sides and padding", _equal(kept & 0x88, bits & 0x88)
        steps = (_halves(kept, case.n) - _halves(bits, case.n)).abs() * (z >= -5)  # the tail of GELU has no such bits
        # What the arithmetic is off by, in eighths of a unit: of bfloat16 a tenth, of float16 nearly one.
        yield "next bits", float(steps.max()) / (1 if y.dtype == torch.bfloat16 else 2)
        yield "y", reference.value(y, f, z)
        return
    whole = y.view(torch.int16 if y.itemsize == 2 else torch.int32)
    marks = torch.where(y < 0, (whole & 1).bool() == right, y.signbit() == ~right)
    yield "marks", 0.0 if marks.all() else float("inf")
    lost = reference.lost(wide, z, 1.0, y.dtype) + 3 * reference.half_unit(
        1.01 * wide, y.dtype
    )  # the lowest bit is the mark
    yield "y", reference.error(y, wide, lost)


def _halves(codes: Tensor, columns: int) -> Tensor:
    """The next bits of each number, two of which share a byte."""
    return torch.stack([codes & 7, codes >> 4 & 7], -1).flatten(-2)[..., :columns].int()


def _compress(case: Case, how: launch.Arithmetic, numbers: Any, dtype: torch.dtype) -> Parts:
    zs = [numbers(case.m, case.n) for _ in range(2 if case.kernel.startswith("gated") else 1)]
    if case.save == "fp8":
        for z in zs:
            z.mul_(torch.exp2(torch.arange(case.m)[:, None] % 9 - 4.0))
            z.view(-1)[::37], z.view(-1)[5::41] = float("inf"), float("nan")
    y, kept = torch.full_like(zs[0], torch.nan), [_space(case, case.save, dtype) for _ in zs]
    strip = configs.strip(case.m, case.n, dtype.itemsize, PROCESSORS)
    up, matrices = (zs[1] if len(zs) > 1 else None), [t for pair in kept for t in pair]

    def errors() -> Errors:
        for i, (z, pair) in enumerate(zip(zs, kept, strict=True)):
            for name, error in _kept_errors(case, z, y, *pair):
                yield f"{name} {i}", error

    return launch.compress(how, strip, zs[0], up, y, *matrices), errors


def _encoded(case: Case, z: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """What forward keeps of z: what backward reads, what lies beside it, and both decoded."""
    row, f = ROWS[case.activation], reference.function(bind(case.activation))
    if case.save == "fp8":
        codes, scales = compression.encode_fp8(z)
        return codes, scales, (compression.decode_fp8(codes, scales, z.dtype),)
    assert row.minimum_at is not None and row.lowest is not None
    wide, least = f(z.double()).float(), compression.floor(row.lowest, z.dtype, case.save)
    y = wide.to(z.dtype)
    if case.save == "output_bits":
        bits = compression.encode_bits(z, wide, y, row.minimum_at)
        return y, bits, compression.decode_bits(y, bits, least)
    y = compression.encode_lsb(z, y, row.minimum_at)
    return y, None, compression.decode_lsb(y, least)


def _slope(case: Case, dh: Tensor, decoded: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dz from what is read back, and what may be lost of it."""
    if case.save == "fp8":
        f = reference.function(bind(case.activation))
        return reference.slope(f, decoded[0], dh), reference.slope_spare(dh, f, decoded[0], dtype)
    grad = getattr(side_formulas, f"{case.activation}_grad_from_side" + ("_16" if dtype.itemsize == 2 else ""))
    # In float64: next to the minimum the polynomials take a root of a difference, of which float32 keeps a part.
    return grad(dh.double(), *(t.double() for t in decoded)), 2e-3 * dh.abs().double()


def _chain_rule(case: Case, how: launch.Arithmetic, numbers: Any, dtype: torch.dtype) -> Parts:
    z, dh = numbers(case.m, case.n), numbers(case.m, case.n, scale=1.0)
    read, beside, decoded = _encoded(case, z)
    strip = configs.strip(case.m, case.n, dtype.itemsize, PROCESSORS)
    dz, h = torch.full_like(z, torch.nan), torch.full_like(z, torch.nan) if case.save == "fp8" else None
    sums = torch.full((strip.strips(case.m), case.n), torch.nan, dtype=torch.float32)

    def errors() -> Errors:
        wanted, spare = _slope(case, dh, decoded, dtype)
        yield "dz", reference.rounded_once(dz, wanted, spare)
        yield "sums", reference.column_sums(sums, wanted, strip.rows, spare)
        if h is not None:
            yield "h", reference.value(h, reference.function(bind(case.activation)), decoded[0])

    return launch.chain_rule(how, strip, dh, read, dz, h, sums, beside), errors


def _tile(case: Case, how: launch.Arithmetic) -> configs.Tile:
    found = configs.for_code(configs.tiles(case.kernel, case.family)[case.tile], case.kernel, how.code)
    assert found is not None
    return found


def _forward(case: Case, how: launch.Arithmetic, numbers: Any, dtype: torch.dtype) -> Parts:
    """Integers of few bits, so that z is exact, and known."""
    x, w = numbers(case.m, case.k).round(), numbers(case.n, case.k, scale=1.0).round().div(8)
    z = (x.double() @ w.double().mT).to(dtype)
    y, (kept, scales) = torch.full_like(z, torch.nan), _space(case, case.save, dtype)
    made = launch.forward(how, _tile(case, how), PROCESSORS, x, w, None, y, kept, scales)
    return made, lambda: _kept_errors(case, z, y, kept, scales)


def _dgrad(case: Case, how: launch.Arithmetic, numbers: Any, dtype: torch.dtype) -> Parts:
    d, w = numbers(case.m, case.k, scale=1.0), numbers(case.k, case.n, scale=case.k**-0.5)
    read, beside, decoded = _encoded(case, numbers(case.m, case.n))
    tile = _tile(case, how)
    dz = torch.full((case.m, case.n), torch.nan, dtype=dtype)
    sums = torch.full((-(-case.m // tile.block_m), case.n), torch.nan, dtype=torch.float32)

    def errors() -> Errors:
        dh, lost = reference.products(d, w.mT)
        lost = lost + (2 * reference.half_unit(dh, dtype) if dtype == torch.float16 else 0.0)
        wanted, spare = _slope(case, dh, decoded, dtype)
        yield "dz", reference.rounded_once(dz, wanted, spare + 1.2 * lost)
        yield "sums", reference.column_sums(sums, wanted, tile.block_m, spare + 1.2 * lost)

    return launch.dgrad(how, tile, PROCESSORS, d, w, read, dz, None, sums, beside), errors


def campaign() -> Iterator[Job]:
    """Every policy with every activation that has it, kernel, family and dtype; every tile with one activation."""
    sided = [row.name for row in ROWS.values() if row.minimum_at is not None]
    for kernel, family, save in product(KERNELS, FAMILIES, ("output_bits", "output_lsb", "fp8")):
        if kernel == "gated_compress" and save != "fp8":
            continue
        fused = kernel in configs.KINDS
        dtypes = ("bfloat16", "float16") if fused else ("bfloat16", "float16", "float32")
        for name, dtype in product(sided, dtypes):
            for m, n in ((9, 513), (33, 256), (5, 37), (130, 264)):
                if not fused or n % 8 == 0:
                    yield _job(Case(kernel, family, save, m, n, name, dtype))
        for i, tile in enumerate(configs.tiles(kernel, family) if fused else ()):
            if configs.for_code(tile, kernel, launch.CODES[save]) is not None:
                yield _job(Case(kernel, family, save, 150, 136, tile=i))


def _job(case: Case) -> Job:
    return Job(
        f"triton {case.kernel}",
        case.family,
        str(case),
        case.activation,
        case.dtype,
        case.save,
        case.shape,
        run,
        (case,),
    )
