"""Which modules are chains that can be fused: found by running them on stand-ins, decided by values.

A chain is ``after(last(between(hidden(before(x)))))``: hidden is act(fc(x)), or act(gate(x)) * up(x) of two linears or
of one that holds both; last is a linear or nothing; before, between and after are children called one after another
(dropouts, norms). What a forward computes is not read off its source or its names: it is run, with small float64
stand-ins in place of its children, and compared with what the plan computes of the same stand-ins, output and
gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastbp.activations import ROWS, bind
from fastbp.fusion.chain import PACKINGS, ChainPlan
from fastbp.fusion.linears import LinearKind, may_idle, not_plain, settings_of
from fastbp.fusion.members import Members
from fastbp.fusion.probe import Trace, opaque, quiet, small_linear, trace

# Relative L2, in float64. PyTorch's hardsigmoid takes 1/6 in float32 even there; the closest pair of activations, the
# two GELUs, differ by about 1e-4.
TOLERANCE = 1e-7
OTHERWISE = "its forward computes something else than the fused block"


def find_plan(module: nn.Module, members: Members, save: str, backend: str | None) -> ChainPlan | str | None:
    """The plan by which a module can run fused, or why it cannot; None where it does not look like a block at all."""
    kinds, unplain, strangers = members.kinds, members.unplain, members.strangers
    hinted = bool(members.acts or members.functions)
    if not kinds and not unplain:
        return _experts(module)
    if unplain:
        return not_plain(unplain) if hinted else None
    if len(kinds) > 3:
        return OTHERWISE if hinted else None
    if len(kinds) == 1 and not hinted and strangers:
        return None
    if module._buffers or any(isinstance(value, Tensor) for value in vars(module).values()):
        return "it has buffers or tensors of its own" if hinted else None
    if "forward" in module.__dict__:
        return "its forward was replaced" if hinted else None
    for packed in (False, True):
        traced = _trace(module, members, packed)
        for plan in [] if traced is None else _candidates(module, traced, members, packed):
            if computes(traced, plan):  # type: ignore[arg-type]
                return replace(plan, save=save, backend=backend)
    if hinted:
        return OTHERWISE
    odd = [type(c).__name__ for c in strangers if not may_idle(c) and _is_elementwise(c)]
    return f"{odd[0]} is no activation that fastbp knows" if len(odd) == 1 == len(strangers) else None


def _is_elementwise(child: nn.Module) -> bool:
    """Whether a child maps each number by itself, as an activation does."""
    dtype = next((p.dtype for p in child.parameters()), torch.float32)
    x, order = (
        torch.linspace(-3.0, 3.1, 24, dtype=dtype),
        torch.randperm(24, generator=torch.Generator().manual_seed(0)),
    )
    with quiet():
        try:
            y, mixed = child(x.view(4, 6).clone()), child(x[order].view(4, 6))
        except Exception:  # a stranger's forward
            return False
    return isinstance(y, Tensor) and y.shape == (4, 6) and torch.equal(y.flatten()[order], mixed.flatten())


def _experts(module: nn.Module) -> str | None:
    deep = {name: p.shape[0] for name, p in module._parameters.items() if p is not None and p.ndim == 3}
    if len(deep) < 2 or len(set(deep.values())) != 1 or 1 in deep.values():
        return None
    return f"its weights are 3-D ({', '.join(deep)}): experts are not fused"


def _trace(module: nn.Module, members: Members, packed: bool) -> Trace | None:
    """The module's forward on small stand-ins; ``packed`` where its first linear holds gate and up."""
    children, kinds = members.children, members.kinds
    shapes = {name: _shape(children[name], kinds[name]) for name in kinds}
    small = _shrink(list(shapes.values()), packed)
    if small is None:
        return None
    generator = torch.Generator().manual_seed(0)
    made: dict[int, nn.Linear] = {}  # by child: one that is there twice is one stand-in
    standing: dict[str, nn.Module] = {}
    for number, (name, child) in enumerate(children.items()):
        if name in kinds:
            size_in, size_out = shapes[name]
            bias = child._parameters.get("bias") is not None
            with quiet():
                stand_in = made.get(id(child)) or small_linear(small[size_in], small[size_out], bias, generator)
            standing[name] = made[id(child)] = stand_in
        else:
            standing[name] = child if name in members.acts else opaque(number)
    return trace(module, standing, small[shapes[next(iter(kinds))][0]])


