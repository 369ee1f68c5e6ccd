"""Where fastbp's ops can stand in a graph that Dynamo captured: linear, activation, linear, and gate, up, down.

Found by how values flow, by which functions compute them, and by the dtypes and shapes that Dynamo noted, never by
names. What computes the hidden values must be used by the last linear alone, and nothing may happen in between that
could change a tensor: then all of it may happen where the last linear stands.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from fastbp.activations import Bound, bind
from fastbp.compiler.spelling import Found, arithmetic_of, find_activation, function_of
from fastbp.forms import GATED_MLP, MLP, Form
from fastbp.problem import check
from fastbp.recognition import of_known_call

_TORCH = str(torch.__path__[0])


class Left(Exception):
    """Why a linear after an activation is left as it is."""


class Linear(NamedTuple):
    """The arguments of a call of ``F.linear``."""

    input: Node
    weight: Node
    bias: Node | None


@dataclass(frozen=True)
class Match:
    """What one op of fastbp can do of a graph: ``last`` and the nodes ``inside``, whose values go nowhere else."""

    form: Form
    activation: Bound
    linears: tuple[Linear, ...]
    gate_half: int | None  # of the first linear, where that holds gate and up
    last: Node
    inside: frozenset[Node]
    dtype: torch.dtype

    @property
    def operands(self) -> list[Node]:
        """x, the weights and the biases, as they are in the graph."""
        return [self.linears[0].input, *(n for linear in self.linears for n in linear[1:] if n is not None)]

    def __str__(self) -> str:
        lines = [line.strip() for line in str(self.last.meta.get("stack_trace")).splitlines()]
        places = [line for line in lines if line.startswith("File ")] or ["an unknown place"]
        own = [line for line in places if f'File "{_TORCH}' not in line] or places  # not nn.Linear's forward
        return f"{self.form.name}, {self.activation!r}, {len(self.linears)} linears, at {own[-1]}"


def find_matches(graph: Graph) -> tuple[list[Match], list[str]]:
    """What fastbp's ops can do of a graph, no two of them with a node in common; and why other linears are left."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    matches: list[Match] = []
    left: list[str] = []
    taken: set[Node] = set()
    for node in reversed(graph.nodes):
        if node not in taken and linear_of(node) is not None:
            try:
                match = _find_mlp(node, order) or _find_gated(node, order)
            except Left as reason:
                left.append(f"{node}: {reason}")
                continue
            if match is not None:
                matches.append(match)
                taken |= match.inside
    return matches, left


def linear_of(node: Any) -> Linear | None:
    """The arguments of a node that calls ``F.linear``."""
    if not isinstance(node, Node) or node.op != "call_function" or node.target is not F.linear:
        return None
    given = {**dict(zip(Linear._fields, node.args, strict=False)), **node.kwargs}
    linear = Linear(given["input"], given["weight"], given.get("bias"))  # type: ignore[arg-type]
    fine = isinstance(linear.input, Node) and isinstance(linear.weight, Node)
    return linear if fine and (linear.bias is None or isinstance(linear.bias, Node)) else None


def example_of(node: Node) -> Tensor | None:
    """What Dynamo noted of a node's value, if that is a plain dense tensor: no subclass, and not of a transform."""
    value = node.meta.get("example_value")
    return value if type(value) is FakeTensor and value.layout is torch.strided and not value.is_nested else None


def _past_dropout(node: Any, passed: set[Node]) -> Any:
    """What goes into the dropouts that end in this node, as far as they do nothing; they are added to ``passed``."""
    while isinstance(node, Node) and node.target in (F.dropout, torch.dropout):
        names = ("input", "p", "train" if node.target is torch.dropout else "training")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        p, acts = given.get("p", 0.5), given.get(names[2], True)
        if acts is not False and not (type(p) in (int, float) and p == 0):
            break
        passed.add(node)
        node = given["input"]
    return node


