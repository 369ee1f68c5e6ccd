"""Activations whose code is known: torch.nn's, and modules whose forward is one by its source."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from fastbp import recognition
from fastbp.activations import TABLE, Activation, Bound, bind
from fastbp.copies import base_of
from fastbp.recognition import has_hooks
from fastbp.source import ARGUMENT, Reading, Value, look_up, parts_of, read, read_expression, read_function
from fastbp.stock import is_defined_in, named, stock

_FORWARDS = {row.module: stock(row.module, "forward") for row in TABLE if row.module is not None}


@dataclass(frozen=True, eq=False)
class Names:
    """The globals of a method, as they were when it was read."""

    look: Callable[[], tuple[Any, ...]]
    found: tuple[Any, ...]
    written: tuple[WrittenAct, ...] = ()  # those of them that were read themselves

    def hold(self) -> bool:
        """Whether they still are the same objects."""
        try:
            now = self.look()
        except (AttributeError, KeyError, NameError):
            return False
        for a, b in zip(now, self.found, strict=True):  # half of what all() of a generator costs
            if a is not b:
                return False
        for act in self.written:  # noqa: SIM110
            if not act.holds():
                return False
        return True


@dataclass(frozen=True, eq=False)
class WrittenAct:
    """A function that is an activation by its source and by the globals that this reads."""

    function: FunctionType
    code: CodeType
    names: Names
    activation: Bound
    spelled: bool  # in several operations
    narrow: bool  # with constants that are others in float64
    writes: bool  # over its argument

    def holds(self) -> bool:
        """Whether it is that activation now."""
        return self.function.__code__ is self.code and self.names.hold()


def read_resolved(method: FunctionType) -> tuple[Reading, Names, Value] | str:
    """What a method computes, with its globals looked up; or what is not known about it."""
    return _with_names(method, read(method), True)


def _with_names(method: FunctionType, reading: Reading | str, deep: bool) -> tuple[Reading, Names, Value] | str:
    if isinstance(reading, str):
        return reading
    paths = _paths_of(reading.value)
    names = Names(look := look_up(method, paths), ())
    try:
        names = Names(look, look())
    except (AttributeError, NameError) as error:
        return f"in its forward, {error}"
    value = _resolved(reading.value, dict(zip(paths, names.found, strict=True)), deep)
    written = tuple(part[1] for part in parts_of(value) if part[0] == "constant" and type(part[1]) is WrittenAct)
    return reading, replace(names, written=written), value


def _paths_of(value: Value) -> tuple[str, ...]:
    """The globals that a value reads, each once."""
    return tuple(dict.fromkeys(part[1] for part in parts_of(value) if part[0] == "global"))


def _resolved(value: Value, objects: dict[str, Any], deep: bool = False) -> Value:
    """A value with objects for globals, and an activation for its function with its keywords; ``deep``: also for a
    function that has to be read itself."""
    match value:
        case ("global", path):
            return "constant", objects[path]
        case ("call", function, arguments, keywords):
            function = _resolved(function, objects)
            arguments = tuple(_resolved(v, objects, deep) for v in arguments)
            keywords = tuple((name, _resolved(v, objects)) for name, v in keywords)
            if len(arguments) == 1 and {function[0], *(v[0] for _, v in keywords)} == {"constant"}:
                given = {name: v[1] for name, v in keywords}
                act = _bound(function[1], given) or (_written(function[1]) if deep and not given else None)
                function, keywords = (function, keywords) if act is None else (("constant", act), ())
            return "call", function, arguments, keywords
        case (sign, left, right):
            return sign, _resolved(left, objects, deep), _resolved(right, objects, deep)
    return value


def _bound(function: Any, keywords: dict[str, Any]) -> Bound | None:
    if not all(map(_is_scalar, keywords.values())):
        return None
    try:
        return recognition.of_known_function(function, keywords)
    except (TypeError, ValueError):  # parameters that mean no activation
        return None


def _written(function: Any) -> WrittenAct | None:
    """The activation that a function of somebody's is by its source."""
    found = _with_names(function, read_function(function), False) if type(function) is FunctionType else ""
    if isinstance(found, str):
        return None
    reading, names, value = found
    bound, spelled, narrow = _known(value)
    writes = _writes(reading.value, names)
    return None if bound is None else WrittenAct(function, reading.code, names, bound, spelled, narrow, writes)


