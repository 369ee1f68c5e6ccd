"""The Triton elementwise kernels from their PTX: random matrices of any size, and all numbers of 16 bits.

Imported where Triton compiles (``compiled.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import cycle, product
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
from fastbp.backends.triton.launch import Launch
from fastbp.problem import DTYPES, configure

KERNELS = ("activation", "gated_activation", "chain_rule", "gated_chain_rule", "column_sum")
PROCESSORS = 2  # so that a few strips share a column, and a strip has several blocks of rows
Errors = Iterator[tuple[str, float]]
Parts = tuple[Launch, Callable[[], Errors]]


@dataclass(frozen=True)
class Case:
    """One launch."""

    kernel: str
    family: str
    m: int
    n: int
    activation: str = "gelu"
    params: tuple[float, ...] = ()
    dtype: str = "bfloat16"
    policy: str = "preact"  # or output
    overwrite: bool = False  # results are written over operands
    transposed: bool = False  # the gradient's columns are not adjacent
    less: bool = False  # the optional results are not asked for
    skew: int = 0  # numbers by which matrices miss the alignment of 16 bytes

    @property
    def bound(self) -> Bound:
        return bind(self.activation, self.params or None)

    @property
    def shape(self) -> str:
        return f"{self.m}x{self.n}"

    def __str__(self) -> str:
        traits = [f.name for f in fields(self)[8:] if getattr(self, f.name)]
        words = [self.kernel, self.family, self.shape, self.bound, self.dtype, self.policy]
        return " ".join(map(str, [*words, *traits]))


class Matrices(Drawn):
    """Matrices of the case's size, as far off 16 bytes as its results."""

    def numbers(self, scale: float = 2.0) -> Tensor:
        size = self.case.m, self.case.n
        return self.space(*size).copy_(self.normal(*size, scale=scale))

    def gradient(self) -> Tensor:
        drawn = self.numbers(1.0)
        return drawn.mT.contiguous().mT if self.case.transposed else drawn


def run(case: Case, seed: int, change: Callable[[str], str] | None = None) -> Verdict:
    """The verdict on a case under one schedule."""
    return judged(_run, case, seed, change)


def _run(case: Case, seed: int, change: Callable[[str], str] | None) -> Verdict:
    drawn = Matrices(case, seed)
    how = launch.arithmetic(
        configure("linear_act", case.activation, case.bound.params, case.policy, "triton"), drawn.dtype
    )
    parts = {
        "activation": _activation, "gated_activation": _activation, "chain_rule": _chain_rule,
        "gated_chain_rule": _gated_chain_rule, "column_sum": _column_sum,
    }  # fmt: skip
    made, errors = parts[case.kernel](case, how, reference.function(case.bound), drawn)
    result = execute(made, case.family, Schedule.of(seed), change, str(case))
    return Verdict.of(case, errors(), result.instructions)


def _activation(case: Case, how: launch.Arithmetic, f: Any, drawn: Matrices) -> Parts:
    z, up = drawn.numbers(), drawn.numbers() if case.kernel.startswith("gated") else None
    before, factor = z.clone(), 1.0 if up is None else up.double()
    y = z if case.overwrite else drawn.space(case.m, case.n)
    return launch.activation(how, z, up, y), lambda: iter([("y", reference.value(y, f, before, factor))])


def _chain_rule(case: Case, how: launch.Arithmetic, f: Any, drawn: Matrices) -> Parts:
    dh, r = drawn.gradient(), drawn.numbers()
    if case.policy == "output":
        r.copy_(f(r.double()))
    before, d = r.double().clone(), dh.double()
    strip = configs.strip(case.m, case.n, drawn.dtype.itemsize, PROCESSORS)
    dz = r if case.overwrite else drawn.space(case.m, case.n)
    h = None if case.less or case.policy == "output" else drawn.space(case.m, case.n)
    wide = torch.float64 if drawn.dtype == torch.float64 else torch.float32
    sums = None if case.less else drawn.space(strip.strips(case.m), case.n, dtype=wide)

    def errors() -> Errors:
        if case.policy == "output":
            assert case.bound.row.grad_from_output is not None
            wanted = case.bound.row.grad_from_output(d, before, *case.bound.params_for(drawn.dtype))
            spare = reference.ARITHMETIC[drawn.dtype] * d.abs() * (1 + before.abs())
        else:
            wanted, spare = reference.slope(f, before, d), reference.slope_spare(d, f, before, drawn.dtype)
        yield "dz", reference.rounded_once(dz, wanted, spare)
        if h is not None:
            yield "h", reference.value(h, f, before)
        if sums is not None:
            yield "sums", reference.column_sums(sums, wanted, strip.rows, spare)

    return launch.chain_rule(how, strip, dh, r, dz, h, sums), errors


