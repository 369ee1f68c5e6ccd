"""A call on random tensors, and what it should compute: plain PyTorch in float64, and plain PyTorch in its dtype."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastbp.acceptance import Exact, rows_at_a_time
from fastbp.activations import bind
from fastbp.autograd import run
from fastbp.backends import REFERENCE, with_backend
from fastbp.memory import SavedBytes
from fastbp.problem import Config
from fastbp.reference import compose
from fastbp.saving import POLICIES
from fastbp.tuning.jobs import Job

BLOCKS = 16  # of rows at least, where there are as many: their spread tells what a sum over rows was made of


class DrawnCall(NamedTuple):
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

    def kept(self, config: Config) -> int:
        """The bytes kept for backward beside the inputs, parameters and y, which are there anyway."""
        tensors = [t for t in (*self.inputs, *self.weights, *self.biases) if t is not None]
        with SavedBytes(exclude=tensors) as saved:
            y = self.forward(config)
        saved._kept.pop(StorageWeakRef(y.untyped_storage()), None)
        return saved.total


def draw(job: Job) -> DrawnCall:
    """The same numbers at every call."""
    generator = torch.Generator(job.device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=job.device) * scale).to(job.dtype)

    (rows, features), form = job.sizes, job.config.form
    shapes = list(zip(features[1:], features, strict=False))
    if form.gated and not form.given:
        shapes.insert(0, shapes[0])
    inputs = tuple(random(rows, features[0]) for _ in range(form.inputs))
    weights = tuple(random(n, k, scale=k**-0.5) for n, k in shapes)
    biases = tuple(random(n) if any_bias else None for (n, _), any_bias in zip(shapes, job.biases, strict=True))
    wanted = [
        t.requires_grad_()
        for t, need in zip((*inputs, *weights, *biases), job.needs, strict=True)
        if need and t is not None
    ]
    return DrawnCall(inputs, weights, biases, random(rows, features[-1]), wanted)


def plain(job: Job, call: DrawnCall) -> list[Tensor]:
    """Output and gradients by PyTorch's operations under its own autograd, in the dtype of the call."""
    y = compose(job.config.form, bind(job.config.row.name, job.config.params), call.inputs, call.weights, call.biases)
    return [y.detach(), *torch.autograd.grad(y, call.wanted, call.dy)]


def yardstick(job: Job, call: DrawnCall) -> list[Exact]:
    """What the results should be, by plain PyTorch in float64, and how far off they may be: see ``acceptance``.

    Plain PyTorch in the dtype sets the bounds, or for a policy whose gradients are not as exact as those of z, the
    reference by that policy. Of the rows a block is in memory at a time; of the parameters the float64 and that of
    their gradients.
    """
    own = plain(job, call)
    names = _names(job, call)
    exact = [Exact(t, name) for t, name in zip(own, names, strict=True)]
    entered = _put_exact(job, call, exact)
    policy, extra = POLICIES[job.config.save], 0.0
    if policy.compressed or (job.config.save == "output" and not job.config.row.output_exact):
        own = call.results(with_backend(job.config, REFERENCE))
    if policy.compressed and policy.from_output and job.dtype == torch.float32:
        extra = 64 * torch.finfo(job.dtype).eps  # the coefficients of these slopes alternate, and cancel up to 70-fold
    for index, (truth, theirs) in enumerate(zip(exact, own, strict=True)):
        # The output has no kinks, and of a given form the gradients are at z as it is given.
        kinked = index > 0 and not job.config.form.given and _has_kink(job.config)
        slack, local = _slack(job) if kinked else (0.0, 0.0)
        truth.allow(theirs, slack + extra, local + extra, entered[index])
    return exact


def _names(job: Job, call: DrawnCall) -> list[str]:
    """The output, and the gradients that are wanted."""
    form = job.config.form
    names = list(form.names_of_inputs)
    for kind, tensors in (("weight", call.weights), ("bias", call.biases)):
        names += [form.argument(kind, i) for i in range(len(tensors))]
    tensors = (*call.inputs, *call.weights, *call.biases)
    wanted = {id(t) for t in call.wanted}
    return ["y", *(f"the gradient of {name}" for name, t in zip(names, tensors, strict=True) if id(t) in wanted)]


def _put_exact(job: Job, call: DrawnCall, exact: Sequence[Exact]) -> list[float]:
    """The float64 of everything; and of each sum over rows the RMS of what it was made of, 0 of the others."""
    rows, row = job.sizes.rows, job.config.row
    activation: Any = bind(row.name, job.config.params)
    if job.dtype == torch.float64:  # in which PyTorch's own hardsigmoid is off: it takes its ⅙ in float32
        activation = partial(_formula, job.config)
    parameters = [t for t in (*call.weights, *call.biases) if t is not None]
    wide = {id(t): t.detach().double().requires_grad_(t.requires_grad) for t in parameters}
    weights = [wide[id(w)] for w in call.weights]
    biases = [None if b is None else wide[id(b)] for b in call.biases]
    sums = [torch.zeros_like(wide[id(t)]) if id(t) in wide else None for t in call.wanted]
    squares = [0.0] * len(sums)
    step = max(1, min(rows_at_a_time(max(job.sizes.features)), -(-rows // BLOCKS)))
    for start in range(0, rows, step):
        part = {id(t): t.detach()[start : start + step].double().requires_grad_(t.requires_grad) for t in call.inputs}
        y = compose(job.config.form, activation, [part[id(t)] for t in call.inputs], weights, biases)
        exact[0].put(start, y)
        leaves, dy = [wide.get(id(t), part.get(id(t))) for t in call.wanted], call.dy[start : start + step].double()
        for i, leaf in enumerate(leaves):  # one at a time, for the gradients of all weights are large together
            (grad,) = torch.autograd.grad(y, leaf, dy, retain_graph=i + 1 < len(leaves))  # type: ignore[arg-type]
            if sums[i] is None:
                exact[1 + i].put(start, grad)
            else:
                sums[i] += grad  # type: ignore[operator]
                squares[i] += grad.square_().sum().item()
    for i, total in enumerate(sums):
        if total is not None:
            exact[1 + i].put(0, total)
    return [0.0, *((s / max(t.numel(), 1)) ** 0.5 for s, t in zip(squares, call.wanted, strict=True))]


def _formula(config: Config, z: Tensor) -> Tensor:
    """The table's value, in PyTorch's operations."""
    return config.row.value(z, *config.params)


def _slack(job: Job) -> tuple[float, float]:
    """What slopes that differ as a whole add to the error of gradients: a z next to a kink may fall to either side.

    In the whole of a result, and in a single row or column of it, of which one such slope may be a large part.
    """
    numbers = job.sizes.rows * max(job.sizes.features)
    whole = 2 * ((1 + 4 * numbers * torch.finfo(job.dtype).eps) / numbers) ** 0.5
    return float(whole), 12 / min(job.sizes.rows, *job.sizes.features) ** 0.5


def _has_kink(config: Config) -> bool:
    z = torch.arange(-8, 8, 2**-10, dtype=torch.float64)
    return bool(config.row.grad(torch.ones_like(z), z, *config.params).diff().abs().max() > 0.05)