def _writes(value: Value, names: Names) -> bool:
    """Whether a forward may write over its argument: by a function whose name says so, or by ``inplace``."""
    if any(map(_writes_in_place, names.found)) or any(act.writes for act in names.written):
        return True
    keywords = [dict(part[3]) for part in parts_of(value) if part[0] == "call"]
    return any(given.get("inplace", _NOT) != _NOT for given in keywords)


_NOT: Value = ("constant", False)


def _writes_in_place(function: Any) -> bool:
    if type(function) is partial:
        return bool(function.keywords.get("inplace")) or _writes_in_place(function.func)
    return str(getattr(function, "__name__", "")).endswith("_")


def _known(value: Value) -> tuple[Bound | None, bool, bool]:
    """The activation that a value is, None if it is none; whether it is spelled, and whether narrow."""
    bound = _spelled(value, _SPELLINGS)
    if bound is not None:
        return bound, True, _spelled(value, _NARROW) is not None
    match value:
        case ("call", ("constant", Bound() as bound), (inner,), ()) if inner == ARGUMENT:
            return bound, False, False
        case ("call", ("constant", WrittenAct() as act), (inner,), ()) if inner == ARGUMENT:
            return act.activation, act.spelled, act.narrow
    return None, False, False


def _is_scalar(value: object) -> bool:
    return isinstance(value, (float, int, str, type(None)))


def _may_change(value: object) -> bool:
    """Whether a value can change in place, unseen by ``unchanged``."""
    return not _is_scalar(value) and not callable(value)


def function_of(value: object) -> Bound | None:
    """The activation that a function, or a partial of one, is by its identity."""
    if type(value) is partial:
        return None if value.args else _bound(value.func, value.keywords)
    return _bound(value, {})


def _read_spellings(texts_of: Callable[[Activation], tuple[str, ...]]) -> dict[Value, Bound]:
    found = {}
    for row in TABLE:
        for value in [read_expression(text, "z") for text in texts_of(row)]:
            objects = {part[1]: named(part[1]) for part in parts_of(value) if part[0] == "global"}
            found[_resolved(value, objects)] = bind(row.name)
    return found


_NARROW = _read_spellings(lambda row: row.spellings_32)
_SPELLINGS = _read_spellings(lambda row: row.spellings) | _NARROW


def kept(value: Any) -> Any:
    """An attribute to compare with later; a partial can be changed in place, so it is copied."""
    return partial(value.func, **value.keywords) if type(value) is partial else value


def unchanged(value: Any, before: Any) -> bool:
    """Whether an attribute is what ``kept`` was given."""
    if type(before) is partial:
        same = type(value) is partial and value.func is before.func and not value.args
        return same and value.keywords == before.keywords
    return value is before or (type(value) is type(before) and _is_scalar(value) and value == before)


def looks_plainly(kind: type[nn.Module]) -> bool:
    """Whether attributes of such modules are found as those of any nn.Module."""
    return kind.__getattr__ is nn.Module.__getattr__ and kind.__getattribute__ is object.__getattribute__


def is_called_plainly(kind: type[nn.Module]) -> bool:
    """Whether calling such modules means what calling any nn.Module does."""
    return kind.__call__ is nn.Module.__call__