def _shape(child: nn.Module, kind: LinearKind) -> tuple[int, int]:
    """(in, out)"""
    rows, columns = child.weight.shape  # type: ignore[misc]
    return (rows, columns) if kind.transposed else (columns, rows)


def _shrink(shapes: list[tuple[int, int]], packed: bool) -> dict[int, int] | None:
    """Small sizes that are equal and different where the real ones are, and double where one is read as two halves."""
    sizes = sorted({size for shape in shapes for size in shape})
    small = {size: 6 + 4 * i for i, size in enumerate(sizes)}
    if packed:
        double = [out for _, out in shapes if out % 2 == 0 and (len(shapes) == 1 or (out // 2 in sizes))]
        if not double:
            return None
        small[double[0]] = 2 * small.get(double[0] // 2, 7)
    return small


def _candidates(module: nn.Module, traced: Trace, members: Members, packed: bool) -> Iterator[ChainPlan]:
    """What the forward can be, by the order in which it called its children."""
    kinds, acts = members.kinds, members.acts
    bounds = list(members.functions.values()) or [bind(name) for name in ROWS if name != "identity"]
    order = [call.name for call in traced.calls]
    linears = [call for call in traced.calls if call.name in kinds]
    called_acts = [name for name in order if name in acts]
    if {call.name for call in linears} != kinds.keys() or len(linears) != len(kinds) or len(called_acts) > 1:
        return
    together = sum(call.input is linears[0].input for call in linears)
    hidden = [call.name for call in linears[:together]]
    last = [call.name for call in linears[together:]]
    if together > 2 or len(last) > 1 or (packed and together > 1):
        return
    first, final = order.index(hidden[0]), order.index(last[0]) if last else len(order)
    others = [(i, name) for i, name in enumerate(order) if name not in kinds and name not in acts]
    child = called_acts[0] if called_acts else None
    for bound in bounds if child is None else [acts[child]]:
        for heads in [tuple(hidden), tuple(reversed(hidden))][: len(hidden)]:
            for packing in PACKINGS if packed else (None,):
                between = tuple(name for i, name in others if first < i < final and last)
                yield ChainPlan(
                    before=tuple(name for i, name in others if i < first),
                    hidden=heads,
                    packing=packing,
                    between=between,
                    parted=not all(may_idle(module._modules[name]) for name in between),
                    last=last[0] if last else None,
                    after=tuple(name for i, name in others if i > (final if last else first)),
                    activation=bound,
                    activation_child=child,
                    activation_type=None if child is None else type(module._modules[child]),
                    kinds=tuple(kinds[name] for name in (*heads, *last)),
                    settings=settings_of(module),
                    argument=next(iter(inspect.signature(module.forward).parameters), ""),
                    save="auto",
                    backend=None,
                )


def computes(traced: Trace, plan: ChainPlan) -> bool:
    """Whether the plan computes of the stand-ins what the module's forward did: output and gradients."""
    linears = [traced.children[name] for name in plan.linears]
    parts = tuple(c.weight for c in linears), tuple(c.bias for c in linears)
    with quiet():
        try:
            y = plan.run(traced.children, parts, traced.x)  # type: ignore[arg-type]
        except (ValueError, RuntimeError):  # sizes that do not fit: another candidate will
            return False
        if traced.y.shape != y.shape or difference(traced.y, y) > TOLERANCE:
            return False
        ours = torch.autograd.grad(y, traced.inputs(), traced.dy, allow_unused=True)
    return all(
        (a is None) == (b is None) and (a is None or b is None or difference(a, b) <= TOLERANCE)
        for a, b in zip(traced.grads, ours, strict=True)
    )


def difference(a: Tensor, b: Tensor) -> float:
    """The relative L2 difference, with infinities and NaN in other places counted as infinite."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double(), b.detach().double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    a, b = a[finite], b[finite]
    return float((a - b).norm() / b.norm().clamp(min=1e-300)) if a.numel() else 0.0
