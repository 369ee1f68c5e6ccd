"""A linear and its activation, and the linear behind them, in the midst of a larger module's forward.

The module's own forward goes on running, norms, attention, residuals and all; only what it reads as ``self.fc1``,
``self.act`` and ``self.fc2`` is replaced for the time of the call. For that it runs on a twin: an object of a subclass
of the module's class that shares the module's ``__dict__``, so every attribute is the same, but for properties of these
three names. Either fc1 is the fused pair and act hands on, or all of it is done where fc2 is called and the others hand
on: so where nothing in between changes what passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling

from fastbp import functional
from fastbp.activations import Bound
from fastbp.forms import LINEAR_ACT, MLP, Form
from fastbp.fusion.chain import still_computes
from fastbp.fusion.linears import LinearKind, Settings, is_idle, parts_of

PLAN = "_fastbp_plan"
TWINS = "_fastbp_twins"


@dataclass(frozen=True)
class Pair:
    """``act(fc(x))`` inside a module, and perhaps the linear that takes it."""

    linear: str
    act: str
    activation: Bound
    act_type: type | None  # None where it is a function among the attributes
    last: str | None
    between: tuple[str, ...]  # dropouts that must be idle for all three to be one call
    in_training: bool  # whether the three can be one call in training, as far as their forward is concerned
    kinds: tuple[LinearKind, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        return (self.linear,) if self.last is None else (self.linear, self.last)

    @property
    def forms(self) -> tuple[Form, ...]:
        return (LINEAR_ACT,) if self.last is None else (MLP, LINEAR_ACT)

    @property
    def call(self) -> str:
        """The fused call in words."""
        return f"{self.forms[0].name}, {self.activation!r}"


@dataclass(frozen=True)
class InsidePlan:
    """How a module runs with its pairs fused."""

    pairs: tuple[Pair, ...]
    settings: Settings
    save: str
    backend: str | None

    def forward(self, module: nn.Module, base: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward with its pairs fused where they still are what they were."""
        if not self.settings.hold(module):
            return base.forward(module, *args, **kwargs)
        children, whole = module._modules, True
        for pair in self.pairs:
            if pair.act_type is not None and not still_computes(children.get(pair.act), pair.act_type, pair.activation):
                return base.forward(module, *args, **kwargs)
            parts = parts_of([children.get(name) for name in pair.linears], pair.kinds)
            if parts is None:
                whole = False
                if parts_of([children.get(pair.linear)], pair.kinds[:1]) is None:
                    return base.forward(module, *args, **kwargs)
            elif pair.last is not None:
                whole &= pair.in_training or not module.training
                whole = whole and all(is_idle(children.get(name)) for name in pair.between)
        return base.forward(self._twin(module, base, whole), *args, **kwargs)

    def _twin(self, module: nn.Module, base: type[nn.Module], whole: bool) -> nn.Module:
        own = module.__dict__
        twins = own.get(TWINS)
        # A copy of the module (a replica, a checkpoint of its __dict__) would still have the first one's.
        if not is_compiling() and (twins is None or twins[0].__dict__ is not own):
            twins = own[TWINS] = make_twins(module, base, self.pairs)
        return twins[whole]  # type: ignore[index, no-any-return]


def make_twins(module: nn.Module, base: type[nn.Module], pairs: tuple[Pair, ...]) -> tuple[nn.Module, nn.Module]:
    """The twins by which a module runs: with pairs fused, and with whole blocks."""
    names = tuple((pair.linear, pair.act, pair.last) for pair in pairs)
    twins = tuple(object.__new__(_twin_class(base, names, whole)) for whole in (False, True))  # type: ignore[arg-type]
    for twin in twins:
        object.__setattr__(twin, "__dict__", module.__dict__)
    return twins  # type: ignore[return-value]


@cache
def _twin_class(base: type[nn.Module], names: tuple[tuple[str, str, str | None], ...], whole: bool) -> type[nn.Module]:
    body: dict[str, Any] = {"__module__": base.__module__}
    for index, (linear, act, last) in enumerate(names):
        body[act] = _hands_on(act)
        if whole and last is not None:
            body[linear], body[last] = _hands_on(linear), _fused(last, index, MLP)
        else:
            body[linear] = _fused(linear, index, LINEAR_ACT)
    return type(base.__name__, (base,), body | {"__qualname__": base.__qualname__})


def _hands_on(name: str) -> property:
    return property(lambda owner: _HandsOn(owner, name))


def _fused(name: str, index: int, form: Form) -> property:
    return property(lambda owner: _Fused(owner, name, index, form))


class _InPlace:
    """Stands for an attribute while its owner's forward runs; what else is asked of it, it asks the real one."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self._owner, self._name = owner, name

    def __getattr__(self, name: str) -> Any:
        children = self._owner._modules
        return getattr(children[self._name] if self._name in children else self._owner.__dict__[self._name], name)


class _HandsOn(_InPlace):
    def __call__(self, input: Tensor) -> Tensor:
        return input


class _Fused(_InPlace):
    def __init__(self, owner: nn.Module, name: str, index: int, form: Form) -> None:
        super().__init__(owner, name)
        self._index, self._form = index, form

    def __call__(self, input: Tensor) -> Tensor:
        plan: InsidePlan = self._owner.__dict__[PLAN]
        pair, children = plan.pairs[self._index], self._owner._modules
        names = pair.linears if self._form is MLP else (pair.linear,)
        parts = parts_of([children[name] for name in names], pair.kinds[: len(names)])
        assert parts is not None  # the forward that made the twin has asked
        return functional.call(self._form, input, *parts, pair.activation, plan.save, plan.backend)