def _find_mlp(last: Node, order: dict[Node, int]) -> Match | None:
    """The longest chain of linears that ends here, with one activation between them."""
    example = example_of(last)
    if example is None or not example.requires_grad:
        return None  # nothing is kept for backward
    linears = [_linear(last)]
    activation: Bound | None = None
    inside: set[Node] = set()
    while True:
        more = set(inside)
        found = find_activation(_past_dropout(linears[0].input, more), example.dtype)
        if found is None or activation not in (None, found.activation):
            break
        z = _past_dropout(found.input, more)
        linear = linear_of(z)
        if linear is None:
            break
        more |= {z, *found.nodes}
        match = Match(MLP, found.activation, (linear, *linears), None, last, frozenset(more), example.dtype)
        try:
            _check(match, order)
        except Left:
            if activation is None:
                raise
            break
        inside, activation, linears = more, found.activation, [linear, *linears]
    if activation is None:
        return None
    return Match(MLP, activation, tuple(linears), None, last, frozenset(inside), example.dtype)


def _find_gated(last: Node, order: dict[Node, int]) -> Match | None:
    """f(gate) · up, of two linears of one input or of the halves of one, and the linear that ends here."""
    example, down = example_of(last), _linear(last)
    if example is None or not example.requires_grad:
        return None
    passed: set[Node] = set()
    product = _past_dropout(down.input, passed)
    if not isinstance(product, Node):
        return None
    passed.add(product)
    if product.target is F.glu:
        return _find_glu(product, down, last, passed, order)
    if arithmetic_of(product) != "mul":
        return None
    for f_of_gate, up in (product.args, reversed(product.args)):
        inside = set(passed)
        found = find_activation(_past_dropout(f_of_gate, inside), example.dtype)
        if found is not None:
            pair = _pair(found, _past_dropout(up, inside), inside)
            if pair is not None:
                linears, half = pair
                inside |= found.nodes
                match = Match(
                    GATED_MLP, found.activation, (*linears, down), half, last, frozenset(inside), example.dtype
                )
                _check(match, order)
                return match
    return None


def _find_glu(product: Node, down: Linear, last: Node, inside: set[Node], order: dict[Node, int]) -> Match | None:
    """``F.glu``: the first half times the sigmoid of the second."""
    packed = _past_dropout(product.args[0] if product.args else None, inside)
    dim = product.args[1] if len(product.args) > 1 else product.kwargs.get("dim", -1)
    size, dims = _features(packed)
    if size is None or dim not in (-1, dims - 1):
        return None
    inside.add(packed)
    nodes, dtype = frozenset(inside), last.meta["example_value"].dtype
    match = Match(GATED_MLP, bind("sigmoid"), (_linear(packed), down), 1, last, nodes, dtype)
    _check(match, order)
    return match


def _pair(found: Found, up: Any, inside: set[Node]) -> tuple[tuple[Linear, ...], int | None] | None:
    """The linears of gate and up, or the one that holds both with the half that is the gate."""
    gate = _past_dropout(found.input, inside)
    first, second = linear_of(gate), linear_of(up)
    if first is not None and second is not None:
        inside |= {gate, up}
        return ((first, second), None) if first.input is second.input and gate is not up else None
    gate_half, up_half = _half(gate, inside), _half(up, inside)
    if gate_half is None or up_half is None or gate_half[0] is not up_half[0] or gate_half == up_half:
        return None
    packed, half = gate_half
    inside.add(packed)
    return (_linear(packed),), half


def _half(node: Any, inside: set[Node]) -> tuple[Node, int] | None:
    """The linear that this node is a half of along its last dimension, and which."""
    if not isinstance(node, Node) or node.op != "call_function" or node.target is not operator.getitem:
        return None
    source, index = node.args
    if not isinstance(source, Node):
        return None
    inside.add(node)
    if linear_of(source) is not None:
        half = _sliced_half(source, index)
        return None if half is None else (source, half)
    if function_of(source) not in (torch.chunk, torch.split) or index not in (0, 1):
        return None
    packed, pieces = source.args[0] if source.args else None, source.meta.get("example_value", ())
    size, _ = _features(packed)
    if size is None or len(pieces) != 2 or pieces[0].shape[-1] != size // 2:  # the last dimension, then, is in halves
        return None
    inside.add(source)
    return packed, index  # type: ignore[return-value]


