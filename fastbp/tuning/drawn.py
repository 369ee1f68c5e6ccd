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
from fastbp.kinks import Activate, Sides
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


def plain(job: Job, call: DrawnCall, activation: Activate | None = None) -> list[Tensor]:
    """Output and gradients by PyTorch's operations under its own autograd, in the dtype of the call."""
    bound: Any = bind(job.config.row.name, job.config.params)
    y = compose(job.config.form, activation or bound, call.inputs, call.weights, call.biases)
    return [y.detach(), *torch.autograd.grad(y, call.wanted, call.dy)]


def yardstick(job: Job, call: DrawnCall) -> list[Exact]:
    """What the results should be, by plain PyTorch in float64, and how far off they may be: see ``acceptance``.

    Plain PyTorch in the dtype sets the bounds, or for a policy whose gradients are not as exact as those of z, the
    reference by that policy; and what gradients are off by, by the slopes of z beside a kink (``kinks``). Of the rows a
    block is in memory at a time; of the parameters the float64 and that of their gradients.
    """
    bound: Any = bind(job.config.row.name, job.config.params)
    # In float64 PyTorch's own hardsigmoid is off: it takes its ⅙ in float32.
    activation: Activate = partial(_formula, job.config) if job.dtype == torch.float64 else bound
    sides = None if job.config.form.given else Sides(activation, job.dtype)  # of a given form z is as it is given
    if sides and not sides.kinks:
        sides = None
    own = plain(job, call, sides.noting(bound) if sides else None)
    names = _names(job, call)
    exact = [Exact(t, name) for t, name in zip(own, names, strict=True)]
    entered, beside = _put_exact(job, call, exact, activation, sides)
    policy, extra = POLICIES[job.config.save], 0.0
    if policy.compressed or (job.config.save == "output" and not job.config.row.output_exact):
        own = call.results(with_backend(job.config, REFERENCE))
    if policy.compressed and policy.from_output and job.dtype == torch.float32:
        extra = 64 * torch.finfo(job.dtype).eps  # the coefficients of these slopes alternate, and cancel up to 70-fold
    for truth, theirs, sizes, off in zip(exact, own, entered, beside, strict=True):
        truth.allow(theirs, extra, sizes, off)
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


def _put_exact(
    job: Job, call: DrawnCall, exact: Sequence[Exact], activation: Activate, sides: Sides | None
) -> tuple[list[float], list[Tensor | None]]:
    """The float64 of everything; of each sum over rows the RMS of what it was made of, 0 of the others; and how far off
    each gradient is with the slopes of the other sides, None where no z is beside a kink.
    """
    rows, form = job.sizes.rows, job.config.form
    parameters = [t for t in (*call.weights, *call.biases) if t is not None]
    wide = {id(t): t.detach().double().requires_grad_(t.requires_grad) for t in parameters}
    weights = [wide[id(w)] for w in call.weights]
    biases = [None if b is None else wide[id(b)] for b in call.biases]
    sums = [torch.zeros_like(wide[id(t)]) if id(t) in wide else None for t in call.wanted]
    off: list[Tensor] = []
    if sides:
        off = [torch.zeros_like(t if total is None else total) for t, total in zip(call.wanted, sums, strict=True)]
    squares = [0.0] * len(sums)
    step = max(1, min(rows_at_a_time(max(job.sizes.features)), -(-rows // BLOCKS)))
    for start in range(0, rows, step):
        at = slice(start, start + step)
        part = {id(t): t.detach()[at].double().requires_grad_(t.requires_grad) for t in call.inputs}
        inputs = [part[id(t)] for t in call.inputs]
        y = compose(form, activation, inputs, weights, biases)
        exact[0].put(start, y)
        leaves, dy = [wide.get(id(t), part.get(id(t))) for t in call.wanted], call.dy[at].double()
        other, turned = None, sides.turned if sides else 0
        if sides:
            other = compose(form, sides.other(at), inputs, weights, biases)
            other = None if sides.turned == turned else other
        for i, leaf in enumerate(leaves):  # one at a time, for the gradients of all weights are large together
            more = i + 1 < len(leaves)
            (grad,) = torch.autograd.grad(y, leaf, dy, retain_graph=more)  # type: ignore[arg-type]
            if other is not None:
                (theirs,) = torch.autograd.grad(other, leaf, dy, retain_graph=more)  # type: ignore[arg-type]
                (off[i][at] if sums[i] is None else off[i]).add_(theirs.sub_(grad).abs_())
            if sums[i] is None:
                exact[1 + i].put(start, grad)
            else:
                sums[i] += grad  # type: ignore[operator]
                squares[i] += grad.square_().sum().item()
    for i, total in enumerate(sums):
        if total is not None:
            exact[1 + i].put(0, total)
    entered = [(s / max(t.numel(), 1)) ** 0.5 for s, t in zip(squares, call.wanted, strict=True)]
    return [0.0, *entered], [None, *(off if sides and sides.turned else [None] * len(sums))]


def _formula(config: Config, z: Tensor) -> Tensor:
    """The table's value, in PyTorch's operations."""
    return config.row.value(z, *config.params)
