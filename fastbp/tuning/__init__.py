"""Measuring which backend is the fastest for the calls of a model on this machine, and remembering it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from torch import nn

from fastbp import backends, cache
from fastbp.backends.measured import file_name, inventory
from fastbp.tuning import products
from fastbp.tuning.isolation import Measuring
from fastbp.tuning.jobs import Job, watch
from fastbp.tuning.race import fastest_of

WHERE = "fastbp.tune"
SECONDS = 0.3


@dataclass
class TunedCall:
    """One call: how often the model makes it, and what was measured of it.

    ``milliseconds`` are medians of a forward and backward by every candidate, ``refused`` are those that were not
    timed, and why. ``unmeasured`` is what a call took before.
    """

    call: str
    count: int
    milliseconds: dict[str, float]
    refused: dict[str, str]
    unmeasured: str
    known: bool = False  # from an earlier run
    remembered: bool = True

    @classmethod
    def of(cls, key: str, count: int, entry: Any) -> TunedCall | None:
        """What an earlier run measured, as it is remembered; None for what cannot be read."""
        try:
            times = {str(name): float(ms) for name, ms in entry["milliseconds"].items()}
            return (
                cls(key, count, times, dict(entry["refused"]), str(entry["unmeasured"]), known=True) if times else None
            )
        except (TypeError, KeyError, AttributeError, ValueError):
            return None

    @property
    def fastest(self) -> str:
        return fastest_of(self.milliseconds, self.unmeasured) if self.milliseconds else self.unmeasured

    @property
    def gain(self) -> float:
        """The time of what a call took before over that of the fastest; NaN where that was refused."""
        return self.milliseconds.get(self.unmeasured, float("nan")) / self.milliseconds[self.fastest]

    def __str__(self) -> str:
        if not self.milliseconds:
            reasons = "; ".join(dict.fromkeys(self.refused.values()))
            return f"{self.call}: not measured, {self.unmeasured} stays: {reasons}"
        others = sorted(((ms, name) for name, ms in self.milliseconds.items() if name != self.fastest))
        best = self.milliseconds[self.fastest]
        then = f", then {others[0][1]} {others[0][0] / best:.2f} × as long" if others else ""
        by = "" if self.fastest == self.unmeasured else f" instead of {self.unmeasured}: {self.gain:.2f} times as fast"
        known = " (measured before)" if self.known else ""
        wrong = (
            f"; {self.unmeasured} was refused: {self.refused[self.unmeasured]}"
            if self.unmeasured in self.refused
            else ""
        )
        times = f"{self.count} × " if self.count > 1 else ""
        return f"{times}{self.call}: {self.fastest}, {best:.3f} ms{by}{then}{known}{wrong}"


@dataclass
class TuningReport:
    """The outcome of ``fastbp.tune``; ``print(report)`` says what won, and by how much."""

    calls: list[TunedCall]
    remark: str = ""
    path: str = ""  # where it is remembered; "" where the cache cannot be written

    @property
    def summary(self) -> str:
        """The lines beneath those of the calls."""
        timed = [call for call in self.calls if call.milliseconds]
        after = sum(call.count * call.milliseconds[call.fastest] for call in timed)
        before = sum(call.count * call.milliseconds[call.fastest] * call.gain for call in timed)
        then = f"{before:.3f} ms before, " if math.isfinite(before) else ""
        those = "all these calls" if len(timed) == len(self.calls) else f"the {len(timed)} calls that were measured"
        lines = [f"forward and backward of {those}: {then}{after:.3f} ms now"]
        lines.append(f"remembered in {self.path}" if self.path else "not remembered: the cache cannot be written")
        return "\n".join(filter(None, [*lines, self.remark]))

    def __str__(self) -> str:
        return "\n".join([*map(str, self.calls), self.summary])


def tune(
    model: nn.Module, sample_inputs: Any, *, seconds: float = SECONDS, again: bool = False, quiet: bool = False
) -> TuningReport:
    """Measure which backend is the fastest for every call that the model makes of fastbp, and use it from now on.

    The model runs once on ``sample_inputs``: a tensor, a tuple of arguments or a dict of keyword arguments, of the
    sizes and dtypes of training; under autocast if training is. Then each of its calls is made on random tensors of the
    same sizes by every candidate: the backends with their ways of computing, and PyTorch's operations under its own
    autograd where those keep no more for backward than the save policy. A candidate whose error against float64 is more
    than twice that of plain PyTorch, and a rounding unit, is refused, and one that is off by more than three times as
    much as PyTorch at its worst in a row, a column or a single number. The others take turns, forward and backward
    together, for ``seconds`` each. It takes some seconds a call, prints a line for each unless ``quiet``, and leaves
    the model, its gradients and PyTorch's random state as they were.

    On a GPU the products that the Triton kernels are made of are measured first, and all of it in a process of its own:
    a candidate that crashes or does not answer is refused for that, and nothing happens to this process.

    What won is remembered for this device, these versions, (on a GPU) this driver and (on a CPU) this number of
    threads, in a JSON file in ``$XDG_CACHE_HOME/fastbp``, and calls of exactly these sizes take it, in this process and
    in later ones, wherever they do not name a backend themselves. Calls measured before are not measured again, unless
    ``again``. A cache that cannot be written costs a warning, and what was measured serves this process. Calls with
    ``gradient_accumulation_fusion`` are not tuned.

    A call whose float64 does not fit into memory is not measured, and said so. Raises ValueError where the model makes
    no call that leaves the choice open or does not run with the inputs, TypeError for what is no module, RuntimeError
    where a GPU lets no other process in, or that does not start.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{WHERE}: model must be an nn.Module, got {type(model).__name__}")
    if not seconds > 0:
        raise ValueError(f"{WHERE}: seconds must be positive, got {seconds!r}")
    seen = watch(WHERE, model, sample_inputs)
    if not seen.jobs:
        why = (
            f"all {seen.named} calls of fastbp name their backend; leave that out"
            if seen.named
            else "the model makes no call of fastbp; fastbp.fuse(model) fuses its blocks"
        )
        raise ValueError(f"{WHERE}: there is nothing to choose: {why}")
    remark = f"{seen.named} calls name their backend, and keep it" if seen.named else ""
    return tune_jobs(seen.jobs.items(), seconds, again, quiet, remark)


