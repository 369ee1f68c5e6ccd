"""The Triton kernels of the compressed policies from their PTX: what is kept, byte for byte as fastbp/compression.py
has it, and the chain rules from it.

The operands of products are small multiples of a power of two, so that float32 and 16 bits hold every z and dh exactly,
and the codes of z are known to the byte. Imported where Triton compiles (``compiled.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, cycle, product
from typing import Any

import torch
from ptxsim import Schedule
from torch import Tensor

from emulated import reference as ref
from emulated import triton_reference as reference
from emulated.jobs import Job, Verdict, judged
from emulated.triton_drawn import Drawn
from emulated.triton_run import FAMILIES, execute
from fastbp.activations import ROWS, bind
from fastbp.backends.triton import configs, launch
from fastbp.backends.triton.configs import Tile
from fastbp.backends.triton.launch import Launch
from fastbp.compression import BLOCK, DTYPES
from fastbp.problem import configure

ELEMENTWISE = ("compress", "gated_compress", "chain_rule", "gated_chain_rule")
PROCESSORS = 2
Errors = Iterator[tuple[str, float]]
Parts = tuple[Launch, Callable[[], Errors]]


@dataclass(frozen=True)
class Case:
    """One launch: elementwise, or a product of k with a tile, by its number in ``configs.tiles``."""

    kernel: str
    family: str
    m: int
    n: int
    k: int = 0
    tile: int = 0
    activation: str = "gelu"
    dtype: str = "bfloat16"
    policy: str = "fp8"
    programs: int = 2

    @property
    def shape(self) -> str:
        return f"{self.m}x{self.n}" + (f"x{self.k}" if self.k else "")

    @property
    def found(self) -> Tile | None:
        """The tile as this policy takes it; None where its kernel knows no codes."""
        return configs.for_code(
            configs.tiles(self.kernel, self.family)[self.tile], self.kernel, launch.CODES[self.policy]
        )

    @property
    def gated(self) -> bool:
        return self.kernel.startswith("gated")

    def __str__(self) -> str:
        words = [self.kernel, self.family, self.shape, self.activation, self.dtype, self.policy]
        if self.k:
            assert self.found is not None
            words += [self.found.name, f"{self.programs} programs"]
        return " ".join(words)


class Operands(Drawn):
    """Of a case, and its activation."""

    def __init__(self, case: Case, seed: int):
        super().__init__(case, seed)
        self.activation = bind(case.activation)

    def numbers(self) -> Tensor:
        """z, g or u: blocks of different sizes, and for codes numbers that are not finite."""
        m, n = self.case.m, self.case.n
        drawn = torch.randn(m, n, generator=self.generator, dtype=torch.float64) * 2
        sizes = torch.randint(-4, 3, (m, -(-n // BLOCK)), generator=self.generator)
        drawn = (drawn * 2.0 ** sizes.repeat_interleave(BLOCK, 1)[:, :n]).to(self.dtype)
        if self.case.policy == "fp8" and "compress" in self.case.kernel:
            drawn.view(-1)[::37], drawn.view(-1)[5::41], drawn.view(-1)[7::43] = math.inf, math.nan, 0.0
        return drawn

    def small(self, *shape: int, unit: float = 1.0) -> Tensor:
        """-1, 0 and 1 times a unit."""
        return (torch.randint(-1, 2, shape, generator=self.generator) * unit).to(self.dtype)

    def codes(self) -> tuple[Tensor | None, Tensor | None]:
        """Memory for what forward keeps of a matrix, and for what lies beside it."""
        m, n, policy = self.case.m, self.case.n, self.case.policy
        if policy == "output_lsb":
            return None, None
        if policy == "output_bits":
            return torch.full((m, -(-n // 2)), 255, dtype=torch.uint8), None
        return tuple(torch.full((m, size), 255, dtype=torch.uint8) for size in (n, -(-n // BLOCK)))  # type: ignore[return-value]


def run(case: Case, seed: int) -> Verdict:
    """The verdict on a case under one schedule."""
    return judged(_run, case, seed)


def _run(case: Case, seed: int) -> Verdict:
    drawn = Operands(case, seed)
    config = configure("linear_act", case.activation, drawn.activation.params, case.policy, "triton")
    how = launch.arithmetic(config, drawn.dtype)
    backward = case.kernel.endswith(("chain_rule", "dgrad"))
    made, errors = (_backward if backward else _forward)(case, how, drawn)
    result = execute(made, case.family, Schedule.of(seed), None, str(case))
    return Verdict.of(case, errors(), result.instructions)


def _forward(case: Case, how: launch.Arithmetic, drawn: Operands) -> Parts:
    y, kept = drawn.space(case.m, case.n), [drawn.codes() for _ in range(1 + case.gated)]
    if case.k:
        assert case.found is not None
        x, sixteenth = drawn.small(case.m, case.k), 2.0**-4
        weights = [drawn.small(case.n, case.k, unit=sixteenth) for _ in kept]
        biases = [drawn.small(case.n, unit=sixteenth) for _ in kept]
        parts = [_exactly(x.double() @ w.double().mT + b.double(), drawn) for w, b in zip(weights, biases, strict=True)]
        if case.gated:
            (gate, gate_scales), (up, up_scales) = kept
            made = launch.gated_forward(
                how, case.found, case.programs, x, weights, biases, y, gate, up, gate_scales, up_scales
            )
        else:
            made = launch.forward(how, case.found, case.programs, x, weights[0], biases[0], y, *kept[0])
    else:
        parts = [drawn.numbers() for _ in kept]
        up = parts[1] if case.gated else None
        made = launch.compress(how, _strip(case, drawn), parts[0], up, y, *(t for pair in kept for t in pair))

    def errors() -> Errors:
        yield "y", _value(case, drawn, y, parts)
        for part, (codes, beside) in zip(parts, kept, strict=True):
            if case.policy == "fp8":
                wanted = ref.compression.encode_fp8(part)
                assert codes is not None and beside is not None
                yield "codes", ref.same_bytes(codes.numpy(), wanted[0])
                yield "scales", ref.same_bytes(beside.numpy(), wanted[1])
            elif case.policy == "output_bits":
                assert codes is not None
                yield "bits", _bits(codes, part, y, drawn)
            else:
                yield "marks", ref.marks_error(y, part, drawn.activation.row.minimum_at)  # type: ignore[arg-type]

    return made, errors


def _exactly(z: Tensor, drawn: Operands) -> Tensor:
    narrow = z.to(drawn.dtype)
    assert torch.equal(narrow.double(), z), "the operands are to give a z that the dtype holds"
    return narrow


def _value(case: Case, drawn: Operands, y: Tensor, parts: list[Tensor]) -> float:
    """Of y, which with a mark in its lowest bit may be off by one unit more."""
    fine = torch.stack([part.isfinite() for part in parts]).all(0)
    z, factor = parts[0].where(fine, 0), parts[1].where(fine, 0).double() if case.gated else 1.0
    f = reference.function(drawn.activation)
    wanted = f(z.double()) * factor
    spare = reference.lost(wanted, z, factor, y.dtype)
    if case.policy == "output_lsb":
        near = wanted.abs() * (1 + 2 * torch.finfo(y.dtype).eps)  # whose unit may be that of the next binade
        spare = spare + 2 * reference.half_unit(near, y.dtype)
    return reference.rounded_once(y.where(fine, wanted.to(y.dtype)), wanted, spare)


def _bits(codes: Tensor, z: Tensor, y: Tensor, drawn: Operands) -> float:
    """Sides must be right, and the next bits of y, of which there are three, off by one and what arithmetic loses."""
    f, at = reference.function(drawn.activation), drawn.activation.row.minimum_at
    assert at is not None
    wide = f(z.double())
    wanted = ref.compression.encode_bits(z, wide.float(), y, at)
    if ((wanted ^ codes) & 0x88).any():
        return math.inf
    steps = torch.stack([(wanted >> s & 7).int() - (codes >> s & 7).int() for s in (0, 4)], -1).abs().flatten(-2)
    if y.dtype == torch.float32:
        return math.inf if steps.any() else 0.0
    eighth = reference.half_unit(y, y.dtype) / 4
    allowed = 1.0 + torch.ceil(reference.lost(wide, z, 1.0, y.dtype) / eighth)
    return float((steps / torch.nn.functional.pad(allowed, (0, -allowed.shape[-1] % 2), value=8.0)).max())


def _backward(case: Case, how: launch.Arithmetic, drawn: Operands) -> Parts:
    parts = [drawn.numbers() for _ in range(1 + case.gated)]
    kept = [ref.Kept(drawn.activation, case.policy, part) for part in parts]
    results = [drawn.space(case.m, case.n) for _ in parts]
    h = drawn.space(case.m, case.n) if case.policy == "fp8" else None
    rows = case.found.block_m if case.k else _strip(case, drawn).rows  # type: ignore[union-attr]
    sums = [drawn.space(-(-case.m // rows), case.n, dtype=torch.float32) for _ in parts]
    codes, beside = [part.codes for part in kept], [part.beside for part in kept]
    if case.k:
        d, w = drawn.small(case.m, case.k), drawn.small(case.k, case.n, unit=2.0**-4)
        dh = _exactly(d.double() @ w.double(), drawn)
        head: tuple[Any, ...] = (how, case.found, case.programs, d, w)
        product_of = launch.gated_dgrad if case.gated else launch.dgrad
        made = product_of(*head, *codes, *results, h, *sums, *beside)
    else:
        dh = drawn.normal(case.m, case.n)
        rule = launch.gated_chain_rule if case.gated else launch.chain_rule
        made = rule(how, _strip(case, drawn), dh, *codes, *results, h, *sums, *beside)

    def errors() -> Errors:
        f = reference.function(drawn.activation)
        dy, wanted = dh.double(), list[tuple[Tensor, Tensor]]()
        if case.gated:
            gate, up = (part.z for part in kept)
            dg = dy * up.double()
            dg = reference.narrowed(dg, drawn.dtype) if case.k else dg.to(drawn.dtype).double()
            wanted.append((reference.slope(f, gate, dg), reference.slope_spare(dg, f, gate, drawn.dtype)))
            du = dy * f(gate.double())
            wanted.append((du, reference.lost(du, gate, dy, drawn.dtype)))
        elif case.policy == "fp8":
            z = kept[0].z
            wanted.append((reference.slope(f, z, dy), reference.slope_spare(dy, f, z, drawn.dtype)))
        else:
            dz, terms = kept[0].chain_rule(dy)
            wanted.append((dz, reference.ARITHMETIC[drawn.dtype] * terms))
        for found, total, (dz, spare) in zip(results, sums, wanted, strict=True):
            yield "dz", reference.rounded_once(found, dz, spare)
            yield "sums", reference.column_sums(total, dz, rows, spare)
        if h is not None:
            yield "h", reference.value(h, f, kept[0].z, kept[1].z.double() if case.gated else 1.0)

    return made, errors


def _strip(case: Case, drawn: Operands) -> configs.Strip:
    return configs.strip(case.m, case.n, drawn.dtype.itemsize, PROCESSORS)


SHAPES = [(9, 513), (33, 256), (5, 37), (12, 264), (1, 1), (70, 72)]
PRODUCTS = [(150, 136, 72, 1), (300, 200, 328, 2), (1, 8, 8, 1), (65, 264, 448, 3)]
ODD = (130, 77, 41, 2)  # for which there are no tensor maps


def campaign() -> Iterator[Job]:
    """Every activation, dtype and policy of the elementwise kernels, and every tile of the products with some."""
    turn, families = count(), cycle(FAMILIES)
    for kernel, dtype, name in product(ELEMENTWISE, DTYPES, ROWS):
        family = next(families)
        for policy in _policies(name, kernel.startswith("gated")):
            m, n = SHAPES[next(turn) % len(SHAPES)]
            yield job(Case(kernel, family, m, n, 0, 0, name, str(dtype).removeprefix("torch."), policy))
    names = [name for name in ROWS if ROWS[name].grad_reads_output]
    for kernel, family in product(configs.KINDS, FAMILIES):
        for number, tile in enumerate(configs.tiles(kernel, family)):
            for dtype, policy in product(("bfloat16", "float16"), ("fp8", "output_bits", "output_lsb")):
                i = next(turn)
                served = [name for name in names if policy in _policies(name, kernel.startswith("gated"))]
                shapes = PRODUCTS if tile.tma else [*PRODUCTS, ODD]
                if not served:
                    continue
                m, n, k, programs = shapes[i % len(shapes)]
                case = Case(kernel, family, m, n, k, number, served[i % len(served)], dtype, policy, programs)
                if case.found is not None:
                    yield job(case)


def _policies(name: str, gated: bool) -> list[str]:
    return [policy for policy in ref.policies_of(bind(name), gated) if policy in launch.CODES]


def job(case: Case) -> Job:
    return Job.of(f"triton {case.kernel}", case, run, 0.25 if case.k else 0.1)
