"""Measuring the candidates for one call on this machine: each checked, then timed forward and backward, in turn."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastbp import backends
from fastbp.activations import bind
from fastbp.autograd import run
from fastbp.backends import REFERENCE, with_backend, with_choice
from fastbp.backends.measured import EAGER, Choice
from fastbp.memory import SavedBytes
from fastbp.problem import Config, Problem
from fastbp.reference import compose
from fastbp.tuning.jobs import Job

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


def run_race(job: Job, seconds: float) -> Outcome:
    """Check and time the candidates; ``seconds`` for each of those that are close to the fastest.

    A candidate must be as good as the reference of the same save policy in the same dtype: output and gradients within
    twice its error against float64 and a unit of rounding. ``eager`` must keep no more for backward than the policy.
    """
    call = _draw(job)
    exact = _exact(job, call)
    yardstick = _errors(call.results(with_backend(job.config, REFERENCE)), exact)
    allowed = [2 * error + torch.finfo(job.dtype).eps + _slack(job) for error in yardstick]
    steps: dict[str, Step] = {}
    refused: dict[str, str] = {}
    choices = candidates(job)
    for choice in choices:
        config = with_choice(job.config, choice)
        reason = _inaccurate(call, config, exact, allowed)
        if reason is None and choice.backend == EAGER:
            reason = _wasteful(call, config, with_choice(job.config, choices[0]))
        if reason is None:
            steps[choice.name] = partial(call.step, config)
        else:
            refused[choice.name] = reason
    if not steps:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise RuntimeError(f"fastbp.tune: no candidate serves {job.key}: {reasons}")
    del exact  # twice the memory of all results
    times = run_off(steps, seconds, clock_of(job.device))
    return Outcome(times, refused, choices[0].name)


def _inaccurate(call: _Call, config: Config, exact: Sequence[Tensor], allowed: Sequence[float]) -> str | None:
    """Why a candidate is refused that does not run, or whose errors are larger than is allowed."""
    try:
        errors = _errors(call.results(config), exact)
    except Exception as error:  # whatever a compiler, a driver or a lack of memory says
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    for found, most in zip(errors, allowed, strict=True):
        if not found <= most:
            return f"error {found:.3g} against float64, where {most:.3g} is allowed"
    return None


def _wasteful(call: _Call, config: Config, rule: Config) -> str | None:
    """Why a candidate is refused that keeps more for backward than the save policy."""
    more, kept = _kept(call, config), _kept(call, rule)
    return f"keeps {more} bytes for backward, the policy {config.save!r} {kept}" if more > kept else None


class _Call(NamedTuple):
    """The tensors of a call, and the ones that take gradients."""

    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    dy: Tensor
    wanted: list[Tensor]

    def forward(self, config: Config) -> Tensor:
        x, *others = self.inputs
        return run(config, x, self.weights, self.biases, (*others, *self.weights, *self.biases))

    def step(self, config: Config) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(config), self.wanted, self.dy)

    def results(self, config: Config) -> list[Tensor]:
        y = self.forward(config)
        return [y.detach(), *torch.autograd.grad(y, self.wanted, self.dy)]


def _draw(job: Job) -> _Call:
    generator = torch.Generator(job.device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=job.device) * scale).to(job.dtype)

    (rows, features), form = job.sizes, job.config.form
    shapes = list(zip(features[1:], features, strict=False))
    if form.gated and not form.given:
        shapes.insert(0, shapes[0])
    inputs = tuple(draw(rows, features[0]) for _ in range(form.inputs))
    weights = tuple(draw(n, k, scale=k**-0.5) for n, k in shapes)
    biases = tuple(draw(n) if any_bias else None for (n, _), any_bias in zip(shapes, job.biases, strict=True))
    wanted = [
        t.requires_grad_()
        for t, need in zip((*inputs, *weights, *biases), job.needs, strict=True)
        if need and t is not None
    ]
    return _Call(inputs, weights, biases, draw(rows, features[-1]), wanted)


def _exact(job: Job, call: _Call) -> list[Tensor]:
    """Output and gradients in float64."""
    tensors = [t for t in (*call.inputs, *call.weights, *call.biases) if t is not None]
    wide = {id(t): t.detach().double().requires_grad_(t.requires_grad) for t in tensors}
    weights = [wide[id(w)] for w in call.weights]
    biases = [None if b is None else wide[id(b)] for b in call.biases]
    activation = bind(job.config.row.name, job.config.params)
    y = compose(job.config.form, activation, [wide[id(t)] for t in call.inputs], weights, biases)
    return [y.detach(), *torch.autograd.grad(y, [wide[id(t)] for t in call.wanted], call.dy.double())]


def _errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """The RMS error over the RMS value, of each result; infinite where a NaN is."""
    errors = []
    for mine, truth in zip(found, exact, strict=True):
        size = truth.square().mean().sqrt().item()
        gap = (mine.double() - truth).square().mean().sqrt().item()
        error = gap / size if size else gap
        errors.append(error if error == error else float("inf"))
    return errors


def _slack(job: Job) -> float:
    """What slopes that differ as a whole add to the error: a z next to a kink may fall to either side of it."""
    if not _has_kink(job.config):
        return 0.0
    numbers = job.sizes.rows * max(job.sizes.features)
    return float(2 * ((1 + 4 * numbers * torch.finfo(job.dtype).eps) / numbers) ** 0.5)


@lru_cache(maxsize=256)
def _has_kink(config: Config) -> bool:
    z = torch.arange(-8, 8, 2**-10, dtype=torch.float64)
    return bool(config.row.grad(torch.ones_like(z), z, *config.params).diff().abs().max() > 0.05)


def _kept(call: _Call, config: Config) -> int:
    """The bytes kept for backward beside the inputs, parameters and y, which are there anyway."""
    tensors = [t for t in (*call.inputs, *call.weights, *call.biases) if t is not None]
    with SavedBytes(exclude=tensors) as saved:
        y = call.forward(config)
    saved._kept.pop(StorageWeakRef(y.untyped_storage()), None)
    return saved.total


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


def run_off(steps: Mapping[str, Step], seconds: float, clock: Callable[[Step, int], float]) -> dict[str, float]:
    """Milliseconds of each step: bursts in turn, and every turn in an order of its own, so that nobody always comes
    after the same.

    Steps are compared turn by turn, for a machine may be twice as fast in one second as in the next: a step's time is
    the median of the leader's, times the median of its ratios to the leader's in the turns that it took part in.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    calls: dict[str, int] = {}
    for name, step in steps.items():
        clock(step, 1)
        calls[name] = max(1, min(1000, round(BURST / max(clock(step, 1), 1e-9))))
    running, turns, spent, shuffle = list(steps), 0, 0.0, random.Random(0).sample
    while True:
        turns += 1
        for name in shuffle(running, len(running)):
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
