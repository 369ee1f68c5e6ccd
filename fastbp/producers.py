"""What the input of a linear was made of, as autograd's graph of this very call says.

A linear keeps its input h for dW. Where h came from an activation or a product, the node that made it keeps z (or g and
u, or a mask) anyway, and h can be made again of that. This module reads the nodes and trusts nothing else: the names of
PyTorch's own nodes cannot be faked, for the node of a Python Function is called ``<Name>Backward`` without a number.

``rebuild(node)`` makes a node's output again by the operation that made it. ``read_whole`` knows more of a node: that
its output is f(z), or f(g) · u, with the activation from the table, and which tensors z, g and u are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import _get_sequence_nr

from fastbp.activations import NODES, Bound, bind
from fastbp.forms import ACT_LINEAR, GATED_ACT_LINEAR, Form

Node = Any
Edge = tuple[Any, int]  # a node, and which of its outputs
_aten = torch.ops.aten
PRODUCT, _DIV, _CAST, _POW = "MulBackward0", "DivBackward0", "ToCopyBackward0", "PowBackward0"
DEPTH = 8  # nodes between a linear and what its input is made again of


def nobody() -> bool:
    """That nobody looks."""
    return False


class Producer(NamedTuple):
    """``f(z)``, or ``f(g) · u``: the activation, the form of a linear behind it, and z, or g and u.

    ``activated`` holds f(g), for one to take, where a product keeps it; ``seen`` tells whether somebody looks at it,
    where none does.
    """

    bound: Bound
    form: Form
    inputs: tuple[Tensor, ...]
    activated: list[Tensor] | None = None
    seen: Callable[[], bool] = nobody


def operation(node: Node) -> str:
    """What people call the operation of a node: ``GeluBackward0`` is gelu, ``LinearActFunctionBackward`` linear_act."""
    ours = own(node)
    return _said(type(node).__name__) if ours is None or ours.said is None else ours.said(node)


@lru_cache(maxsize=256)
def _said(name: str) -> str:
    words = re.sub(r"(Function)?Backward\d*$", "", name)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", words).lower()


def _activation(node: Node) -> Bound | None:
    """The activation that a node is of, where it keeps z."""
    for row in NODES.get(type(node).__name__, ()):
        params = row.node_params(node)
        if params is not None:
            return Bound(row, tuple(map(float, params)))
    return None


class Own(NamedTuple):
    """A node of a Function of ours: its class, whether its output can be made again, how, and of which tensors."""

    kind: type
    can: Callable[[Node], bool]
    value: Callable[[Node], Tensor]
    read: Callable[[Node], Producer | None]
    activation: bool = True  # whether an activation made the output
    keeps_output: Callable[[Node], bool] = lambda node: False  # whether the node keeps its output
    said: Callable[[Node], str] | None = None  # what people call it, if not by the name of the Function


def own(node: Node) -> Own | None:
    """What is known of a node of ours; None for those of others."""
    found = OWN.get(type(node).__name__)
    return found if found is not None and type(node) is found.kind else None


def keeps_output(node: Node) -> bool:
    """Whether an activation's node keeps its output, which a linear then keeps a second time for nothing."""
    ours = own(node)
    return type(node).__name__ in KEEPS_OUTPUT if ours is None else ours.keeps_output(node)


def can_rebuild(node: Node, depth: int = DEPTH) -> bool:
    """Whether ``rebuild`` makes the output of this node, of what the graph keeps anyway. Unpacks nothing."""
    name = type(node).__name__
    if name in _OF_INPUT:
        return True
    if keeps_output(node):
        return depth < DEPTH  # the linear's own input is kept once anyway
    if depth == 0:
        return False
    if name in (PRODUCT, _DIV):
        inner = _not_kept(node, name)
        return is_near(node) if inner is None else can_rebuild(inner, depth - 1)
    if name in _OF_ONE:
        inner = node.next_functions[0][0]
        return inner is not None and can_rebuild(inner, depth - 1)
    ours = own(node)
    return ours is not None and ours.can(node)


