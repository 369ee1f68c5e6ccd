"""Measuring the candidates for one call on this machine: each checked, then timed forward and backward, in turn."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch

from fastbp import backends
from fastbp.acceptance import Exact, Originals, first_line, poisoned
from fastbp.backends import REFERENCE, with_backend, with_choice
from fastbp.backends.measured import EAGER, Choice
from fastbp.problem import Config, Problem
from fastbp.tuning.drawn import DrawnCall, draw, yardstick
from fastbp.tuning.jobs import Job

Told = Callable[[str, str | None], None]  # a candidate begins; or it is refused, and why
Step = Callable[[], object]
BURST = 0.01  # seconds of a burst, which dwarf the clock and what others left in the caches; one call if that is longer
# Who is slower than the leader by more than the noise drops out: at a glance after so many turns and by so much, after
# more by so many standard errors.
GLANCE, HOPELESS, TURNS, DOUBT = 2, 1.5, 8, 4.0
# The others go on until each has had its seconds, and while nobody knows who leads, up to so many times as long; slow
# steps for so many turns at least.
FEW_TURNS, PATIENCE = 12, 10
TIE = 0.005  # the choice of the written rule stays where nobody is ahead of it by more: a difference that is noise


class Outcome(NamedTuple):
    """What became of the candidates for a call."""

    milliseconds: dict[str, float]  # medians of a forward and backward, by the name of the choice
    refused: dict[str, str]  # who was not timed, and why
    unmeasured: str  # what a call takes without a measurement

    @property
    def fastest(self) -> str:
        return fastest_of(self.milliseconds, self.unmeasured)


def fastest_of(milliseconds: Mapping[str, float], unmeasured: str) -> str:
    """The name of the fastest; of equals what a call takes without a measurement."""
    best = min(milliseconds, key=milliseconds.__getitem__)
    rule = milliseconds.get(unmeasured, float("inf"))
    return unmeasured if rule <= milliseconds[best] * (1 + TIE) else best


def candidates(job: Job) -> list[Choice]:
    """Every way to compute a call: first what it takes unmeasured, then all that the backends offer, then eager."""
    problem = Problem(job.config, job.device, job.dtype)
    found = []
    for name, entry in backends.BACKENDS.items():
        if not isinstance(entry, str) and backends.refusal(entry, problem) is None:
            found += [Choice(name), *(Choice(name, route) for route in entry.routes(problem, job.sizes.rows))]
    return [*found, Choice(EAGER)]


def run_race(
    job: Job, seconds: float, without: Collection[str] = (), told: Told = lambda name, refused: None
) -> Outcome:
    """Check and time the candidates; ``seconds`` for each of those that are close to the fastest.

    What is right is plain PyTorch in float64, and how exact a candidate must be plain PyTorch in the dtype: output and
    gradients within twice its error and a unit of rounding (``acceptance``), for a policy whose gradients are
    approximate within twice that of the reference by the same policy. ``eager`` must keep no more for backward than the
    policy. Where the float64 does not fit into memory all are refused. ``told`` hears of each candidate before it runs,
    and of each that is refused; those of ``without`` take no part.
    """
    choices = [choice for choice in candidates(job) if choice.name not in without]
    rule = candidates(job)[0]
    refused: dict[str, str] = {}
    with on(job.device):
        try:
            call = draw(job)
            exact = yardstick(job, call)
            originals = Originals([t for t in (*call.inputs, *call.weights, *call.biases, call.dy) if t is not None])
        except Exception as error:  # a lack of memory, for the most part
            why = f"its reference in float64: {first_line(error)}"
            return Outcome({}, {choice.name: why for choice in choices}, rule.name)
        steps: dict[str, Step] = {}
        for choice in choices:
            told(choice.name, None)
            config = with_choice(job.config, choice)
            reason = _wrong(call, config, exact) or originals.overwritten()
            if reason is None and choice.backend == EAGER:
                reason = _wasteful(call, config)
            if reason is None:
                steps[choice.name] = partial(call.step, config)
            else:
                refused[choice.name] = reason
                told(choice.name, reason)
        del exact, originals  # twice the memory of all results, and that of all tensors
        times = run_off(steps, seconds, clock_of(job.device), told) if steps else {}
    return Outcome(times, refused, rule.name)


def on(device: torch.device) -> AbstractContextManager[object]:
    """What is launched by ourselves and by Triton goes to the current device, which must be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _wrong(call: DrawnCall, config: Config, exact: Sequence[Exact]) -> str | None:
    """Why a candidate is refused that does not run, or whose results are not right."""
    try:
        with poisoned():
            results = call.results(config)
        return next(filter(None, (truth.refusal(t) for truth, t in zip(exact, results, strict=True))), None)
    except Exception as error:  # whatever a compiler, a driver or a lack of memory says
        return first_line(error)


