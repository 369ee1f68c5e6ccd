"""Blocks whose code is known to the last token, run whole: forwards read from their source, and nn.Sequential.

Nothing is run to know a block, and nothing is believed for longer than a call: each call looks up again every name that
the code reads. Where one of them stands for something else now, the module's own forward runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from fastbp.activations import Bound
from fastbp.copies import base_of
from fastbp.forms import GATED_LINEAR_ACT, GATED_MLP, LINEAR_ACT, MLP
from fastbp.known.calls import FusedCall, is_idle, looks_linear, make_call, may_idle
from fastbp.known_acts import KnownAct, Names, function_of, kept, looks_plainly, read_act, read_resolved, unchanged
from fastbp.source import ARGUMENT, Value, parts_of

_SEQUENTIAL = nn.Sequential.forward, nn.Sequential.__iter__  # as they were before anybody patched them


RAN = "_fastbp_ran"  # of a fused module's __dict__: of each of the plan's calls, whether it was one the last time


class _Plan:
    """What the plans share; they never change."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


@dataclass(frozen=True, eq=False)
class BlockPlan(_Plan):
    """How a module runs whose forward was read: one fused call, and perhaps dropouts behind it."""

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
            y = self.call.run(module._modules, x, self.save, self.backend)
        if not is_compiling():
            module.__dict__[RAN] = (y is not None,)
        if y is None:
            return base.forward(module, *args, **kwargs)
        for name in self.after:
            child: Any = module._modules[name]
            y = y if is_idle(child) else child(y)
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
    if issubclass(kind, nn.Sequential) and (kind.forward, kind.__iter__) == _SEQUENTIAL:
        return _read_sequential(module)
    forward: Any = inspect.getattr_static(kind, "forward")
    found = read_resolved(forward)
    if isinstance(found, str):
        return found
    if not looks_plainly(kind):
        return "its class finds attributes in a way of its own"
    reading, names, value = found
    block = _Block(module, value)
    call, after = block.match(value)
    if isinstance(call, str):
        return call
    functions = tuple((name, kept(module.__dict__[name])) for name, role in block.roles.items() if type(role) is Bound)
    children = tuple(name for name, role in block.roles.items() if type(role) is not Bound)
    return BlockPlan(call, forward, reading.code, reading.argument, names, children, functions, after)


_LINEAR_ROLE, _IDLE_ROLE = "linear", "idle"
_NO_BLOCK = "its forward puts linears and activations together in another way than a block"


class _Block:
    """What the names stand for that a forward reads, and the call that they make together."""

    def __init__(self, module: nn.Module, value: Value) -> None:
        self._children = module._modules
        names = dict.fromkeys(part[1] for part in parts_of(value) if part[0] == "own")
        self.roles = {name: self._role(module, name) for name in names}

    def _role(self, module: nn.Module, name: str) -> str | KnownAct | Bound:
        """What a name stands for; a reason if for nothing that is known."""
        child = self._children.get(name)
        if hasattr(base_of(module), name) or name in module._parameters or name in module._buffers:
            return f"its forward reads {name}, which is no child"
        if name in module.__dict__:
            return function_of(module.__dict__[name]) or f"its forward reads {name}, which is no activation function"
        if child is None:
            return f"its forward reads {name}, which is not there"
        if looks_linear(child):
            return _LINEAR_ROLE
        if may_idle(child):
            return _IDLE_ROLE
        act = read_act(child)
        return f"{name}: {act}" if isinstance(act, str) else act

    def match(self, value: Value) -> tuple[FusedCall | str, tuple[str, ...]]:
        """The call that a value is, or why it is none; and the dropouts behind it."""
        reason = next(self._strangers(value), None)
        acts = {name: role for name, role in self.roles.items() if isinstance(role, KnownAct)}
        bounds = {role for role in self.roles.values() if type(role) is Bound} | {a.activation for a in acts.values()}
        bounds |= {part[1] for part in parts_of(value) if part[0] == "constant" and type(part[1]) is Bound}
        value, after = self._strip(value)
        form, *linears = self._shape(value)
        if reason or form is None or len(bounds) != 1 or len(set(linears)) != len(linears):
            return reason or _NO_BLOCK, ()
        idle = tuple(part[1] for part in parts_of(value) if part[0] == "own" and self.roles[part[1]] == _IDLE_ROLE)
        found = tuple(acts.items()), tuple(dict.fromkeys(idle))
        return make_call(form, self._children, linears, bounds.pop(), *found), tuple(reversed(after))

    def _strangers(self, value: Value) -> Iterator[str]:
        for part in parts_of(value):
            match part:
                case ("own", name):
                    role = self.roles[name]
                    if isinstance(role, str) and role not in (_LINEAR_ROLE, _IDLE_ROLE):
                        yield role
                case ("constant", thing) if type(thing) is not Bound:
                    yield f"its forward has {getattr(thing, '__name__', repr(thing))}"
                case (sign, _, _) if sign != "*":
                    yield f"its forward has `{sign}`"

    def _shape(self, value: Value) -> tuple[Any, ...]:
        """The form and the names of the linears; form None where it is none."""
        linears: list[str] = []
        name, inner = self._inner(value, _LINEAR_ROLE)
        if projected := bool(name) and (inner := self._strip(inner)[0]) != ARGUMENT:
            linears, value = [name], inner
        if value[0] == "*":
            for gate, up in (value[1:], value[:0:-1]):
                first, below = self._layer(self._strip(gate)[0])
                second, beside = self._inner(self._strip(up)[0], _LINEAR_ROLE)
                if first and second and self._strip(below)[0] == self._strip(beside)[0] == ARGUMENT:
                    return GATED_MLP if linears else GATED_LINEAR_ACT, first, second, *linears
            return (None,)
        while value != ARGUMENT:
            name, inner = self._layer(value)
            if not name:
                return (None,)
            linears, value = [name, *linears], self._strip(inner)[0]
        return MLP if projected else LINEAR_ACT if len(linears) == 1 else None, *linears

    def _inner(self, value: Value, role: str) -> tuple[str, Value]:
        """Of a call of a child in this role: its name, and what it is called with; else ""."""
        match value:
            case ("call", ("own", name), (inner,), ()) if self.roles[name] == role:
                return name, inner
        return "", value

    def _strip(self, value: Value) -> tuple[Value, list[str]]:
        """What idle children are called with, and their names."""
        names = []
        while (found := self._inner(value, _IDLE_ROLE))[0]:
            names.append(found[0])
            value = found[1]
        return value, names

    def _layer(self, value: Value) -> tuple[str, Value]:
        """Of an activation of a linear: its name, and what it is called with; else ""."""
        match value:
            case ("call", ("constant", Bound()), (inner,), ()):
                return self._inner(self._strip(inner)[0], _LINEAR_ROLE)
            case ("call", ("own", name), (inner,), ()) if isinstance(self.roles[name], (KnownAct, Bound)):
                return self._inner(self._strip(inner)[0], _LINEAR_ROLE)
        return "", value


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
