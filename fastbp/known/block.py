"""What the names that a forward reads stand for, and the fused call that they make together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastbp.activations import Bound
from fastbp.copies import base_of
from fastbp.forms import GATED_LINEAR_ACT, GATED_MLP, LINEAR_ACT, MLP
from fastbp.known.calls import FusedCall, looks_linear, make_call, may_idle
from fastbp.known_acts import KnownAct, WrittenAct, function_of, read_act
from fastbp.source import ARGUMENT, Value, parts_of

_LINEAR_ROLE, _IDLE_ROLE = "linear", "idle"
_NO_BLOCK = "its forward puts linears and activations together in another way than a block"


class Block:
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
        """The longest call that a value begins with, or why there is none; and the children that are called behind."""
        whole, after = self._match(value)
        call, passed = whole, tuple[str, ...]()
        while isinstance(call, str):
            match value:
                case ("call", ("own", name), (value,), ()) if (
                    name in self._children and type(self.roles[name]) is not Bound
                ):
                    passed = (name, *passed)
                    call, after = self._match(value)
                case _:
                    return whole, ()
        return call, (*after, *passed)

    def _match(self, value: Value) -> tuple[FusedCall | str, tuple[str, ...]]:
        """The call that a value is, or why it is none; and the dropouts behind it."""
        reason = next(self._strangers(value), None)
        roles = {part[1]: self.roles[part[1]] for part in parts_of(value) if part[0] == "own"}
        acts = {name: role for name, role in roles.items() if isinstance(role, KnownAct)}
        bounds = {role for role in roles.values() if type(role) is Bound} | {a.activation for a in acts.values()}
        functions = [part[1] for part in parts_of(value) if part[0] == "constant"]
        written = tuple(dict.fromkeys(f for f in functions if type(f) is WrittenAct))
        bounds |= {f for f in functions if type(f) is Bound} | {f.activation for f in written}
        value, after = self._strip(value)
        form, *linears = self._shape(value)
        if reason or form is None or len(bounds) != 1 or len(set(linears)) != len(linears):
            return reason or _NO_BLOCK, ()
        idle = tuple(part[1] for part in parts_of(value) if part[0] == "own" and self.roles[part[1]] == _IDLE_ROLE)
        found = tuple(acts.items()), tuple(dict.fromkeys(idle))
        return make_call(form, self._children, linears, bounds.pop(), *found, written), tuple(reversed(after))

    def _strangers(self, value: Value) -> Iterator[str]:
        for part in parts_of(value):
            match part:
                case ("own", name):
                    role = self.roles[name]
                    if isinstance(role, str) and role not in (_LINEAR_ROLE, _IDLE_ROLE):
                        yield role
                case ("constant", thing) if type(thing) not in (Bound, WrittenAct):
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
            case ("call", ("constant", Bound() | WrittenAct()), (inner,), ()):
                return self._inner(self._strip(inner)[0], _LINEAR_ROLE)
            case ("call", ("own", name), (inner,), ()) if isinstance(self.roles[name], (KnownAct, Bound)):
                return self._inner(self._strip(inner)[0], _LINEAR_ROLE)
        return "", value
