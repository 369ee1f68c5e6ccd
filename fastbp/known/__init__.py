"""Blocks whose code is known to the last token, run whole: forwards read from their source, and nn.Sequential.

Nothing is run to know a block, and nothing is believed for longer than a call: each call looks up again every name that
the code reads. Where one of them stands for something else now, the module's own forward runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules.container import Sequential

from fastbp.activations import Bound
from fastbp.copies import base_of, can_derive
from fastbp.forms import LINEAR_ACT, MLP
from fastbp.known.block import Block
from fastbp.known.calls import FusedCall, is_idle, looks_linear, make_call, may_idle
from fastbp.known_acts import (
    KnownAct,
    Names,
    kept,
    looks_plainly,
    read_act,
    read_resolved,
    unchanged,
)
from fastbp.stock import stock

_SEQUENTIAL = stock(Sequential, "forward"), stock(Sequential, "__iter__")


RAN = "_fastbp_ran"  # of a fused module's __dict__: of each of the plan's calls, whether it was one the last time


class _Plan:
    """What the plans share; they never change."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


@dataclass(frozen=True, eq=False)
class BlockPlan(_Plan):
    """How a module runs whose forward was read: one fused call, and perhaps other children behind it, one by one."""

    call: FusedCall
    forward_read: FunctionType
    code: CodeType
    argument: str
    names: Names
    children: tuple[str, ...]
    functions: tuple[tuple[str, Any], ...]  # attributes that are the activation, written as functions
    after: tuple[str, ...]
    save: str = "auto"
    backend: str | None = None

    @property
    def calls(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        """The names of the linears of each fused call, and the call in words."""
        return (self.call.words,)

    def refuses(self, save: str) -> str | None:
        """Why a policy cannot serve, or None."""
        return self.call.refuses(save)

    def forward(self, module: nn.Module, base: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's forward: as one call if all is as it was read, else its own."""
        y = None
        if len(args) + len(kwargs) == 1 and (args or self.argument in kwargs) and self._holds(module, base):
            x = args[0] if args else kwargs[self.argument]
            children: Any = [module._modules[name] for name in self.after]
            y = self.call.run(module._modules, x, self.save, self.backend)
        if not is_compiling():
            module.__dict__[RAN] = (y is not None,)
        if y is None:
            return base.forward(module, *args, **kwargs)
        for name, found in zip(self.after, children, strict=True):
            child: Any = module._modules.get(name)
            if child is not found or name in module.__dict__:
                raise RuntimeError(
                    f"fastbp: {name} of {base.__qualname__} was replaced while the forward ran, and a fused module "
                    "cannot tell which its forward would call; leave it out by fuse(filter_fn=), or call fastbp.unfuse"
                )
            y = y if is_idle(child, y) else child(y)
        return y

    def _holds(self, module: nn.Module, base: type[nn.Module]) -> bool:
        """Whether all that the forward reads besides its children's own affairs is what it was."""
        forward: Any = base.forward
        if forward is not self.forward_read or forward.__code__ is not self.code or not self.names.hold():
            return False
        own = module.__dict__
        for name, value in self.functions:
            if not unchanged(own.get(name), value) or hasattr(base, name):
                return False
        shadows = (own, module._parameters, module._buffers) if module._parameters or module._buffers else (own,)
        for name in self.children:
            if hasattr(base, name) or name not in module._modules:
                return False
            for found in shadows:
                if name in found:
                    return False
        return looks_plainly(base)


@dataclass(frozen=True, eq=False)
class SequentialPlan(_Plan):
    """How an nn.Sequential runs: its children in order, runs of them as fused calls."""

    names: tuple[str, ...]
    steps: tuple[tuple[tuple[str, ...], FusedCall | None], ...]  # the children of a step, and how they are one call
    save: str = "auto"
    backend: str | None = None

    @property
    def calls(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        """The names of the linears of each fused call, and the call in words."""
        return tuple(call.words for _, call in self.steps if call is not None)

    def refuses(self, save: str) -> str | None:
        """Why a policy cannot serve, or None."""
        return next((why for _, call in self.steps if call is not None and (why := call.refuses(save))), None)

    def forward(self, module: nn.Module, base: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The Sequential's forward; a run that is not what it was is called child by child."""
        children: Any = module._modules
        given = len(args) + len(kwargs) == 1 and (args or "input" in kwargs)
        if not given or (base.forward, base.__iter__) != _SEQUENTIAL or tuple(children) != self.names:  # type: ignore
            if not is_compiling():
                module.__dict__[RAN] = ()
            return base.forward(module, *args, **kwargs)
        ran: tuple[bool, ...] = ()
        h = args[0] if args else kwargs["input"]
        for names, call in self.steps:
            y = None if call is None else call.run(children, h, self.save, self.backend)
            if call is not None:
                ran = (*ran, y is not None)
            if y is None:
                for name in names:
                    h = children[name](h)
            else:
                h = y
        if not is_compiling():
            module.__dict__[RAN] = ran
        return h


Plan = BlockPlan | SequentialPlan


def read(module: nn.Module) -> Plan | str:
    """How a module can run whole as it is now; if its code is not known, or is no block, what is in the way."""
    kind = base_of(module)
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if not can_derive(kind):
        return "its class has code that runs whenever a class is made of it"
    if issubclass(kind, Sequential) and (kind.forward, kind.__iter__) == _SEQUENTIAL:
        return _read_sequential(module)
    forward: Any = inspect.getattr_static(kind, "forward")
    found = read_resolved(forward)
    if isinstance(found, str):
        return found
    if not looks_plainly(kind):
        return "its class finds attributes in a way of its own"
    reading, names, value = found
    block = Block(module, value)
    call, after = block.match(value)
    if isinstance(call, str):
        return call
    functions = tuple((name, kept(module.__dict__[name])) for name, role in block.roles.items() if type(role) is Bound)
    children = tuple(name for name, role in block.roles.items() if type(role) is not Bound)
    return BlockPlan(call, forward, reading.code, reading.argument, names, children, functions, after)


def _read_sequential(module: nn.Module) -> SequentialPlan | str:
    """Runs of linears with one activation between them, or after one linear; idle children may stand before a linear.

    The longest chain of linears with the same activation between them becomes one ``mlp``.
    """
    children = module._modules
    names, acts = list(children), {n: act for n, c in children.items() if isinstance(act := _act_of(c), KnownAct)}
    steps: list[tuple[tuple[str, ...], FusedCall | None]] = []
    i = 0
    while i < len(names):
        step = _run_at(children, names[i:], acts)
        steps.append(step)
        i += len(step[0])
    if not any(call for _, call in steps):
        return "it has no linear with an activation behind it"
    return SequentialPlan(tuple(names), tuple(steps))


def _act_of(child: nn.Module | None) -> KnownAct | str:
    return "" if child is None or may_idle(child) or looks_linear(child) else read_act(child)


def _run_at(
    children: Mapping[str, nn.Module | None], names: list[str], acts: Mapping[str, KnownAct]
) -> tuple[tuple[str, ...], FusedCall | None]:
    """The step that begins with the first of these children."""
    alone = (names[0],), None
    if len(names) < 2 or names[1] not in acts or not looks_linear(children[names[0]]):
        return alone
    activation, linears, end = acts[names[1]].activation, [names[0]], 1
    while end < len(names) and names[end] in acts and acts[names[end]].activation == activation:
        behind = end + 1
        while behind < len(names) and may_idle(children[names[behind]]):
            behind += 1
        if behind == len(names) or isinstance(make_call(MLP, children, [names[behind]], activation, (), ()), str):
            break
        linears.append(names[behind])
        end = behind + 1
    end = 2 if len(linears) == 1 else end
    run = names[:end]
    form = LINEAR_ACT if len(linears) == 1 else MLP
    idle = tuple(name for name in run if may_idle(children[name]))
    call = make_call(form, children, linears, activation, tuple((n, acts[n]) for n in run if n in acts), idle)
    return alone if isinstance(call, str) else (tuple(run), call)
