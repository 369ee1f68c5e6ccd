"""Training side by side, and the test whether two trainings are the same but for rounding.

Three runs start from the same weights and see the same batches: stock, fused, and *stock again*, rounded otherwise: its
weights are moved to a neighbouring float at the start and the samples of each batch come in reverse order. So it is the
first run but for rounding, and shows what rounding does to this very training on this very machine.

The fused run agrees if at every step its loss and its gradient's norm are no further from stock's than ``MARGIN``
times what rounding has done up to there (at least one rounding unit of the value). The loss alone would not do: AdamW
divides a gradient by its own size, so one that is wrong by a constant factor hardly moves the loss, but the norm shows
it at once.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbp import FusionReport, SavedBytes, fuse
from fastbp.demo.tasks import Task

# Tried on both tasks: right gradients with every product and activation rounded otherwise stay within 2.5 times what
# stock again shows, over a dozen seeds. Of the wrong ones, the closest is 20 times off: the slope of the tanh GELU for
# that of the erf GELU in one block. A gradient of one bias that is 1 % off is at 50 times.
MARGIN = 10.0
WARM_UP = 5  # steps that are not timed: allocators, caches and the optimizer's state settle
TAIL = 10  # steps at the end whose mean is the final training loss: that of one batch says little


@dataclass
class Run:
    """One model in training, and what was measured at every step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """A whole training step, timed."""
        began = _clock(inputs.device)
        loss = _loss(self.model(inputs), targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(_clock(inputs.device) - began)
        self.losses.append(loss.item())
        self.norms.append(norm.item())


@dataclass(frozen=True)
class Summary:
    """What a user wants to know of a run."""

    train_loss: float
    held_out_loss: float
    accuracy: float
    step_seconds: float
    kept_bytes: int  # by autograd, from the forward of a batch
    kept_bytes_per_hidden: float  # the same inside one block, beyond its input, for each hidden activation


@dataclass(frozen=True)
class Difference:
    """How far a quantity of a run is from stock's, step by step, and how far it may be."""

    steps: list[float]
    allowed: list[float]

    @classmethod
    def between(cls, stock: list[float], again: list[float], run: list[float], unit: float) -> Difference:
        """Of ``run`` from ``stock``, where ``again`` shows what rounding does and ``unit`` is the rounding unit."""
        s, a, r = (torch.tensor(values, dtype=torch.float64) for values in (stock, again, run))
        allowed = MARGIN * torch.maximum((a - s).abs(), unit * s.abs()).cummax(0).values
        return cls((r - s).abs().tolist(), allowed.tolist())

    @property
    def largest(self) -> float:
        return float(torch.tensor(self.steps, dtype=torch.float64).max())  # Python's max may pass over a NaN

    @property
    def share(self) -> float:
        """The largest part of what is allowed that was used; above 1, or not a number, the runs part."""
        return float(self._shares().max())

    def parts_at(self) -> int | None:
        """The first step, from 1, at which the difference is not within what is allowed."""
        beyond = (~(self._shares() <= 1)).nonzero()  # not "> 1", which no NaN is
        return int(beyond[0]) + 1 if len(beyond) else None

    def _shares(self) -> Tensor:
        return torch.tensor(self.steps, dtype=torch.float64) / torch.tensor(self.allowed, dtype=torch.float64)


@dataclass(frozen=True)
class Outcome:
    """The comparison of one task."""

    task: Task
    fusion: FusionReport
    runs: dict[str, Run]
    summaries: dict[str, Summary]

    def difference(self, name: str, quantity: str) -> Difference:
        """How far ``losses`` or ``norms`` of run ``name`` are from stock's."""
        stock, again, run = (getattr(self.runs[n], quantity) for n in ("stock", "again", name))
        return Difference.between(stock, again, run, torch.finfo(torch.float32).eps)

    def failures(self) -> list[str]:
        """Why fused is not as good as stock, a line each; empty where it is."""
        found = []
        if self.fusion.left or not self.fusion.fused or not self.fusion.ran:
            found.append("fastbp.fuse did not fuse every block; its report above says why")
        for quantity, words in (("losses", "loss"), ("norms", "norm of the gradient")):
            difference = self.difference("fused", quantity)
            step = difference.parts_at()
            if step is not None:
                found.append(
                    f"the {words} of stock and fused part at step {step}: they differ by "
                    f"{difference.steps[step - 1]:.1e}, rounding explains {difference.allowed[step - 1]:.1e}"
                )
        return found


def compare(task: Task, watch: Callable[[int, float], None]) -> Outcome:
    """Train the task's model stock, fused, and stock again with another rounding, step by step in turns.

    ``watch`` is called after every step with its number, from 1, and the loss.
    """
    models = {name: copy.deepcopy(task.model) for name in ("stock", "fused", "again")}
    fusion = fuse(models["fused"], sample_inputs=task.batches[0][0])
    with torch.no_grad():
        for parameter in models["again"].parameters():
            parameter.copy_(torch.nextafter(parameter, parameter + torch.randn_like(parameter)))
    runs = {name: Run(m, torch.optim.AdamW(m.parameters(), lr=task.learning_rate)) for name, m in models.items()}
    # Every order of the three in turn, so that none profits from what the one before left in the caches.
    orders = itertools.cycle(itertools.permutations(runs))
    for step, ((inputs, targets), order) in enumerate(zip(task.batches, orders, strict=False), start=1):
        for name in order:
            if name == "again":
                runs[name].step(inputs.flip(0), targets.flip(0))
            else:
                runs[name].step(inputs, targets)
        watch(step, runs["fused"].losses[-1])
    return Outcome(task, fusion, runs, {name: _summary(task, run) for name, run in runs.items()})


def _summary(task: Task, run: Run) -> Summary:
    inputs, targets = task.held_out
    with torch.no_grad():
        logits = run.model(inputs)
    batch = task.batches[0]
    with SavedBytes(exclude=[run.model]) as kept:
        _loss(run.model(batch[0]), batch[1])
    block = task.block(run.model)
    rows = torch.randn(256, task.block_width, device=inputs.device)
    with SavedBytes(exclude=[block, rows]) as kept_in_block:
        block(rows)
    return Summary(
        train_loss=statistics.fmean(run.losses[-TAIL:]),
        held_out_loss=_loss(logits, targets).item(),
        accuracy=(logits.argmax(-1) == targets).double().mean().item(),
        step_seconds=statistics.median(run.seconds[WARM_UP:]),
        kept_bytes=kept.total,
        kept_bytes_per_hidden=kept_in_block.total / (len(rows) * task.hidden),
    )


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
