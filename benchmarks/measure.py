"""How it is measured: right before fast, all rivals in turn, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.rivals import RIVALS, make_linears
from benchmarks.suites import Case

Step = Callable[[], object]


def prepare(case: Case, names: Iterable[str]) -> tuple[dict[str, Step], dict[str, dict[str, object]]]:
    """A forward and backward step for every rival that serves the case, and how accurate each is.

    All rivals have the same parameters and the same random input. ``error`` is the largest relative RMS error of output
    and gradients against float64; ``accurate`` says whether each is at most twice eager's, and a rounding unit.
    AssertionError where a result of fastbp's is not, or one of anybody's is no result at all.
    """
    torch.manual_seed(0)
    linears = make_linears(case)
    x = torch.randn(case.rows, case.features[0], dtype=case.dtype).requires_grad_()
    inputs = [x, *(p for linear in linears for p in linear.parameters())]
    runs = {name: RIVALS[name].make(case, linears) for name in names}
    dy = torch.randn(case.rows, case.features[-1], dtype=case.dtype)

    def step(run: Callable[[Tensor], Tensor]) -> Step:
        return lambda: torch.autograd.grad(run(x), inputs, dy)

    truth = _truth(case, linears, x, dy)
    # A z next to a kink may fall to either side of it: a few of the slopes differ as a whole, in whoever computes them.
    kinks = 4 / (case.rows * max(case.features)) ** 0.5 if case.activation == "relu" else 0.0
    slack = torch.finfo(case.dtype).eps + kinks
    found: dict[str, dict[str, object]] = {}
    for name, run in runs.items():
        if run is None or not RIVALS[name].same_function:
            continue
        y = run(x)
        results = [y, *torch.autograd.grad(y, inputs, dy)]
        errors = [_error(mine, exact) for mine, exact in zip(results, truth, strict=True)]
        if name == "eager":
            allowed = [2 * e + slack for e in errors]
        accurate = all(e <= a for e, a in zip(errors, allowed, strict=True))
        assert accurate or not name.startswith("fastbp"), f"{case.name}: {name} is inaccurate: {errors}"
        assert max(errors) < 0.1 + kinks, f"{case.name}: {name} is wrong: {errors}"
        found[name] = {"error": float(f"{max(errors):.3g}"), "accurate": accurate}
    return {name: step(run) for name, run in runs.items() if run is not None}, found


def _truth(case: Case, linears: list[torch.nn.Linear], x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and gradients of the eager block in float64."""
    wide = [torch.nn.Linear(m.in_features, m.out_features, dtype=torch.float64) for m in linears]
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


def bursts(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of a step, of every rival: bursts of calls in turn, until each has had its seconds.

    A burst is long enough to be warm and to dwarf the clock: 10 ms, or one call.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    calls: dict[str, int] = {}
    for name, step in steps.items():
        for _ in range(3):
            start = time.perf_counter()
            step()
            once = time.perf_counter() - start
        calls[name] = max(1, min(200, round(0.01 / once)))
    spent = 0.0
    while spent < seconds * len(steps) or len(next(iter(times.values()))) < 5:
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                step()
            burst = time.perf_counter() - start
            times[name].append(burst / calls[name] * 1e3)
            spent += burst
    return times


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
