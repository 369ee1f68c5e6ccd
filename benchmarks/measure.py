"""How it is measured: right before fast, all rivals in turn, medians with their spread."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import cuda_clock
from benchmarks.rivals import RIVALS, make_linears
from benchmarks.suites import Case

Step = Callable[[], object]
Run = Callable[[Tensor], Tensor]


class Prepared(NamedTuple):
    """What there is to time of a case."""

    steps: dict[str, Step]  # a forward and backward of every rival that serves, each call on the next of the copies
    accuracy: dict[str, dict[str, object]]
    left_out: dict[str, str]  # the other rivals, and why
    broken: dict[str, str]  # routes of fastbp that a call does not take by itself, and what is wrong with them
    copies: int


def prepare(case: Case, names: Iterable[str], device: torch.device) -> Prepared:
    """A forward and backward step for every rival that serves the case, and how accurate each is.

    All rivals have the same parameters and the same random inputs: one of each on a CPU, on a GPU as many as do not fit
    its L2 cache. ``error`` is the largest relative RMS error of output and gradients against float64; ``accurate`` says
    whether each is at most twice eager's, and a rounding unit. AssertionError where a result of fastbp's is not (unless
    by a compressed policy), or one of anybody's is no result at all. A rival that raises is left out, and a forced
    route of fastbp is broken, with its reason; eager and fastbp itself may not raise.
    """
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    linears = [linear.to(device) for linear in make_linears(case)]
    # On a GPU a generator of our own: a capture that failed may leave the default one unusable.
    generator = torch.Generator(device).manual_seed(0) if cuda else None

    def draw(features: int) -> Tensor:
        return torch.randn(case.rows, features, dtype=case.dtype, device=device, generator=generator)

    bytes_each = case.rows * (case.features[0] + case.features[-1]) * case.dtype.itemsize
    copies = cuda_clock.copies(bytes_each, device) if cuda else 1
    pairs = [(draw(case.features[0]).requires_grad_(), draw(case.features[-1])) for _ in range(copies)]
    params = [p for linear in linears for p in linear.parameters()]
    x, dy = pairs[0]
    truth = _truth(case, linears, x, dy)
    # A z next to a kink may fall to either side of it: a few of the slopes differ as a whole, in whoever computes them.
    kinks = 4 / (case.rows * max(case.features)) ** 0.5 if case.activation == "relu" else 0.0
    slack = torch.finfo(case.dtype).eps + kinks
    found = Prepared({}, {}, {}, {}, copies)
    for name in names:
        rival = RIVALS[name]
        run = rival.make(case, linears)
        if run is None:
            found.left_out[name] = f"does not serve this case on {device.type}"
            continue
        try:
            errors = [
                _error(mine, exact) for mine, exact in zip(_results(name, run, x, dy, params), truth, strict=True)
            ]
            if name == "eager":
                allowed = [2 * e + slack for e in errors]
            if rival.same_function:
                accurate = all(e <= a for e, a in zip(errors, allowed, strict=True))
                bound = name.startswith("fastbp") and rival.exact
                assert accurate or not bound, f"{case.name}: {name} is inaccurate: {errors}"
                assert max(errors) < 0.1 + kinks, f"{case.name}: {name} is wrong: {errors}"
                found.accuracy[name] = {"error": float(f"{max(errors):.3g}"), "accurate": accurate}
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if rival.route is not None:
                found.broken[name] = reason
            elif name == "eager" or name.startswith("fastbp") or isinstance(error, AssertionError):
                raise
            else:
                found.left_out[name] = reason
            continue
        found.steps[name] = _step(name, run, pairs, params)
    return found


def _results(name: str, run: Run, x: Tensor, dy: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    with RIVALS[name].on_its_route():
        y = run(x)
        return [y, *torch.autograd.grad(y, [x, *params], dy)]


def _step(name: str, run: Run, pairs: Sequence[tuple[Tensor, Tensor]], params: Sequence[Tensor]) -> Step:
    """A forward and backward on the next of the inputs."""
    turns = itertools.cycle([(x, [x, *params], dy) for x, dy in pairs])

    def step() -> object:
        x, inputs, dy = next(turns)
        return torch.autograd.grad(run(x), inputs, dy)

    if RIVALS[name].route is None:
        return step

    def on_its_route() -> object:
        with RIVALS[name].on_its_route():
            return step()

    return on_its_route


def _truth(case: Case, linears: list[torch.nn.Linear], x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and gradients of the eager block in float64."""
    wide = [torch.nn.Linear(m.in_features, m.out_features, dtype=torch.float64, device=x.device) for m in linears]
    for copy, linear in zip(wide, linears, strict=True):
        copy.load_state_dict(linear.state_dict())
    block = RIVALS["eager"].make(case, wide)
    assert block is not None
    x = x.detach().double().requires_grad_()
    y = block(x)
    return [y, *torch.autograd.grad(y, [x, *(p for m in wide for p in m.parameters())], dy.double())]


def _error(found: Tensor, exact: Tensor) -> float:
    """The RMS error over the RMS value."""
    return ((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


def burst(step: Step, calls: int) -> float:
    """Seconds of so many calls, by the host's clock."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - start


def bursts(
    steps: dict[str, Step], seconds: float, burst: Callable[[Step, int], float] = burst
) -> dict[str, list[float]]:
    """Milliseconds of a step, of every rival: bursts of calls in turn, until each has had its seconds.

    A burst is long enough to be warm and to dwarf the clock: 10 ms, or one call.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    calls: dict[str, int] = {}
    for name, step in steps.items():
        for _ in range(3):
            once = burst(step, 1)
        calls[name] = max(1, min(200, round(0.01 / once)))
    spent = 0.0
    while spent < seconds * len(steps) or len(next(iter(times.values()))) < 5:
        for name, step in steps.items():
            spent_now = burst(step, calls[name])
            times[name].append(spent_now / calls[name] * 1e3)
            spent += spent_now
    return times


def on_cuda(prepared: Prepared, seconds: float) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """The figures that only a GPU has, of every rival: its replayed graph, and the host. And who has no graph, why.

    A graph holds a step on each of the copies.
    """
    graphs: dict[str, Step] = {}
    ungraphed: dict[str, str] = {}
    for name, step in prepared.steps.items():
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


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median, the 80th."""
    ordered = sorted(values)
    return ordered[len(ordered) // 5], statistics.median(ordered), ordered[-1 - len(ordered) // 5]