def _gated_chain_rule(case: Case, how: launch.Arithmetic, f: Any, drawn: Matrices) -> Parts:
    dh, gate, up = drawn.gradient(), drawn.numbers(), drawn.numbers()
    d, g, u = (t.double().clone() for t in (dh, gate, up))
    strip = configs.strip(case.m, case.n, drawn.dtype.itemsize, PROCESSORS)
    dg, du = (gate, up) if case.overwrite else (drawn.space(case.m, case.n) for _ in range(2))
    h = None if case.less else drawn.space(case.m, case.n)
    wide = torch.float64 if drawn.dtype == torch.float64 else torch.float32
    sums = [None if case.less else drawn.space(strip.strips(case.m), case.n, dtype=wide) for _ in range(2)]

    def errors() -> Errors:
        dy = (d * u).to(drawn.dtype).double()
        lost = reference.slope_spare(dy, f, g, drawn.dtype)
        pairs = [(dg, reference.slope(f, g, dy), lost), (du, d * f(g), reference.lost(d * f(g), g, d, drawn.dtype))]
        for name, (found, wanted, off), total in zip(("dg", "du"), pairs, sums, strict=True):
            yield name, reference.rounded_once(found, wanted, off)
            if total is not None:
                yield f"sums of {name}", reference.column_sums(total, wanted, strip.rows, off)
        if h is not None:
            yield "h", reference.value(h, f, g, u)

    return launch.gated_chain_rule(how, strip, dh, gate, up, dg, du, h, *sums), errors


def _column_sum(case: Case, how: launch.Arithmetic, f: Any, drawn: Matrices) -> Parts:
    """Of a matrix (P, N) of partial sums, in float32 or float64."""
    wide = torch.float64 if drawn.dtype == torch.float64 else torch.float32
    sums = drawn.space(case.m, case.n, dtype=wide).copy_(drawn.numbers())
    out = drawn.space(case.n)
    lost = sums.double().abs().sum(0) * (2.0**-49 if wide == torch.float64 else 2.0**-20)
    return launch.column_sum(sums, out), lambda: iter(
        [("out", reference.rounded_once(out, sums.double().sum(0), lost))]
    )


# Rows and columns: less than a block of either, around one, several blocks for a strip, strips of one row.
SHAPES = [(1, 1), (5, 37), (9, 513), (33, 256), (130, 72), (17, 264), (1, 2730)]


def campaign() -> Iterator[Job]:
    """Every kernel, family, dtype and shape; every activation with its gradients; every number of 16 bits."""
    for kernel, family, dtype in product(KERNELS, FAMILIES, DTYPES):
        for i, (m, n) in enumerate(SHAPES):
            traits = dict(
                overwrite=i % 2 == 1 and kernel != "column_sum", transposed=i % 3 == 2, less=i % 4 == 3, skew=i % 2
            )
            yield job(Case(kernel, family, m, n, dtype=str(dtype).removeprefix("torch."), **traits))
    families = cycle(FAMILIES)
    for kernel, dtype, name in product(KERNELS[:-1], DTYPES, ROWS):
        family = next(families)
        for params in ((), *OTHER_PARAMS.get(name, ())):
            yield job(Case(kernel, family, 19, 200, name, params, str(dtype).removeprefix("torch.")))
            row = bind(name, params or None).row
            if (
                kernel == "chain_rule"
                and row.grad_from_output
                and not row.output_lost(*bind(name, params or None).params)
            ):
                yield job(Case(kernel, family, 19, 200, name, params, str(dtype).removeprefix("torch."), "output"))


def job(case: Case) -> Job:
    return Job.of(f"triton {case.kernel}", case, run, 0.1)
