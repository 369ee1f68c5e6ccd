"""Activations in a graph: PyTorch's functions by identity, and formulas written out, by the arithmetic that they do.

A formula is brought into a form in which the order of factors and addends does not count, and looked up among the
forms of what the table of activations has as ``spellings``. Nothing is multiplied out and no constants are folded, so
what is found does the operations of the row, in another order at most.
"""

from __future__ import annotations

import operator
from ctypes import c_float
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx import Node

from fastbp.activations import TABLE, Bound, bind, wide
from fastbp.recognition import of_known_call

_ARITHMETIC: dict[Any, str] = {
    operator.mul: "mul", torch.mul: "mul", operator.add: "add", torch.add: "add", operator.sub: "sub", torch.sub: "sub",
    operator.truediv: "div", torch.div: "div", operator.pow: "pow", torch.pow: "pow", torch.square: "square",
    torch.erf: "erf",
}  # fmt: skip
_LONGEST = 24  # operations that are looked at for one activation; the longest of the table has 9

Expression = tuple[Any, ...]


class Found(NamedTuple):
    """An activation, what it is of, and the nodes of the graph that compute it."""

    activation: Bound
    input: Node
    nodes: frozenset[Node]


class _Unreadable(Exception):
    pass


def function_of(node: Node) -> Any:
    """The function that a node calls; of a method, torch's function of its name, which takes the same arguments."""
    return getattr(torch, str(node.target), None) if node.op == "call_method" else node.target


def arithmetic_of(node: Node) -> str | None:
    """Which arithmetic a node does, out of place, or None."""
    calls = node.op in ("call_function", "call_method") and not node.kwargs
    return _ARITHMETIC.get(function_of(node)) if calls else None


def find_activation(node: Any, dtype: torch.dtype) -> Found | None:
    """The activation that ends in this node, in tensors of this dtype, whose constants are compared as it has them."""
    reader = _Reader(wide(dtype))
    try:
        form = reader.read(node)
    except _Unreadable:
        return None
    if reader.leaf is None or not reader.nodes:
        return None
    activation = bind(form[1], form[2]) if form[0] == "call" and form[3] == _LEAF else _forms(wide(dtype)).get(form)
    return None if activation is None else Found(activation, reader.leaf, frozenset(reader.nodes))


@cache
def _forms(dtype: torch.dtype) -> dict[Expression, Bound]:
    """Every spelling of the table in its form, with constants as this dtype has them."""
    found = {}
    for row in TABLE:
        for spelled in row.spelled:
            output = next(reversed(fx.symbolic_trace(spelled).graph.nodes))
            found[_Reader(dtype).read(output.args[0])] = bind(row.name)
    return found


_LEAF: Expression = ("z",)


class _Reader:
    """Reads one expression of one tensor, the leaf."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.leaf: Node | None = None
        self.nodes: set[Node] = set()
        self._steps = 0

    def read(self, node: Any) -> Expression:
        """The form of what this node computes of the leaf."""
        self._steps += 1
        if self._steps > _LONGEST:
            raise _Unreadable
        if type(node) in (int, float):
            return ("number", float(node) if self.dtype == torch.float64 else c_float(node).value)
        if not isinstance(node, Node):
            raise _Unreadable
        name = arithmetic_of(node)
        if name is not None:
            form = self._arithmetic(name, *node.args)
        elif node.op in ("call_function", "call_method") and node.args:
            activation = of_known_call(function_of(node), node.args[1:], node.kwargs)
            if activation is None:
                return self._leaf(node)
            form = ("call", activation.name, activation.params, self.read(node.args[0]))
        else:
            return self._leaf(node)
        self.nodes.add(node)
        return form

    def _leaf(self, node: Node) -> Expression:
        if self.leaf not in (None, node):
            raise _Unreadable
        self.leaf = node
        return _LEAF

    def _arithmetic(self, name: str, first: Any, second: Any = None) -> Expression:
        if name == "erf":
            return ("erf", self.read(first))
        if name == "mul":
            return self._flat("mul", self.read(first), self.read(second))
        if name == "add":
            return self._flat("add", self.read(first), self.read(second))
        if name == "square" or (name == "pow" and second in (2, 3) and type(second) in (int, float)):
            factor = self.read(first)
            return self._flat("mul", *[factor] * (2 if name == "square" else int(second)))
        if type(second) in (int, float) and second != 0:
            if name == "div":
                return self._flat("mul", self.read(first), self.read(1 / second))
            if name == "sub":
                return self._flat("add", self.read(first), self.read(-second))
        raise _Unreadable

    def _flat(self, name: str, *parts: Expression) -> Expression:
        """A product or a sum of what the parts are products or sums of, in an order of its own."""
        flat = [inner for part in parts for inner in (part[1:] if part[0] == name else (part,))]
        return (name, *sorted(flat, key=repr))
