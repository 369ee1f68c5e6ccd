"""The products of the Triton kernels that a call is made of, which have a choice of their own: of tiles."""

from __future__ import annotations

from collections.abc import Mapping

from fastbp import backends
from fastbp.backends.measured import Sizes
from fastbp.forms import Form
from fastbp.problem import Problem
from fastbp.tuning.jobs import Job
from fastbp.tuning.race import Step, clock_of, run_off

Product = tuple[str, tuple[int, int, int]]  # kind, and m, n, k


def products_of(form: Form, sizes: Sizes) -> list[Product]:
    """The products beside which the elementwise work of a call may be done: forward of each hidden layer, and the
    gradient with respect to each that has a linear above it."""
    rows, features = sizes
    prefix = "gated_" if form.gated else ""
    made = 0 if form.given else len(features) - 1 - form.projected
    found: list[Product] = [(f"{prefix}forward", (rows, features[i + 1], features[i])) for i in range(made)]
    above = range(0 if form.given else 1, len(features) - 1)
    return found + [(f"{prefix}dgrad", (rows, features[i], features[i + 1])) for i in above]


def tune(job: Job, seconds: float) -> None:
    """Measure the tiles of a call's products on a GPU that the Triton kernels serve, where nobody has."""
    entry = backends.BACKENDS["triton"]
    problem = Problem(job.config, job.device, job.dtype)
    if job.device.type != "cuda" or job.dtype.itemsize != 2 or isinstance(entry, str):
        return
    if backends.refusal(entry, problem):
        return
    from fastbp.backends.triton import autotune, tuning  # imports Triton

    def clock(steps: Mapping[str, Step]) -> dict[str, float]:
        return run_off(steps, seconds, clock_of(job.device))

    activation = job.config.row.name
    for kind, sizes in products_of(job.config.form, job.sizes):
        if tuning.recall(job.device, kind, activation, job.dtype, sizes) is None:
            autotune.tune(kind, activation, job.dtype, sizes, job.device, clock)
