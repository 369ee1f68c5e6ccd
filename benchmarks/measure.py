"""How it is measured: right before fast, all rivals in turn, medians with their spread."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import cuda_clock
from benchmarks.cases import Case, Model
from benchmarks.clock import Step
from benchmarks.clock import burst as burst
from benchmarks.rivals import RIVALS
from benchmarks.steps import step_of, task_of
from fastbp.acceptance import Exact, rms_error
from fastbp.tuning.race import quantiles as quantiles

WRONG = 0.1  # an error that no rounding makes
NO_GRAPH = {
    "bwd": "a graph of backward alone would be of tensors that forward made outside of it",
    "train": "the optimizer's step is not for graphs",
}


class Prepared(NamedTuple):
    """What there is to time of a case."""

    steps: dict[str, Step]  # a step of every rival that serves, each call on the next of the copies
    accuracy: dict[str, dict[str, object]]
    left_out: dict[str, str]  # the other rivals, and why
    broken: dict[str, str]  # routes of fastbp that a call does not take by itself, and what is wrong with them
    copies: int


def prepare(case: Case, names: Iterable[str], device: torch.device, mode: str = "fwd_bwd") -> Prepared:
    """A step in this mode for every rival that serves the case, eager first, and how accurate each is.

    All rivals have the same parameters and the same random inputs. ``error`` is the largest relative RMS error of
    output and gradients against float64 (of a model, of its output and of its parameters' gradients on average);
    ``accurate`` says whether each is at most twice eager's, and a rounding unit: of a block in the whole, each row,
    each column and each number, as ``fastbp.acceptance`` has it. AssertionError where a result of fastbp's is not, or
    by a compressed policy is no result at all; anybody else is timed all the same. A rival that raises is left out, and
    a forced route of fastbp is broken, with its reason; eager and fastbp itself may not raise.
    """
    task = task_of(case, device)
    truth = Truth(case, *task.truth(mode))
    found = Prepared({}, {}, {}, {}, len(task.inputs))
    for name in names:
        rival, trusted = RIVALS[name], name == "eager" or name.startswith("fastbp")
        if reason := rival.refusal(case, mode, device):
            found.left_out[name] = reason
            continue
        try:
            run = rival.make(case, task.parts)
            with rival.on_its_route():
                results = task.results(run, mode)
            if name == "eager":
                truth.allow(results)
            if rival.same_function:
                worst, wrong = truth.worst(results), truth.refusal(results)
                bound = name.startswith("fastbp") and rival.exact
                assert wrong is None or not bound, f"{case.name}: {name} is inaccurate: {wrong}"
                usable = worst < WRONG or isinstance(case, Model)
                assert usable or not trusted, f"{case.name}: {name} is wrong: {wrong}"
                found.accuracy[name] = {
                    "error": float(f"{worst:.3g}") if math.isfinite(worst) else None,
                    "accurate": wrong is None,
                }
        except Exception as error:
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if rival.route is not None:
                found.broken[name] = said
            elif trusted:
                raise
            else:
                found.left_out[name] = said
            continue
        found.steps[name] = step_of(task, run, mode, None if rival.route is None else rival.on_its_route)
    return found


class Truth:
    """The results in float64: each by itself; of a model the output, and the gradients of all parameters together."""

    def __init__(self, case: Case, exact: Sequence[Tensor], beside: Sequence[Tensor | None]) -> None:
        self.case, self.exact, self.beside = case, exact, beside
        self.held: list[Exact] = []  # by what eager's results set the bounds
        self.allowed: list[float] = []

    def allow(self, eagers: Sequence[Tensor]) -> None:
        """Derive the bounds from eager's results."""
        if isinstance(self.case, Model):
            slack = torch.finfo(self.case.dtype).eps
            self.allowed = [2 * error + slack for error in self._pooled(eagers)]
            return
        for index, (theirs, truth, off) in enumerate(zip(eagers, self.exact, self.beside, strict=True)):
            held = Exact(theirs, "the output" if index == 0 else f"gradient {index}")
            held.put(0, truth)
            held.allow(theirs, entered=self._entered(index, truth), beside=off)
            self.held.append(held)

    def _entered(self, index: int, truth: Tensor) -> float:
        """Of a bias gradient, which may have cancelled: as much as the weight gradient beside it, of normal inputs."""
        if index == 0 or truth.dim() != 1:
            return 0.0
        weights = [t for t in self.exact[1:] if t.dim() == 2 and t.shape[0] == truth.shape[0]]
        return max((t.square().mean().sqrt().item() for t in weights), default=0.0)

    def refusal(self, results: Sequence[Tensor]) -> str | None:
        """Why the results are not as good as eager's, or None."""
        if isinstance(self.case, Model):
            errors = self._pooled(results)
            fine = all(error <= allowed for error, allowed in zip(errors, self.allowed, strict=True))
            return None if fine else f"errors {errors}, where {self.allowed} are allowed"
        return next(filter(None, (held.refusal(t) for held, t in zip(self.held, results, strict=True))), None)

    def worst(self, results: Sequence[Tensor]) -> float:
        """The largest error of a whole result, over its RMS."""
        return max(self._pooled(results) if isinstance(self.case, Model) else self._each(results))

    def _each(self, results: Sequence[Tensor]) -> list[float]:
        return [rms_error(t, truth) for t, truth in zip(results, self.exact, strict=True)]

    def _pooled(self, results: Sequence[Tensor]) -> list[float]:
        first, *others = self._each(results)
        return [first, math.sqrt(statistics.fmean(e * e for e in others))] if others else [first]


def bursts(
    steps: dict[str, Step], seconds: float, burst: Callable[[Step, int], float] = burst
) -> dict[str, list[float]]:
    """Milliseconds of a step, of every rival: bursts of calls in turn, until each has had its seconds.

    A burst is long enough to be warm and to dwarf the clock: 10 ms, or one call. Every turn has an order of its own,
    for who comes after whom is worth some per cent of a small step: caches, the heap and the clock are as the last left
    them.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    calls: dict[str, int] = {}
    for name, step in steps.items():
        for _ in range(3):
            once = burst(step, 1)
        calls[name] = max(1, min(200, round(0.01 / once)))
    spent, order, shuffle = 0.0, list(steps), random.Random(0).shuffle
    while spent < seconds * len(steps) or len(next(iter(times.values()))) < 5:
        shuffle(order)
        for name in order:
            spent_now = burst(steps[name], calls[name])
            times[name].append(spent_now / calls[name] * 1e3)
            spent += spent_now
    return times


def on_cuda(prepared: Prepared, seconds: float, mode: str) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """The figures that only a GPU has, of every rival: its replayed graph, and the host. And who has no graph, why.

    A graph holds a step on each of the copies.
    """
    graphs: dict[str, Step] = {}
    ungraphed = {"every rival": NO_GRAPH[mode]} if mode in NO_GRAPH else {}
    for name, step in prepared.steps.items() if not ungraphed else ():
        try:
            graphs[name] = cuda_clock.capture(step, prepared.copies)
        except Exception as error:  # who cannot be captured is timed without
            ungraphed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    figures = {name: {"host_ms": round(cuda_clock.host_milliseconds(step), 4)} for name, step in prepared.steps.items()}
    times = bursts(graphs, seconds, cuda_clock.burst) if graphs else {}
    for name, replays in times.items():
        figures[name]["graph_ms"] = round(statistics.median(replays) / prepared.copies, 4)
        if "eager" in times:
            figures[name]["graph_over_eager"] = summarise(replays, times["eager"])["over_eager"]
    return figures, ungraphed


def summarise(times: list[float], base: list[float]) -> dict[str, float]:
    """Median and spread of a rival's milliseconds, and of eager's time over its, turn by turn."""
    ratios = [b / t for t, b in zip(times, base, strict=True)]
    low, middle, high = quantiles(ratios)
    return {
        "ms": round(statistics.median(times), 4),
        "ms_p20": round(quantiles(times)[0], 4),
        "ms_p80": round(quantiles(times)[2], 4),
        "over_eager": round(middle, 3),
        "over_eager_p20": round(low, 3),
        "over_eager_p80": round(high, 3),
    }
