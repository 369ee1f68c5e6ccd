"""What is timed: a step of a rival in one of the modes, on what all rivals of a case have in common."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cuda_clock, models
from benchmarks.cases import Case, Model
from benchmarks.clock import Staged, Step
from benchmarks.rivals import ALONE, MODULES, Run, eager, make_linears
from fastbp.kinks import Activate, Sides


class Calling(nn.Module):
    """A function as a module."""

    def __init__(self, function: Activate) -> None:
        super().__init__()
        self.forward = function


@dataclass(frozen=True)
class Task:
    """The modules and parameters that rivals share, and inputs, each with the gradient of its output; of a model, with
    what its output should be."""

    case: Case
    parts: list[Any]
    inputs: list[tuple[Tensor, Tensor]]

    @property
    def params(self) -> list[Tensor]:
        return list(dict.fromkeys(p for part in self.parts for p in part.parameters()))

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Also shared: a step of it is the same for everybody, and takes the same time."""
        return torch.optim.AdamW(self.params, lr=1e-4)

    def end(self, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where backward begins: at y with its gradient, or at a model's loss."""
        if not isinstance(self.case, Model):
            return y, target
        return F.cross_entropy(y.flatten(0, -2).float(), target.flatten()), None

    def wanted(self, run: Run, x: Tensor) -> list[Tensor]:
        """Of what there are to be gradients: all parameters, a rival's own if it has them, and x if it is a block's."""
        return [*([x] if x.requires_grad else []), *getattr(run, "own", self.params)]

    def results(self, run: Run, mode: str) -> list[Tensor]:
        """Output and gradients on the first input, for the linears as they are; of a forward pass the output."""
        x, target = self.inputs[0]
        if mode == "fwd":
            with torch.no_grad():
                return [run(x)]
        y = run(x)
        root, gradient = self.end(y, target)
        found = list(torch.autograd.grad(root, self.wanted(run, x), gradient))
        first = 1 if x.requires_grad else 0
        as_given = getattr(run, "as_given", list)  # of a rival with parameters of its own
        return [y.detach(), *found[:first], *as_given(found[first:])]

    def truth(self, mode: str) -> tuple[list[Tensor], Sequence[Tensor | None]]:
        """The results of eager in float64, and how far off each may be by z beside a kink (``fastbp.kinks``), None
        where no z is. Of a model, of which nobody looks at kinks, one input at a time, for the sake of memory.
        """
        wide = Task(self.case, [copy.deepcopy(part).double() for part in self.parts], [])
        run = eager(self.case, wide.parts)
        x, target = self.inputs[0]
        x = x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        if not isinstance(self.case, Model):
            wide.inputs.append((x, target.double()))
            exact = wide.results(run, mode)
            return exact, self._beside(wide, exact, mode)
        found = []
        for i in range(self.case.batch):
            wide.inputs[:] = [(x[i : i + 1], target[i : i + 1])]
            found.append(wide.results(run, mode))
        outputs, *gradients = zip(*found, strict=True)
        exact = [torch.cat(outputs), *(torch.stack(each).mean(0) for each in gradients)]
        return exact, [None] * len(exact)

    def _beside(self, wide: Task, exact: list[Tensor], mode: str) -> Sequence[Tensor | None]:
        """How far off the gradients are with the slopes of the other sides of kinks; an activation alone is given its z
        as it is.
        """
        nobody = [None] * len(exact)
        if self.case.kind == ALONE or mode == "fwd":
            return nobody
        activation = MODULES[self.case.activation]()
        sides = Sides(activation, self.case.dtype)
        if not sides.kinks:
            return nobody
        with torch.no_grad():
            eager(self.case, self.parts, Calling(sides.noting(activation)))(self.inputs[0][0])
        other = wide.results(eager(self.case, wide.parts, Calling(sides.other())), mode)
        return [None, *(o - e for o, e in zip(other[1:], exact[1:], strict=True))] if sides.turned else nobody


def task_of(case: Case, device: torch.device) -> Task:
    """The same for everybody, and drawn from the same seed at every call.

    On a GPU there are as many inputs as do not fit its L2 cache. On a CPU there is one: rivals take turns, and what the
    last one left in its caches is what another layer would have left.
    """
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    # On a GPU a generator of our own: a capture that failed may leave the default one unusable.
    generator = torch.Generator(device).manual_seed(0) if cuda else None
    if isinstance(case, Model):
        return Task(case, [models.build(case).to(device)], [models.batch(case, device, generator)])
    linears: list[nn.Module] = [linear.to(device) for linear in make_linears(case)]

    def draw(features: int) -> Tensor:
        return torch.randn(case.rows, features, dtype=case.dtype, device=device, generator=generator)

    bytes_each = case.rows * (case.features[0] + case.features[-1]) * case.dtype.itemsize
    copies = cuda_clock.copies(bytes_each, device) if cuda else 1
    pairs = [(draw(case.features[0]).requires_grad_(), draw(case.features[-1])) for _ in range(copies)]
    return Task(case, linears, pairs)


def step_of(task: Task, run: Run, mode: str, route: Callable[[], AbstractContextManager[None]] | None) -> Step:
    """A step on the next of the inputs, on a ``route`` if there is one."""
    turns = itertools.cycle([(x, task.wanted(run, x), target) for x, target in task.inputs])

    def forward() -> tuple[Tensor, list[Tensor], Tensor | None]:
        x, wanted, target = next(turns)
        root, gradient = task.end(run(x), target)
        return root, wanted, gradient

    def forward_alone() -> Tensor:
        with torch.no_grad():
            return run(next(turns)[0])

    def backward(forwarded: tuple[Tensor, list[Tensor], Tensor | None]) -> object:
        return torch.autograd.grad(*forwarded)

    def train() -> None:
        forward()[0].backward()
        task.optimizer.step()
        task.optimizer.zero_grad()

    steps: dict[str, Step] = {
        "fwd": forward_alone,
        "bwd": Staged(forward, backward),
        "fwd_bwd": lambda: backward(forward()),
        "train": train,
    }
    return steps[mode] if route is None else _routed(steps[mode], route)


def _routed(step: Step, route: Callable[[], AbstractContextManager[None]]) -> Step:
    def on_it(call: Callable[..., Any]) -> Callable[..., Any]:
        def routed(*arguments: Any) -> Any:
            with route():
                return call(*arguments)

        return routed

    if isinstance(step, Staged):
        return Staged(on_it(step.setup), on_it(step.timed))
    return on_it(step)
