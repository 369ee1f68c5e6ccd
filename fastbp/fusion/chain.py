"""How a chain runs fused: hidden of one linear, of gate and up, or of one that holds both, and what is around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastbp import functional
from fastbp.activations import Bound
from fastbp.casts import cast_weight
from fastbp.forms import GATED_LINEAR_ACT, GATED_MLP, LINEAR_ACT, MLP, Form
from fastbp.fusion.linears import LinearKind, Parts, Settings, is_idle, parts_of
from fastbp.recognition import has_hooks, of_known_module


@dataclass(frozen=True)
class Packing:
    """How one linear holds gate and up."""

    name: str
    interleaved: bool  # rows of the two in turn, else one half after the other
    gate_first: bool

    def split(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """(gate, up) of a weight (2 N, K) or a bias (2 N,), as views."""
        shape, dim = ((-1, 2), 1) if self.interleaved else ((2, -1), 0)
        first, second = tensor.unflatten(0, shape).unbind(dim)
        return (first, second) if self.gate_first else (second, first)


PACKINGS = tuple(
    Packing(f"{'interleaved' if i else 'halves'}, gate {'first' if g else 'last'}", i, g)
    for i in (False, True)
    for g in (True, False)
)


@dataclass(frozen=True)
class ChainPlan:
    """How a fused module runs: which children in which order, and which activation."""

    before: tuple[str, ...]
    hidden: tuple[str, ...]  # one linear, or gate and up
    packing: Packing | None
    between: tuple[str, ...]
    parted: bool  # something between always acts, as a norm does
    last: str | None
    after: tuple[str, ...]
    activation: Bound
    activation_child: str | None  # None where the activation is written in the module's forward
    activation_type: type | None
    kinds: tuple[LinearKind, ...]  # of the linears
    settings: Settings
    argument: str  # what the forward calls its input
    save: str
    backend: str | None

    @property
    def gated(self) -> bool:
        return len(self.hidden) == 2 or self.packing is not None

    @property
    def linears(self) -> tuple[str, ...]:
        return self.hidden if self.last is None else (*self.hidden, self.last)

    @property
    def forms(self) -> tuple[Form, ...]:
        """The whole call, and what is left of it while something between acts."""
        apart, whole = (GATED_LINEAR_ACT, GATED_MLP) if self.gated else (LINEAR_ACT, MLP)
        return (apart,) if self.last is None or self.parted else (whole, apart) if self.between else (whole,)

    @property
    def call(self) -> str:
        """The fused call in words."""
        return f"{self.forms[0].name}, {self.activation!r}"

    def forward(self, module: nn.Module, base: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward: fused if it still is what it was when it was fused, else its own."""
        if len(args) + len(kwargs) == 1 and (args or self.argument in kwargs):
            x = args[0] if args else kwargs[self.argument]
            children = module._modules
            parts = parts_of([children.get(name) for name in self.linears], self.kinds)
            if parts is not None and _one_dtype(parts[0]) and self._holds(module):
                return self.run(children, parts, x)  # type: ignore[arg-type]
        return base.forward(module, *args, **kwargs)

    def _holds(self, module: nn.Module) -> bool:
        children = module._modules
        if not self.settings.hold(module) or any(
            children.get(name) is None for name in (*self.before, *self.between, *self.after)
        ):
            return False
        return self.activation_child is None or still_computes(
            children.get(self.activation_child), self.activation_type, self.activation
        )

    def run(self, children: Mapping[str, nn.Module], parts: Parts, x: Tensor) -> Tensor:
        """The chain on these children, whose linears have these weights and biases."""
        weights, biases = parts
        h = _call_all(children, self.before, x)
        if self.packing is not None:
            weights = (*self.packing.split(cast_weight(weights[0])), *weights[1:])
            first = biases[0]
            biases = (*((None, None) if first is None else self.packing.split(cast_weight(first))), *biases[1:])
        if self.last is None or (not self.parted and all(is_idle(children[name]) for name in self.between)):
            h = functional.call(self.forms[0], h, weights, biases, self.activation, self.save, self.backend)
        else:
            count = self.forms[-1].width
            h = functional.call(
                self.forms[-1], h, weights[:count], biases[:count], self.activation, self.save, self.backend
            )
            h = _call_all(children, self.between, h)
            assert self.last is not None
            h = children[self.last](h)
        return _call_all(children, self.after, h)


def still_computes(child: nn.Module | None, kind: type | None, activation: Bound) -> bool:
    """Whether a child is the activation that it was."""
    if child is None or type(child) is not kind or has_hooks(child):
        return False
    known = of_known_module(child)
    return known is None or known == activation


def _one_dtype(weights: tuple[Tensor, ...]) -> bool:
    return all(w.dtype is weights[0].dtype for w in weights)


def _call_all(children: Mapping[str, nn.Module], names: tuple[str, ...], h: Tensor) -> Tensor:
    for name in names:
        if not is_idle(children[name]):
            h = children[name](h)
    return h