def rebuild(node: Node) -> Tensor:
    """The output of a node for which ``can_rebuild`` is true, by the same operation on the same tensors."""
    name = type(node).__name__
    of_input = _OF_INPUT.get(name)
    if of_input is not None:
        return of_input(node)
    if name in KEEPS_OUTPUT:
        return node._saved_result  # type: ignore[no-any-return]
    if name in (PRODUCT, _DIV):
        (first, _), (second, _) = node.next_functions
        one = rebuild(first) if second is None else node._saved_self
        other = rebuild(second) if first is None and name == PRODUCT else node._saved_other
        return one * other if name == PRODUCT else one / other
    of_one = _OF_ONE.get(name)
    if of_one is not None:
        return of_one(node, rebuild(node.next_functions[0][0]))
    return OWN[name].value(node)


def is_latest(node: Node) -> bool:
    """Whether this thread has made no node since, so that no other can be a reader of this one's output."""
    return _get_sequence_nr() == node._sequence_nr() + 1  # type: ignore[no-any-return]


_RAW = ("_raw_saved_self", "_raw_saved_other", "_raw_saved_result", "_raw_saved_result1")


@lru_cache(maxsize=64)
def _raw_of(kind: Hashable) -> tuple[str, ...]:
    """Those of ``_RAW`` that the nodes of a class have."""
    return tuple(name for name in _RAW if hasattr(kind, name))


def unpacks(node: Node, depth: int = DEPTH) -> list[Any]:
    """The hooks that give back what a node, and those that made its operands, keep; none where no hooks were active."""
    name = type(node).__name__
    ours = name not in READABLE and own(node) is not None
    found = []
    for raw in node._raw_saved_tensors if ours else [getattr(node, n) for n in _raw_of(type(node))]:  # type: ignore[arg-type]
        hook = raw.unpack_hook
        if hook is not None:
            found.append(hook)
    for below, _ in node.next_functions if depth else ():
        name = type(below).__name__
        if name in _READ or name in OWN:
            found += unpacks(below, depth - 1)
    return found


def is_near(node: Node) -> bool:
    """Whether an activation made the output of this node, or an operand of it: what linears behind others are spared.

    The scaled output of a norm is a product too, and nothing is gained by making it again for each of its readers.
    """
    name = type(node).__name__
    if name not in _ELEMENTWISE:
        return name in _READ or name in OWN
    for below, _ in node.next_functions:
        if _is_activation(below):
            return True
    return any(_is_passed(below) for below, _ in node.next_functions)


def _is_activation(node: Node | None) -> bool:
    name = type(node).__name__
    return name in _ACTIVATIONS or (name in OWN and OWN[name].activation)


def _is_passed(node: Node | None) -> bool:
    """Whether an activation is one node below what does little to it."""
    if type(node).__name__ not in _ELEMENTWISE:
        return False
    return any(_is_activation(below) for below, _ in node.next_functions)  # type: ignore[union-attr]


def _not_kept(node: Node, name: str) -> Node | None:
    """The node of the operand that a product with a constant, or a quotient by one, does not keep."""
    (first, _), (second, _) = node.next_functions
    if second is None:
        return first
    return second if first is None and name == PRODUCT else None


def _cast(node: Node, inner: Tensor) -> Tensor:
    to = node._input_metadata[0]
    return inner.to(device=to.device, dtype=to.dtype)


def _dropped(node: Node, inner: Tensor) -> Tensor:
    scale = 0.0 if node._saved_p == 1 else 1.0 / (1.0 - node._saved_p)
    return _aten.native_dropout_backward.default(inner, node._saved_result1, scale)  # type: ignore[no-any-return]