def tune_jobs(
    jobs: Iterable[tuple[Job, int]], seconds: float, again: bool, quiet: bool, remark: str = ""
) -> TuningReport:
    """``tune`` for calls that are known already, each with how often it comes."""
    jobs = list(jobs)
    report = TuningReport([], remark, _path(jobs[0][0].device))
    with Measuring(WHERE) as measuring:
        for job, count in jobs:
            entry = None if again else inventory(backends.environment(job.device)).get(job.key)
            call = TunedCall.of(job.key, count, entry) or _measured(job, count, seconds, measuring)
            report.calls.append(call)
            report.path = report.path if call.remembered else ""
            if not quiet:
                print(call, flush=True)
    return report


def _measured(job: Job, count: int, seconds: float, measuring: Measuring) -> TunedCall:
    if sys.stderr.isatty():
        print(f"\r{job.key} ...", end="\r", file=sys.stderr, flush=True)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(job.device.type, enabled=False):
        products.tune(job, seconds, measuring)
        found = measuring.race(job, seconds)
    if not found.milliseconds:
        return TunedCall(job.key, count, *found)
    entry = {"milliseconds": found.milliseconds, "refused": found.refused, "unmeasured": found.unmeasured}
    entry |= {"fastest": found.fastest, "date": date.today().isoformat()}
    written = backends.remember(job.device, job.key, entry)
    return TunedCall(job.key, count, *found, remembered=written)


def _path(device: torch.device) -> str:
    try:
        return str(cache.folder() / file_name(backends.environment(device)))
    except OSError:  # a user without a home
        return ""
