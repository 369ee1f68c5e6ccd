"""Runs of linears and activations inside an ``nn.Sequential``, read from its children each time it is called.

Nothing is remembered about the children but the activations that had to be recognised by their values: what is
appended, replaced or hooked later is seen by the next call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from fastbp import recognition
from fastbp.activations import Bound
from fastbp.fusion.linears import is_idle, looks_linear
from fastbp.modules import is_plain, run_chain
from fastbp.recognition import has_hooks, of_known_module


@dataclass(frozen=True)
class SequentialPlan:
    """The settings of a fused Sequential, and the children whose activation was recognised by its values."""

    recognised: Mapping[str, tuple[type, Bound]]
    save: str
    backend: str | None

    def forward(self, module: nn.Module, base: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The Sequential's forward with its runs fused."""
        if len(args) + len(kwargs) == 1 and (args or "input" in kwargs):
            return run_sequential(module, self, args[0] if args else kwargs["input"])  # type: ignore[arg-type]
        return base.forward(module, *args, **kwargs)


@dataclass(frozen=True)
class Run:
    """Children ``names`` as one fused call: linears with one activation between them, perhaps after the last."""

    names: tuple[str, ...]
    linears: tuple[nn.Module, ...]
    activation: Bound
    projected: bool

    @property
    def call(self) -> str:
        """The fused call in words."""
        return f"{'mlp' if self.projected else 'linear_act'}, {self.activation!r}"


def recognise_children(module: nn.Sequential) -> dict[str, tuple[type, Bound]]:
    """The children that are activations by their values and not by their class."""
    found = {}
    for name, child in module._modules.items():
        if child is not None and of_known_module(child) is None and not list(child.children()):
            try:
                found[name] = (type(child), recognition.resolve(child))
            except ValueError:
                continue
    return found


def find_runs(
    module: nn.Sequential, plan: SequentialPlan, idle: Callable[[nn.Module | None], bool] = is_idle
) -> list[Run | nn.Module]:
    """The children in order, grouped into fused runs where they can be.

    The longest chain of linears with the same activation between them becomes one ``mlp``; a linear with an activation
    after it and no linear behind that becomes a ``linear_act``. Between an activation and a linear there may be
    children that are ``idle``.
    """
    children = list(module._modules.items())  # not named_children(), which passes over a child that is there twice
    steps: list[Run | nn.Module] = []
    i = 0
    while i < len(children):
        run = _run_at(children, i, plan, idle)
        steps.append(run or children[i][1])
        i += len(run.names) if run else 1
    return steps


def find_unplain(module: nn.Sequential, plan: SequentialPlan) -> list[str]:
    """The linears before an activation that are no plain ones any more, or never were."""
    children = list(module._modules.items())
    return [
        name
        for (name, child), following in pairwise(children)
        if child is not None and looks_linear(child) and not is_plain(child) and _activation_of(following, plan)
    ]


def _run_at(
    children: Sequence[tuple[str, nn.Module | None]],
    start: int,
    plan: SequentialPlan,
    idle: Callable[[nn.Module | None], bool],
) -> Run | None:
    first = children[start][1]
    if start + 1 >= len(children) or first is None or not is_plain(first):
        return None
    activation = _activation_of(children[start + 1], plan)
    if activation is None:
        return None
    linears, stop = [first], start + 1
    while stop < len(children) and _activation_of(children[stop], plan) == activation:
        behind = stop + 1
        while behind < len(children) and idle(children[behind][1]):
            behind += 1
        following = children[behind][1] if behind < len(children) else None
        if following is None or not is_plain(following):
            break
        linears.append(following)
        stop = behind + 1
    projected = len(linears) > 1
    if not projected:
        stop += 1
    return Run(tuple(name for name, _ in children[start:stop]), tuple(linears), activation, projected)


def _activation_of(child: tuple[str, nn.Module | None], plan: SequentialPlan) -> Bound | None:
    name, module = child
    if module is None or has_hooks(module):
        return None
    bound = of_known_module(module)
    if bound is None and name in plan.recognised:
        kind, remembered = plan.recognised[name]
        bound = remembered if type(module) is kind else None
    return None if bound is None or bound.name == "identity" else bound


def run_sequential(module: nn.Sequential, plan: SequentialPlan, input: Tensor) -> Tensor:
    """The Sequential's forward with its runs fused."""
    h = input
    for step in find_runs(module, plan):
        if isinstance(step, Run):
            h = run_chain(step.linears, step.activation, plan.save, plan.backend, h, projected=step.projected)
        else:
            h = step(h)
    return h