def _signed(number: int) -> int:
    """A node gives -1 as 2⁶⁴ - 1."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _of_activation(node: Node) -> Tensor:
    bound = _activation(node)
    assert bound is not None, type(node).__name__
    return bound(node._saved_self)


# Nodes that keep their input and not their output; and nodes that keep neither, or a mask.
_OF_INPUT: dict[str, Callable[[Node], Tensor]] = {
    **dict.fromkeys(NODES, _of_activation),
    "EluBackward0": lambda n: _aten.elu.default(n._saved_self, n._saved_alpha, n._saved_scale, n._saved_input_scale),
    # Not in the table: PyTorch's gradients have 1 / alpha and 1 / 6 in float32, and ours would be others.
    "CeluBackward0": lambda n: _aten.celu.default(n._saved_self, n._saved_alpha),
    "HardsigmoidBackward0": lambda n: _aten.hardsigmoid.default(n._saved_self),
    _POW: lambda n: _aten.pow.Tensor_Scalar(n._saved_self, n._saved_exponent),
    "GluBackward0": lambda n: _aten.glu.default(n._saved_self, _signed(n._saved_dim)),
}
_OF_ONE: dict[str, Callable[[Node, Tensor], Tensor]] = {_CAST: _cast, "NativeDropoutBackward0": _dropped}
# Nodes of Functions of ours: by name, the class and what makes the output again.
OWN: dict[str, Own] = {}
# What may stand between an activation and a linear: a mask, a cast, a limit, a view, a sum.
_ELEMENTWISE = frozenset(
    (
        *(PRODUCT, _DIV, *_OF_ONE, "AddBackward0", "SubBackward0", "ClampBackward0", "ClampBackward1"),
        *("ViewBackward0", "UnsafeViewBackward0", "TransposeBackward0", "PermuteBackward0", "SliceBackward0"),
        *("MaskedFillBackward0", "WhereBackward0", "CloneBackward0", "IndexBackward0", "SelectBackward0"),
    )
)
READABLE = frozenset((PRODUCT, _DIV, *_OF_INPUT, *_OF_ONE))
KEEPS_OUTPUT = frozenset(("ReluBackward0", "SigmoidBackward0", "TanhBackward0", "SoftmaxBackward0", "ExpBackward0"))
_READ = READABLE | KEEPS_OUTPUT
_ACTIVATIONS = KEEPS_OUTPUT.union(_OF_INPUT, ("ErfBackward0",))  # erf: of a GELU written by hand


def read_whole(x: Tensor, node: Node) -> Producer | None:
    """The activation and the tensors that x, the output of this node, was made of; None where it is something else.

    Unpacks what the nodes keep. Only what is certain: z is where the gradient of the activation goes, no shape was
    broadcast, all of it has the dtype of x. RuntimeError from PyTorch where one of them was written to since.
    """
    found = _read_node(node)
    if found is None:
        return None
    for t in found.inputs:
        if t.shape != x.shape or t.dtype is not x.dtype:
            return None
    return found


def _read_node(node: Node) -> Producer | None:
    name = type(node).__name__
    if name == PRODUCT:
        return _read_product(node)
    if name == _POW:
        return _read_square(node)
    if name in NODES:
        bound = _activation(node)
        return None if bound is None else of_activation(bound, node._saved_self, node)
    ours = own(node)
    return None if ours is None else ours.read(node)


def of_activation(bound: Bound, z: Tensor | None, node: Node) -> Producer | None:
    """The producer, of a node whose one input is z, if that is what autograd says the gradient goes to."""
    return Producer(bound, ACT_LINEAR, (z,)) if _is_edge_of(node.next_functions[0], z) else None  # type: ignore[arg-type]


def _is_edge_of(edge: Edge, tensor: Tensor | None) -> bool:
    node, number = edge
    if tensor is None:
        return False
    made = tensor.grad_fn
    if made is None:
        return tensor.requires_grad and getattr(node, "variable", None) is tensor
    return made is node and tensor.output_nr == number


def _read_product(node: Node) -> Producer | None:
    """``f(g) · u`` in either order."""
    a, b = _kept(node._saved_self, node._raw_saved_self), _kept(node._saved_other, node._raw_saved_other)
    if a is None or b is None:
        return None
    first, second = node.next_functions
    return _read_gated(a, first[0], b, second) or _read_gated(b, second[0], a, first)


def _kept(tensor: Tensor | None, raw: Any) -> Tensor | None:
    # What hooks give back is another tensor than was kept. Only those of SavedBytes are read here: they hold the first.
    return tensor if tensor is None or raw.unpack_hook is None else raw.data


def _read_gated(activated: Tensor, gate: Node | None, up: Tensor, up_edge: Edge) -> Producer | None:
    """``activated · up``, where the first is the output of an activation, whose node is ``gate``."""
    if gate is None or type(gate).__name__ == PRODUCT or activated.grad_fn is not gate:
        return None
    found = _read_node(gate)
    if found is None or found.form is not ACT_LINEAR or not _is_edge_of(up_edge, up):
        return None
    return Producer(found.bound, GATED_ACT_LINEAR, (*found.inputs, up), [activated])


def _read_square(node: Node) -> Producer | None:
    """``relu(z)²``; the tensor is relu(z), of which it is the square as well."""
    edge = node.next_functions[0]
    if node._saved_exponent != 2 or type(edge[0]).__name__ != "ReluBackward0":
        return None
    return of_activation(bind("relu2"), node._saved_self, node)
