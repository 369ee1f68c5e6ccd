"""Blocks whose code is known to the last token, run whole: forwards read from their source, and nn.Sequential.

Nothing is run to know a block, and nothing is believed for longer than a call: each call looks up again every name that
the code reads. Where one of them stands for something else now, the module's own forward runs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled as any_autocast
from torch.utils._device import DeviceContext

from fastbp import functional, readers, saving, sharding
from fastbp.activations import Bound
from fastbp.casts import cast_all, cast_weight
from fastbp.forms import GATED_LINEAR_ACT, GATED_MLP, LINEAR_ACT, MLP, Form
from fastbp.fusion.elementwise import (
    KnownAct,
    Names,
    function_of,
    kept,
    looks_plainly,
    read_act,
    read_resolved,
    unchanged,
)
from fastbp.fusion.source import ARGUMENT, Value, parts_of
from fastbp.fusion.surgery import base_of
from fastbp.linear import Linear
from fastbp.modules import PLAIN_TENSORS, plain_parts
from fastbp.problem import DTYPES, check
from fastbp.recognition import has_hooks

Parts = tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]

# As they were before anybody patched them.
_SEQUENTIAL = nn.Sequential.forward, nn.Sequential.__iter__
_LINEAR = F.linear, nn.Linear.forward, Linear.forward
_IDLE = F.dropout, nn.Dropout.forward, nn.Identity.forward


@dataclass(frozen=True, eq=False)
class Transposed:
    """The class of transformers' Conv1D, whose weight is (in, out)."""

    kind: type[nn.Module]
    forward: Any

    def parts(self, linears: Sequence[nn.Module | None]) -> Parts | None:
        """The weights as (out, in), cast where autocast is on, and the biases, if all are of the class and plain."""
        if self.kind.forward is not self.forward or plain_parts(()) is None:
            return None
        weights: tuple[Any, ...] = ()
        biases: tuple[Any, ...] = ()
        for linear in linears:
            if linear is None or readers.base_of(linear) is not self.kind or has_hooks(linear):
                return None
            weight: Any = linear.weight
            if type(weight) not in PLAIN_TENSORS:
                return None
            weights, biases = (*weights, cast_weight(weight).mT), (*biases, linear.bias)
        return weights, biases


def transposed() -> Transposed | None:
    """transformers' Conv1D, where somebody has imported it."""
    kind: Any = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    own = kind is not None and getattr(kind.forward, "__qualname__", "") == "Conv1D.forward"
    return Transposed(kind, kind.forward) if own and kind.forward.__module__ == kind.__module__ else None


def may_idle(child: nn.Module | None) -> bool:
    """Whether a child is of a kind that can be idle."""
    return type(child) in (nn.Identity, nn.Dropout)


def is_idle(child: nn.Module | None) -> bool:
    """Whether a child hands on what it gets: an nn.Identity, or a dropout that does not drop now."""
    if child is None or not may_idle(child) or has_hooks(child):
        return False
    now = F.dropout, nn.Dropout.forward, nn.Identity.forward
    return now == _IDLE and (not isinstance(child, nn.Dropout) or not child.training or child.p == 0)


