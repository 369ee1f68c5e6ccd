"""The products of the Triton kernels that a call is made of, which have a choice of their own: of tiles."""

from __future__ import annotations

from fastbp import backends
from fastbp.backends.measured import Sizes
from fastbp.forms import Form
from fastbp.problem import Problem
from fastbp.tuning.isolation import Measuring, Product
from fastbp.tuning.jobs import Job


def products_of(form: Form, sizes: Sizes) -> list[Product]:
    """The products beside which the elementwise work of a call may be done: forward of each hidden layer, and the
    gradient with respect to each that has a linear above it."""
    rows, features = sizes
    prefix = "gated_" if form.gated else ""
    made = 0 if form.given else len(features) - 1 - form.projected
    found: list[Product] = [(f"{prefix}forward", (rows, features[i + 1], features[i])) for i in range(made)]
    above = range(0 if form.given else 1, len(features) - 1)
    return found + [(f"{prefix}dgrad", (rows, features[i], features[i + 1])) for i in above]


def tune(job: Job, seconds: float, measuring: Measuring) -> None:
    """Measure the tiles of a call's products on a GPU that the Triton kernels serve, where nobody has."""
    entry = backends.BACKENDS["triton"]
    problem = Problem(job.config, job.device, job.dtype)
    if job.device.type != "cuda" or job.dtype.itemsize != 2 or isinstance(entry, str):
        return
    if backends.refusal(entry, problem):
        return
    from fastbp.backends.triton import tuning  # imports Triton

    activation = job.config.row.name
    for kind, sizes in products_of(job.config.form, job.sizes):
        if tuning.recall(job.device, kind, activation, job.dtype, sizes) is None:
            times = measuring.product(job, (kind, sizes), seconds)
            if times:
                tuning.remember(job.device, tuning.key(kind, activation, job.dtype, sizes), times)
