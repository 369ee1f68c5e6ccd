"""What a method or a function computes of its one argument, read from its source and never run.

Known are straight lines: locals assigned, the last one returned, calls of what ``self`` or the method's globals have
under a name, arithmetic, constants. Anything else is named, and the method is not read. Its source is believed only
where it compiles to the method's very code. The value that is returned is written as nested tuples:
``("argument",)``, ``("constant", object)``, ``("own", name)`` for self.name, ``("global", "path.to.name")``,
``("call", function, arguments, keywords)``, and ``("*", left, right)`` with other signs alike.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from types import CodeType, FunctionType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

Value: TypeAlias = tuple[Any, ...]
ARGUMENT: Value = ("argument",)
_SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**"}
_STRANGE = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR
_STRANGE |= inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE
_LONGEST = 200  # parts of a value; one that is used twice counts twice


@dataclass(frozen=True, eq=False)
class Reading:
    """What a method computes of the argument of this name, and the code that says so."""

    argument: str
    value: Value
    code: CodeType


_READ: WeakKeyDictionary[FunctionType, dict[bool, tuple[CodeType, Reading | str]]] = WeakKeyDictionary()


def read(method: object) -> Reading | str:
    """What a method computes of its one argument besides self, or what is not known about it. Each is read once."""
    return _once(method, True)


def read_function(function: object) -> Reading | str:
    """The same of a function, which has no self."""
    return _once(function, False)


def _once(method: object, owned: bool) -> Reading | str:
    if type(method) is not FunctionType:
        return "its forward is no plain function"
    read_as = _READ.setdefault(method, {})
    before = read_as.get(owned)
    if before is None or before[0] is not method.__code__:
        try:
            found: Reading | str = _read(method, owned)
        except _Unknown as unknown:
            found = str(unknown)
        read_as[owned] = before = method.__code__, found
    return before[1]


def read_expression(text: str, argument: str) -> Value:
    """The value of an expression of one argument."""
    return _Reader("", argument, frozenset()).value(ast.parse(text, mode="eval").body)


def parts_of(value: Value) -> Iterator[Value]:
    """A value and all that it is made of."""
    yield value
    if value[0] == "call":
        inside = value[1], *value[2], *(v for _, v in value[3])
    else:
        inside = value[1:] if len(value) == 3 else ()
    for v in inside:
        yield from parts_of(v)


def look_up(method: FunctionType, paths: tuple[str, ...]) -> Callable[[], tuple[Any, ...]]:
    """A function that finds what these names stand for now in the globals of ``method``.

    It is a function so that torch.compile follows it and guards the names as it guards those of ``method``.
    """
    text = f"lambda: ({''.join(f'{path}, ' for path in paths)})"
    return FunctionType(_code_in(compile(text, method.__code__.co_filename, "eval"), "<lambda>"), method.__globals__)


class _Unknown(Exception):
    """What is not known about a method, in words."""


def _has(node: ast.AST) -> _Unknown:
    return _Unknown(f"its forward has `{ast.unparse(node).splitlines()[0]}`")


def _read(method: FunctionType, owned: bool) -> Reading:
    code = method.__code__
    if hasattr(method, "__wrapped__"):
        raise _Unknown("its forward is decorated")
    if method.__closure__ or code.co_flags & _STRANGE:
        raise _Unknown("its forward has super(), variables from outside, *arguments, yield or await")
    try:
        text = inspect.getsource(method)
        # Not dedented, which would change the strings in it.
        node: ast.AST = ast.parse(f"if 1:\n{text}" if text[:1].isspace() else text).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        raise _Unknown("the source of its forward is not there") from None
    node = node.body[0] if isinstance(node, ast.If) else node
    if not isinstance(node, ast.FunctionDef):
        raise _Unknown("its forward is written without def")
    if node.decorator_list:
        raise _has(node.decorator_list[0])
    owner, argument = _names_of(node.args, owned)
    value = _Reader(owner, argument, frozenset(code.co_varnames)).run(node.body)
    if not any(_traits(compiled) == _traits(code) for compiled in _compiled(node, value)):
        raise _Unknown("its forward is not what its source says")
    return Reading(argument, value, code)


def _compiled(node: ast.FunctionDef, value: Value) -> Iterator[CodeType]:
    """The code of a definition; Python writes calls on a module otherwise where the file imports that, so all ways."""
    modules = sorted({part[1].split(".")[0] for part in parts_of(value) if part[0] == "global"})
    for count in range(len(modules) + 1 if len(modules) < 5 else 0):
        for imported in combinations(modules, count):
            imports: list[ast.stmt] = [ast.parse(f"import {name}").body[0] for name in imported]
            module = ast.Module([*imports, node], [])
            yield _code_in(compile(module, "<source>", "exec", dont_inherit=True), node.name)


def _names_of(given: ast.arguments, owned: bool) -> tuple[str, str]:
    """What self, if there is one, and the one argument are called; other arguments must have defaults."""
    count = 2 if owned else 1
    needed = [a.arg for a in given.args[: max(count, len(given.args) - len(given.defaults))]]
    needed += [a.arg for a, default in zip(given.kwonlyargs, given.kw_defaults, strict=True) if default is None]
    if given.posonlyargs or len(given.args) < count or len(needed) > count:
        raise _Unknown(f"its forward takes ({ast.unparse(given)})")
    return needed[0] if owned else "", needed[-1]


def _code_in(compiled: CodeType, name: str) -> CodeType:
    return next(c for c in compiled.co_consts if isinstance(c, CodeType) and c.co_name == name)


def _traits(code: CodeType) -> tuple[Any, ...]:
    """Whatever of a code decides what it does."""
    constants = [(type(c), repr(c)) for c in code.co_consts]
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & _STRANGE
    return code.co_code, constants, counts, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars


class _Reader:
    """Follows the statements of a body, and stops with _Unknown at the first that is not known."""

    def __init__(self, owner: str, argument: str, names: frozenset[str]) -> None:
        self._owner, self._names = owner, names  # names: of all locals
        self._values: dict[str, Value] = {argument: ARGUMENT}
        self._unused: dict[str, ast.stmt] = {}  # locals with the result of a call that nothing has read yet

    def run(self, body: list[ast.stmt]) -> Value:
        """The value that is returned."""
        for statement in body:
            match statement:
                case ast.Expr(ast.Constant()):  # a docstring
                    pass
                case ast.Assign([ast.Name(name)], node) | ast.AnnAssign(ast.Name(name), _, ast.expr() as node):
                    value = self.value(node)
                    if name == self._owner or len(list(parts_of(value))) > _LONGEST:
                        raise _has(statement)
                    self._all_used(name)
                    self._values[name] = value
                    if any(part[0] == "call" for part in parts_of(value)):
                        self._unused[name] = statement
                case ast.Return(ast.expr() as node) if statement is body[-1]:
                    value = self.value(node)
                    self._all_used(*self._unused)
                    return value
                case _:
                    raise _has(statement)
        raise _Unknown("its forward does not return at its end")

    def _all_used(self, *names: str) -> None:
        """The method makes every call that it writes, so each of them must be in the value."""
        for name in names:
            if name in self._unused:
                raise _has(self._unused[name])

    def value(self, node: ast.expr) -> Value:
        """The value of an expression."""
        match node:
            case ast.Constant(constant):
                return "constant", constant
            case ast.Name(name) if name in self._values:
                self._unused.pop(name, None)
                return self._values[name]
            case ast.Name(name) if name not in self._names and name != self._owner:
                return "global", name
            case ast.Attribute(ast.Name(name), attribute) if name == self._owner:
                return "own", attribute
            case ast.Attribute(ast.Name() | ast.Attribute() as inner, attribute):
                kind, *path = self.value(inner)
                if kind == "global":
                    return "global", f"{path[0]}.{attribute}"
            case ast.BinOp(left, sign, right) if type(sign) in _SIGNS:
                return _SIGNS[type(sign)], self.value(left), self.value(right)
            case ast.Call(function, arguments, keywords) if all(k.arg for k in keywords):
                named = tuple((k.arg, self.value(k.value)) for k in keywords)
                return "call", self.value(function), tuple(self.value(a) for a in arguments), named
        raise _has(node)
