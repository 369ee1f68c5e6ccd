"""``torch.compile(model, backend="fastbp")``: Inductor, after fastbp's ops have been put into the captured graph.

The pass works on the graph that Dynamo hands over, of PyTorch's functions with shapes and dtypes noted: there a linear
is still one call, its activation one function with its constants, and what is not matched stays as it was captured.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastbp import saving
from fastbp.backends import check_name
from fastbp.compiler.matching import Match, find_matches
from fastbp.compiler.registration import NAME, register
from fastbp.ops import traced_call
from fastbp.settings import defaults

__all__ = ["compile_graph", "put_ops", "register"]

_log = logging.getLogger("fastbp.compiler")
_OWN = {"fastbp.save": saving.check_name, "fastbp.backend": check_name}
_WHERE = f"torch.compile(backend={NAME!r})"


def compile_graph(
    graph_module: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The backend: ``put_ops``, then Inductor with this mode and these options.

    ``options`` are Inductor's, and ``"fastbp.save"`` and ``"fastbp.backend"``: the save policy and the backend of the
    ops that are put, as ``fastbp.mlp`` takes them. Raises ValueError and TypeError as that does, ValueError for another
    option that begins with ``fastbp``, and what Inductor raises for an option that it does not know.
    """
    given = dict(options or {})
    own = {name: given.pop(name) for name in list(given) if name.startswith("fastbp")}
    unknown = own.keys() - _OWN.keys()
    if unknown:
        raise ValueError(f"{_WHERE}: unknown option {min(unknown)!r}; there are {', '.join(_OWN)}, and Inductor's")
    put_ops(graph_module, **{name.removeprefix("fastbp."): value for name, value in own.items()})
    inductor = torch._TorchCompileInductorWrapper(mode, given, None)  # what torch.compile makes of its default backend
    return inductor(graph_module, example_inputs)


def put_ops(graph_module: GraphModule, save: str = "auto", backend: str = "auto") -> list[Match]:
    """Put fastbp's ops into a graph that Dynamo captured, and return what they took the place of.

    ``W f(x Wᵀ + b) + b'`` and longer chains become ``torch.ops.fastbp.mlp``, and the same with a gate ``gated_mlp``,
    where a gradient flows through. Each is logged by ``fastbp.compiler``, at level INFO; at DEBUG what was left, and
    why. ``save`` and ``backend`` as in ``fastbp.mlp``, with its errors.
    """
    for name, value in (("save", save), ("backend", backend)):
        _OWN[f"fastbp.{name}"](value, _WHERE)
    matches, left = find_matches(graph_module.graph)
    for reason in left:
        _log.debug("left: %s", reason)
    if not matches:
        return []
    if defaults.both != (None, None):
        warnings.warn(
            f"{_WHERE}: fastbp.use is for calls of fastbp and does not reach the ops that this backend puts; give "
            'torch.compile options={"fastbp.save": ..., "fastbp.backend": ...} instead',
            stacklevel=2,
        )
    for match in matches:
        _put(match, save, backend)
        _log.info("compiled: %s", match)
    graph_module.recompile()
    return matches


def _put(match: Match, save: str, backend: str) -> None:
    """The op in place of the nodes of a match."""
    policy = saving.resolve(save, match.activation, match.form, _WHERE)
    try:
        saving.check_dtype(policy, match.dtype, match.form)
    except ValueError as error:
        raise ValueError(f"{_WHERE}: {error}") from None
    names = match.form.name, match.activation.name, match.activation.params, policy, backend
    last, graph = match.last, match.last.graph

    def cast(node: Node | None) -> Node | None:
        if node is None or node.meta["example_value"].dtype == match.dtype:
            return node
        return graph.call_method("to", (node, match.dtype))

    def halves(node: Node | None) -> tuple[Node | None, Node | None]:
        if node is None:
            return None, None
        pieces = graph.call_function(torch.chunk, (node, 2))
        first, second = (graph.call_function(operator.getitem, (pieces, i)) for i in (0, 1))
        return (second, first) if match.gate_half else (first, second)

    with graph.inserting_before(last):
        x = cast(match.linears[0].input)
        weights: list[Any] = [cast(linear.weight) for linear in match.linears]
        biases = [cast(linear.bias) for linear in match.linears]
        if match.gate_half is not None:
            weights[:1], biases[:1] = halves(weights[0]), halves(biases[0])
        op = graph.call_function(*traced_call(names, (x,), weights, biases))
        y = graph.call_function(operator.getitem, (op, 0))
    op.meta = {key: value for key, value in last.meta.items() if key != "example_value"}
    y.meta = dict(last.meta)
    last.replace_all_uses_with(y)
    graph.erase_node(last)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in sorted(match.inside, key=order.__getitem__, reverse=True):
        graph.erase_node(node)
