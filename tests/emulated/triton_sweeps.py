"""All 65,536 numbers of a type of 16 bits through the elementwise kernels, from their PTX.

The instructions that the emulator computes exactly are approximate on a GPU, by fractions of what is allowed here; what
these sweeps see is everything else: where an instruction flushes subnormal numbers, over- or underflows, or meets ±0,
±inf and NaN (the tables of the PTX ISA, "Floating Point Instructions").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from support import OTHER_PARAMS
from torch import Tensor

from emulated import triton_reference as reference
from emulated.jobs import Job, Verdict, judged
from emulated.triton_run import execute
from fastbp.activations import ROWS, Bound, bind
from fastbp.backends.triton import configs, launch
from fastbp.problem import configure

WHAT = ("value", "grad", "grad_from_output")
SHAPE = (64, 1024)
FLUSHED = 2.0**-125  # below, float32 with .ftz has no numbers


@dataclass(frozen=True)
class Sweep:
    """An activation's value at every z, or dz of dy = 1 at every z, or y."""

    activation: str
    params: tuple[float, ...] = ()
    dtype: str = "bfloat16"
    what: str = "value"
    family: str = "sm_90"

    @property
    def policy(self) -> str:
        return "output" if self.what == "grad_from_output" else "preact"

    @property
    def shape(self) -> str:
        return "x".join(map(str, SHAPE))

    @property
    def bound(self) -> Bound:
        return bind(self.activation, self.params or None)

    def __str__(self) -> str:
        return f"{self.what} of {self.bound} at every {self.dtype} {self.family}"


def every(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(SHAPE)


def run(sweep: Sweep, seed: int) -> Verdict:
    return judged(_run, sweep, seed)


def _run(sweep: Sweep, seed: int) -> Verdict:
    dtype, bound = getattr(torch, sweep.dtype), sweep.bound
    how = launch.arithmetic(configure("linear_act", sweep.activation, bound.params, sweep.policy, "triton"), dtype)
    given, found = every(dtype), torch.full(SHAPE, torch.nan, dtype=dtype)
    if sweep.what == "value":
        made = launch.activation(how, given, None, found)
    else:
        strip = configs.strip(*SHAPE, 2, 4)
        made = launch.chain_rule(how, strip, torch.ones_like(given), given, found, None, None)
    result = execute(made, sweep.family, seed, label=str(sweep))
    wanted, eager, allowed = _truth(sweep, given)
    off = (found.double() - wanted).abs() / allowed
    rounded = wanted.to(dtype)
    same = (found == rounded) | found.isnan() & rounded.isnan()
    # Where float32 over- or underflows on the way, what is as near as eager, or not finite as eager, is right too.
    same |= (found == eager) & ~eager.isfinite() | found.isnan() & eager.isnan()
    same |= (found.double() - wanted).abs() <= (eager.double() - wanted).abs()
    off = torch.where(same, 0.0, torch.where(off.isfinite(), off, torch.inf))
    at = off.argmax()
    told = f"{sweep}: {int((off > 1).sum())} wrong, at {given.flatten()[at]:.6g} "
    told += f"{found.flatten()[at]:.6g} for {wanted.flatten()[at]:.6g}, eager {eager.flatten()[at]:.6g}"
    worst = float(off.flatten()[at])
    return Verdict("" if worst <= 1 else "wrong numbers", told, worst, result.instructions)


def _truth(sweep: Sweep, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is right, in float64, what eager gives, and by how much the kernel may be off."""
    f, dtype, bound = reference.function(sweep.bound), given.dtype, sweep.bound
    if sweep.what == "value":
        wanted, eager = f(given.double()), f(given)
        spare = reference.lost(wanted, given, 1.0, dtype)
    else:
        dy = torch.ones_like(given)
        if sweep.what == "grad":
            wanted, eager = reference.slope(f, given, dy), _eager_slope(f, given)
        else:
            assert bound.row.grad_from_output is not None
            params = bound.params_for(dtype)
            wanted = bound.row.grad_from_output(dy.double(), given.double(), *params)
            eager = bound.row.grad_from_output(dy.float(), given.float(), *params).to(dtype)
        # Next to the minimum two terms of a quarter cancel, each off by 2.8e-5 (_polynomials.py).
        spare = 8 * reference.ARITHMETIC[dtype] * wanted.abs() + torch.where(given.abs() < 2, 8e-6, 3e-7)
    return wanted, eager, 1.001 * reference.half_unit(wanted, dtype) + spare + FLUSHED


def _eager_slope(f: Any, z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    (found,) = torch.autograd.grad(f(z), z, torch.ones_like(z))
    return found


def sweeps() -> Iterator[Sweep]:
    """Every activation, with other parameters too, value and gradients, in both types."""
    for dtype, name in product(("bfloat16", "float16"), ROWS):
        for params in ((), *OTHER_PARAMS.get(name, ())):
            bound = bind(name, params or None)
            for what in WHAT:
                if what != "grad_from_output" or (
                    bound.row.grad_from_output and not bound.row.output_lost(*bound.params)
                ):
                    yield Sweep(name, params, dtype, what)


def campaign() -> Iterator[Job]:
    """Every sweep on one architecture: what the others compile is the same text."""
    for sweep in sweeps():
        yield Job.of("triton elementwise, every number", sweep, run, 0.0)
