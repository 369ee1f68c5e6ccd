"""What the campaign (emulated/campaign.py) runs: a module of kernels has ``campaign() -> Iterator[Job]``."""

from __future__ import annotations

from collections.abc import Callable
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
        cls, label: str, errors: dict[str, float], whole: bool, instructions: int, kernels: tuple[Any, ...]
    ) -> Verdict:
        """Of a launch that ended: its largest errors by result, and whether the red zones are as they were."""
        largest = max(errors.values())
        fault = "out of bounds" if not whole else "" if largest <= 1 else "wrong numbers"
        seen = ", ".join(f"{name} {found:.3g}" for name, found in errors.items())
        return cls(fault, f"{label}: {seen}", largest, instructions, kernels)

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


def judged(run: Callable[..., Verdict], *args: Any) -> Verdict:
    """The verdict of a run, whose faults are verdicts too."""
    try:
        return run(*args)
    except Fault as fault:
        return Verdict(fault.kind, str(fault))