def _wasteful(call: DrawnCall, config: Config) -> str | None:
    """Why a candidate is refused that keeps more for backward than the save policy, as the reference shows it."""
    more, kept = call.kept(config), call.kept(with_backend(config, REFERENCE))
    return f"keeps {more} bytes for backward, the policy {config.save!r} {kept}" if more > kept else None


def clock_of(device: torch.device) -> Callable[[Step, int], float]:
    """Seconds of so many calls: on a GPU by its events, else by the host's clock."""

    def on_host(step: Step, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return time.perf_counter() - start

    def on_gpu(step: Step, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            start.record()
            for _ in range(calls):
                step()
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return on_gpu if device.type == "cuda" else on_host


def run_off(
    steps: Mapping[str, Step], seconds: float, clock: Callable[[Step, int], float],
    told: Told = lambda name, refused: None,
) -> dict[str, float]:  # fmt: skip
    """Milliseconds of each step: bursts in turn, and every turn in an order of its own, so that nobody always comes
    after the same.

    Steps are compared turn by turn, for a machine may be twice as fast in one second as in the next: a step's time is
    the median of the leader's, times the median of its ratios to the leader's in the turns that it took part in.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    calls: dict[str, int] = {}
    for name, step in steps.items():
        told(name, None)
        clock(step, 1)
        calls[name] = max(1, min(1000, round(BURST / max(clock(step, 1), 1e-9))))
    running, turns, spent, shuffle = list(steps), 0, 0.0, random.Random(0).sample
    while True:
        turns += 1
        for name in shuffle(running, len(running)):
            told(name, None)
            took = clock(steps[name], calls[name])
            times[name].append(took / calls[name] * 1e3)
            spent += took / len(running)
        leader = _leader(times, running)
        if turns >= GLANCE:
            running = [name for name in running if not _behind(times[name], times[leader])]
        enough = turns >= FEW_TURNS and spent >= seconds
        if enough and (spent >= PATIENCE * seconds or _settled(times, running, leader)):
            break
    typical = statistics.median(times[leader])
    return {name: typical * statistics.median(ratios(found, times[leader])) for name, found in times.items()}


def _leader(times: Mapping[str, Sequence[float]], running: Sequence[str]) -> str:
    """Who takes the smallest share of a turn's time."""
    whole = [sum(turn) for turn in zip(*(times[name] for name in running), strict=True)]
    return min(running, key=lambda name: statistics.median(ratios(times[name], whole)))


def _behind(mine: Sequence[float], leading: Sequence[float]) -> bool:
    """Whether a step is slower than the leader beyond doubt."""
    found = ratios(mine, leading)
    if len(found) < TURNS:
        return min(found) > HOPELESS
    return statistics.median(found) - DOUBT * error_of_median(found) > 1


def _settled(times: Mapping[str, Sequence[float]], running: Sequence[str], leader: str) -> bool:
    """Whether nobody who is left can well be ahead of the leader by more than a tie."""
    found = [ratios(times[name], times[leader]) for name in running if name != leader]
    return all(statistics.median(each) - 2 * error_of_median(each) > 1 - TIE for each in found)


def ratios(times: Sequence[float], base: Sequence[float]) -> list[float]:
    """Of two steps, turn by turn, as far as both took part."""
    return [t / b for t, b in zip(times, base, strict=False)]


def error_of_median(values: Sequence[float]) -> float:
    """Its standard error, from the spread between the 20th and 80th percentile, as if that were a normal one's."""
    low, _, high = quantiles(values)
    return float((high - low) / 1.683 * 1.2533 / len(values) ** 0.5)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median, the 80th."""
    ordered = sorted(values)
    return ordered[len(ordered) // 5], statistics.median(ordered), ordered[-1 - len(ordered) // 5]