def _sliced_half(packed: Node, index: Any) -> int | None:
    """Which half of the last dimension these subscripts take, with all of the others."""
    size, dims = _features(packed)
    subscripts = index if isinstance(index, tuple) else (index,)
    *others, last = subscripts
    whole = all(i is Ellipsis or (isinstance(i, slice) and i == slice(None)) for i in others)
    reaches = others.count(Ellipsis) == 1 or (Ellipsis not in others and len(subscripts) == dims)
    bounds = (last.start, last.stop, last.step) if isinstance(last, slice) else ("",)
    if size is None or not whole or not reaches or not all(b is None or type(b) is int for b in bounds):
        return None
    taken = last.indices(size)
    return {(0, size // 2, 1): 0, (size // 2, size, 1): 1}.get(taken)


def _features(packed: Any) -> tuple[int | None, int]:
    """The last size of a linear's output, if it is known and even, and the number of dimensions."""
    linear = linear_of(packed)
    weight, output = (None, None) if linear is None else (example_of(linear.weight), example_of(packed))
    if weight is None or output is None or type(weight.shape[0]) is not int or weight.shape[0] % 2:
        return None, 0
    return weight.shape[0], output.dim()


def _linear(node: Node) -> Linear:
    linear = linear_of(node)
    assert linear is not None
    return linear


_HARMLESS = (F.linear, operator.getitem, operator.mul, operator.add, operator.sub, operator.truediv, "to")


def _is_harmless(node: Node) -> bool:
    """Whether a node may stand between those of a match: it changes no tensor, and nothing that a later call does."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in _HARMLESS:
        return True
    value = example_of(node)
    written = value is None or value.is_inference() or value._version > 0  # an activation may work in place
    return not written and bool(node.args) and of_known_call(function_of(node), node.args[1:], node.kwargs) is not None


def _check(match: Match, order: dict[Node, int]) -> None:
    """Raise Left unless the op may take the place of these nodes."""
    inside, last = match.inside, match.last
    if any(user is not last and user not in inside for node in inside for user in node.users):
        raise Left("its hidden values are used elsewhere too")
    if any(node in inside for node in match.operands):
        raise Left("its hidden values are a weight or bias too")
    for node in list(order)[min(order[n] for n in inside) : order[last]]:
        if node not in inside and not _is_harmless(node):
            raise Left(f"{node} comes between the linears")
    values = [node.meta.get("example_value") for node in (*inside, last)]
    examples = [e for value in values for e in (value if isinstance(value, tuple) else [value])]
    if not all(type(e) is FakeTensor and e.layout is torch.strided and e.dtype == match.dtype for e in examples):
        raise Left("its values are not dense tensors of one dtype")
    operands = [example_of(node) for node in match.operands]
    if any(o is None for o in operands):
        raise Left("its input or a weight is not a plain dense tensor")
    _check_call(match)


def _check_call(match: Match) -> None:
    """Raise Left unless the tensors make a call of the form.

    A linear whose output has another dtype than an operand is one that autocast casts the operands of.
    """

    def cast(node: Node | None) -> Any:
        return None if node is None else example_of(node).to(match.dtype)  # type: ignore[union-attr]

    linears = match.linears
    with torch.no_grad():
        weights, biases = [cast(linear.weight) for linear in linears], [cast(linear.bias) for linear in linears]
        if match.gate_half is not None:
            weights[:1] = weights[0].chunk(2)
            biases[:1] = (None, None) if biases[0] is None else biases[0].chunk(2)
        try:
            check(match.form, cast(linears[0].input), weights, biases)
        except (TypeError, ValueError) as error:
            raise Left(str(error)) from None