@dataclass(frozen=True, eq=False)
class KnownAct:
    """A child that is an activation, by its class's forward and the attributes and globals that this reads."""

    kind: type[nn.Module]
    forward: FunctionType
    code: CodeType
    names: Names
    settings: tuple[tuple[str, Any], ...]
    activation: Bound
    spelled: bool  # in several operations
    narrow: bool  # with constants that are others in float64
    writes: bool  # over its argument; not of one of PyTorch's, whose ``inplace`` may change

    @property
    def widened(self) -> bool:
        """Whether under autocast PyTorch gives the result in float32."""
        return self.spelled or self.activation.name == "softplus"

    def holds(self, child: nn.Module | None) -> bool:
        """Whether this child is that activation now."""
        if child is None or base_of(child) is not self.kind or has_hooks(child) or not is_called_plainly(self.kind):
            return False
        forward: Any = self.kind.forward
        if forward is not self.forward or forward.__code__ is not self.code:
            return False
        for name, value in self.settings:
            if not unchanged(getattr(child, name, None), value):
                return False
        return self.names.hold()


def read_act(child: nn.Module) -> KnownAct | str:
    """The activation that a child is, or why it is not known to be one."""
    kind, own = base_of(child), child.__dict__
    forward: Any = inspect.getattr_static(kind, "forward")
    if (kind.__module__, kind.__name__) == _BLOOM:
        return _read_bloom(kind, forward)
    apart = has_hooks(child) or not is_called_plainly(kind)
    found = "it has hooks or is called in a way of its own" if apart else read_resolved(forward)
    if isinstance(found, str):
        return f"{kind.__name__}: {found}"
    reading, names, value = found
    settings: dict[str, Any] = {}
    writes = _writes(reading.value, names)
    activation, spelled, narrow = _known(value)
    match value:
        case _ if forward is _FORWARDS.get(kind):
            if all(f is named(path) for path, f in zip(_paths_of(reading.value), names.found, strict=True)):
                activation = _of_module(child)
            writes = False
            if activation is not None:
                row = activation.row
                settings = {name: getattr(child, name) for name, _ in (*row.module_attributes, *row.params)}
        case ("call", ("own", name), (inner,), ()) if inner == ARGUMENT and looks_plainly(kind):
            activation = None if hasattr(kind, name) else function_of(own.get(name))
            settings = {name: kept(own.get(name))}
            writes = writes or _writes_in_place(own.get(name))
    if activation is None or activation.name == "identity" or any(map(_may_change, settings.values())):
        return f"{kind.__name__} is no activation whose code is known"
    return KnownAct(kind, forward, reading.code, names, tuple(settings.items()), activation, spelled, narrow, writes)


_BLOOM = "transformers.models.bloom.modeling_bloom", "BloomGelu"


def _read_bloom(kind: type[nn.Module], forward: Any) -> KnownAct | str:
    """Bloom's GELU, a Function of its own: its value by its source; that its backward is the derivative, by its name.

    Of a stranger's Function nobody knows that: the gradient of a straight-through estimator is another on purpose.
    """
    space = forward.__globals__

    def look() -> tuple[Any, ...]:
        function = space["GeLUFunction"]
        parts = forward, function.forward, function.backward, space["bloom_gelu_forward"], space["bloom_gelu_back"]
        return function, *parts, *(part.__code__ for part in parts)

    try:
        found = look()
    except (AttributeError, KeyError):
        return f"{kind.__name__}: its function is not there"
    act = _written(space["bloom_gelu_forward"])
    if act is None or not all(is_defined_in(f, f.__name__, "transformers") for f in found[1:6]):
        return f"{kind.__name__}: its function is not transformers'"
    names = Names(look, found, (act,))
    return KnownAct(kind, forward, forward.__code__, names, (), act.activation, act.spelled, act.narrow, act.writes)


def _spelled(value: Value, spellings: dict[Value, Bound]) -> Bound | None:
    constants = [part[1] for part in parts_of(value) if part[0] == "constant"]
    if not all(callable(c) or type(c) in (int, float) for c in constants):  # a number that counts in its own way
        return None
    try:
        return spellings.get(value)
    except TypeError:  # a global in it is not hashable
        return None


def _of_module(child: nn.Module) -> Bound | None:
    try:
        return recognition.of_known_module(child)
    except (TypeError, ValueError):  # parameters that mean no activation
        return None
