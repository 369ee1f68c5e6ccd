"""What the campaign (emulated/campaign.py) runs: a module of kernels has ``campaign() -> Iterator[Job]``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ptxsim import Fault


class Verdict(NamedTuple):
    """What became of one launch under one schedule."""

    fault: str = ""  # its kind: that of a Fault, or "wrong numbers"; "" where all is right
    text: str = ""  # what was seen, for whoever looks for it
    error: float = 0.0  # the largest, in units of what is allowed: right up to 1
    instructions: int = 0  # of warps
    kernels: tuple[Any, ...] = ()  # the parsed kernels that ran, which know what of them was met

    @classmethod
    def of(
        cls, label: object, errors: Iterable[tuple[str, float]], instructions: int, kernels: tuple[Any, ...] = (),
        whole: bool = True,
    ) -> Verdict:  # fmt: skip
        """Of a launch that ended: its errors by result, and whether the red zones are as they were.

        Of several errors with one name the largest counts, and NaN is larger than any.
        """
        largest: dict[str, float] = {}
        for name, error in errors:
            largest[name] = max(largest.get(name, 0.0), math.inf if math.isnan(error) else error)
        worst = max(largest.values())
        fault = "out of bounds" if not whole else "" if worst <= 1 else "wrong numbers"
        seen = ", ".join(f"{name} {found:.3g}" for name, found in largest.items())
        return cls(fault, f"{label}: {seen}", worst, instructions, kernels)

    def __repr__(self) -> str:
        return f"{self.fault or 'right'}: {self.text}"


class Job(NamedTuple):
    """One case, which is run with many seeds: ``run(*args, seed)``. Both go to another process, so they are pickled."""

    kernel: str  # of a line of the results: "hopper forward"
    family: str  # the architecture it was compiled for: "sm_90a"
    label: str  # unique; says all that is special
    activation: str
    dtype: str
    policy: str  # what is kept: "preact", "output", "output_bits", "output_lsb", "fp8"
    shape: str  # "300x200x328"
    run: Callable[..., Verdict]
    args: tuple[Any, ...]
    share: float = 1.0  # of the seeds that are asked for; at least one is run

    @classmethod
    def of(cls, kernel: str, case: Any, run: Callable[..., Verdict], share: float, *others: Any) -> Job:
        """Of a case that says all of this itself; ``others`` are arguments beside it."""
        where = (case.family, str(case), case.activation, case.dtype, case.policy, case.shape)
        return cls(kernel, *where, run, (case, *others), share)


def judged(run: Callable[..., Verdict], *args: Any) -> Verdict:
    """The verdict of a run, whose faults are verdicts too."""
    try:
        return run(*args)
    except Fault as fault:
        return Verdict(fault.kind, str(fault))