@dataclass(frozen=True, eq=False)
class FusedCall:
    """Children of a module as one fused call."""

    form: Form
    linears: tuple[str, ...]
    activation: Bound
    acts: tuple[tuple[str, KnownAct], ...]  # the children that are the activation; none where a function is
    idle: tuple[str, ...]  # the children that have to be idle
    transposed: Transposed | None

    @property
    def words(self) -> tuple[tuple[str, ...], str]:
        """The names of the linears, and the call."""
        return self.linears, f"{self.form.name}, {self.activation!r}"

    def refuses(self, save: str) -> str | None:
        """Why a policy cannot serve, or None."""
        return None if save == "auto" else saving.POLICIES[save].illegal(self.activation, self.form)

    def run(self, children: Mapping[str, nn.Module | None], x: Any, save: str, backend: str | None) -> Tensor | None:
        """y, or None where children, tensors or surroundings are not what the call needs."""
        for name, act in self.acts:
            if not act.holds(children.get(name)):
                return None
        for name in self.idle:
            if not is_idle(children.get(name)):
                return None
        on_mesh = type(x) not in PLAIN_TENSORS
        if (F.linear, nn.Linear.forward, Linear.forward) != _LINEAR or (on_mesh and not sharding.is_dtensor(x)):
            return None
        linears: Any = [children.get(name) for name in self.linears]
        parts = self.transposed.parts(linears) if self.transposed else plain_parts(linears, on_mesh)
        if parts is None or (on_mesh and not sharding.applies(x, (*parts[0], *parts[1]))):
            return None
        if not _only_device_modes() or (self._widened and any_autocast()):
            return None
        try:
            return functional.call(self.form, x, *parts, self.activation, save, backend)
        except (TypeError, ValueError):
            try:
                check(self.form, *_as_autocast(x, *parts))
            except (TypeError, ValueError):
                return None  # PyTorch speaks, of a call that is wrong or that only it can make
            raise

    @property
    def _widened(self) -> bool:
        """Whether under autocast PyTorch gives the result in float32, where fastbp gives it as a linear does."""
        return not self.form.projected and (self.activation.name == "softplus" or any(a.spelled for _, a in self.acts))


def _as_autocast(x: Tensor, weights: tuple[Any, ...], biases: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """The tensors of a call as it sees them."""
    device = x.device.type
    if any_autocast() and torch.is_autocast_enabled(device):
        x, *cast = cast_all((x, *weights, *biases), torch.get_autocast_dtype(device), device)
        weights, biases = tuple(cast[: len(weights)]), tuple(cast[len(weights) :])
    return x, weights, biases


def _only_device_modes() -> bool:
    """Whether no mode looks at the functions that are called, but for a default device."""
    for i in range(torch._C._len_torch_function_stack()):
        if type(torch._C._get_function_stack_at(i)) is not DeviceContext:
            return False
    return True


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
            return base.forward(module, *args, **kwargs)
        h = args[0] if args else kwargs["input"]
        for names, call in self.steps:
            y = None if call is None else call.run(children, h, self.save, self.backend)
            if y is None:
                for name in names:
                    h = children[name](h)
            else:
                h = y
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
        return _make_call(form, self._children, linears, bounds.pop(), *found), tuple(reversed(after))

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


def looks_linear(child: nn.Module | None) -> bool:
    """Whether a child is a linear layer, or what somebody put around one."""
    like = hasattr(child, "in_features") and hasattr(child, "out_features")
    return isinstance(child, nn.Linear) or like or type(child).__name__ == "Conv1D"


def _make_call(
    form: Form,
    children: Mapping[str, nn.Module | None],
    names: Sequence[str],
    activation: Bound,
    acts: tuple[tuple[str, KnownAct], ...],
    idle: tuple[str, ...],
) -> FusedCall | str:
    linears: Any = [children[name] for name in names]
    kind = transposed()
    parts = plain_parts(linears, on_mesh=True)
    if parts is None and kind is not None:
        parts = kind.parts(linears)
    else:
        kind = None
    if parts is None:
        return f"{', '.join(names)} are not all plain nn.Linears (a subclass, hooks, or a wrapped weight)"
    kinds = {(t.dtype, t.device, t.layout) for t in (*parts[0], *parts[1]) if t is not None}
    if len(kinds) > 1 or kinds.pop()[0] not in DTYPES or parts[0][0].layout is not torch.strided:
        return "its weights are on several devices, of several dtypes, or no dense floating-point numbers"
    return FusedCall(form, tuple(names), activation, acts, idle, kind)


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
        if behind == len(names) or isinstance(_make_call(MLP, children, [names[behind]], activation, (), ()), str):
            break
        linears.append(names[behind])
        end = behind + 1
    end = 2 if len(linears) == 1 else end
    run = names[:end]
    form = LINEAR_ACT if len(linears) == 1 else MLP
    idle = tuple(name for name in run if may_idle(children[name]))
    call = _make_call(form, children, linears, activation, tuple((n, acts[n]) for n in run if n in acts), idle)
    return alone if isinstance(call, str) else (tuple(run), call)
