"""Calls on DTensors: how the tensors lie on the mesh, and the call on plain tensors that each rank makes of its part.

What a rank keeps for backward never leaves it, so every policy, backend and derivative serves as it does without a
mesh. That is why the ops have no sharding rules: of a row of half bytes, or of scales, DTensor knows no parts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastbp.forms import Form

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

_TENSOR = "torch.distributed.tensor"  # takes a second to import: where nobody has done so there is no DTensor
_SUM = -1  # y is the sum of what the ranks have
Place = int | None  # the dimension that is cut, None where every rank has all


class Layout(NamedTuple):
    """How a call is divided along one dimension of the mesh; ``y`` may also be a sum."""

    x: Place  # and other inputs, if there are some
    weights: tuple[Place, ...]
    biases: tuple[Place, ...]
    y: Place


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is distributed."""
    if _TENSOR not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def applies(x: object, tensors: Sequence[Tensor | None]) -> bool:
    """Whether these are DTensors, all of one mesh that this rank is part of; for what is mixed PyTorch speaks."""
    if not is_dtensor(x):
        return False
    mesh = x.device_mesh
    for t in tensors:
        if t is not None and not (is_dtensor(t) and t.device_mesh == mesh):
            return False
    return mesh.get_coordinate() is not None


def layouts(form: Form, linear: bool, count: int, dims: int) -> list[Layout]:
    """The ways to divide a call of ``count`` linears and an x of ``dims`` dimensions; ``linear``: f(z) = z.

    An activation between a product that is divided along its sum and the sum itself has none. One before a product, of
    z that is given, has all.
    """
    whole = (None,) * count
    found = [Layout(None, whole, whole, None)]
    found += [Layout(d, whole, whole, d) for d in range(dims - 1)]
    if not form.projected or count == 1:  # the columns of y
        found.append(Layout(None, (0,) * count, (0,) * count, dims - 1))
    if form.projected and form.hidden(count) == 1 and not form.given:  # those of the hidden layer
        hidden = (0,) * (count - 1)
        found.append(Layout(None, (*hidden, 1), (*hidden, None), _SUM))
    if count == 1 and (form.projected or linear):
        found.append(Layout(dims - 1, (1,), (None,), _SUM))
    return found


def call(
    form: Form,
    linear: bool,
    inputs: Sequence[Any],
    weights: Sequence[Any],
    biases: Sequence[Any],
    on_part: Callable[..., Tensor],
) -> Tensor:
    """y of a checked call that ``applies``, by ``on_part(x, weights, biases, others=)`` of what this rank has to do.

    Of the layouts the one that moves least is taken, along each dimension of the mesh.
    """
    x, count = inputs[0], len(weights)
    mesh = x.device_mesh
    known = layouts(form, linear, count, x.dim())
    chosen = [_cheapest(known, inputs, weights, biases, i) for i in range(mesh.ndim)]
    summands = math.prod([mesh.size(i) for i, layout in enumerate(chosen) if layout.y == _SUM])

    my_x, *others = [_part(t, [layout.x for layout in chosen], chosen) for t in inputs]
    my_weights = tuple(_part(w, [layout.weights[i] for layout in chosen], chosen) for i, w in enumerate(weights))
    my_biases = [_part(b, [layout.biases[i] for layout in chosen], chosen) for i, b in enumerate(biases)]
    if summands > 1 and my_biases[-1] is not None:
        my_biases[-1] = my_biases[-1] / summands  # the bias of what is summed must come out once
    y = on_part(my_x, my_weights, tuple(my_biases), others=tuple(others))
    shape = (*x.shape[:-1], weights[-1].shape[0])
    placements = _placements([layout.y for layout in chosen])
    if is_compiling():
        return _joined(y, mesh, placements, shape, grad_placements=_of_gradient(placements))
    return _Join.apply(y, mesh, placements, shape)  # type: ignore[no-any-return]


def _cheapest(
    known: Sequence[Layout],
    inputs: Sequence[DTensor],
    weights: Sequence[DTensor],
    biases: Sequence[DTensor | None],
    dim: int,
) -> Layout:
    """The first of those that move least; Dynamo's ``min`` takes no key."""
    costs = [_moved(layout, inputs, weights, biases, dim) for layout in known]
    return known[costs.index(min(costs))]


def _moved(
    layout: Layout,
    inputs: Sequence[DTensor],
    weights: Sequence[DTensor],
    biases: Sequence[DTensor | None],
    dim: int,
) -> float:
    """About how many numbers go over the wires along one dimension of the mesh before the call."""
    moved = 0.0
    places = (*[layout.x] * len(inputs), *layout.weights, *layout.biases)
    for t, place in zip((*inputs, *weights, *biases), places, strict=True):
        if t is None or t.placements[dim].is_replicate():
            continue
        here = t.placements[dim]
        if place is None:
            moved += t.numel() * (2 if here.is_partial() else 1)
        elif not here.is_shard(place):
            moved += t.numel() / (t.device_mesh.size(dim) if here.is_shard() else 1)
    return moved


def _placements(places: Sequence[Place]) -> tuple[Placement, ...]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    return tuple([Replicate() if p is None else Partial() if p == _SUM else Shard(p) for p in places])


def _part(tensor: DTensor | None, places: Sequence[Place], chosen: Sequence[Layout]) -> Any:
    """What this rank has of a tensor that lies like this.

    Where ranks do different work with the same numbers, their gradients add up.
    """
    if tensor is None:
        return None
    shared = [p is None and layout.y is not None for p, layout in zip(places, chosen, strict=True)]
    of_gradient = [_SUM if s else p for p, s in zip(places, shared, strict=True)]
    tensor = _laid(tensor, _placements(places))
    if is_compiling():
        return tensor.to_local(grad_placements=_placements(of_gradient))
    return _Split.apply(tensor, _placements(of_gradient))


def _laid(tensor: DTensor, placements: tuple[Placement, ...]) -> DTensor:
    return tensor if tensor.placements == placements else tensor.redistribute(placements=placements)


def _joined(
    local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int], **options: Any
) -> DTensor:
    """The DTensor of which each rank has a part; its shape is given, as the parts may be of different sizes."""
    from torch.distributed.tensor import DTensor

    stride = tuple([math.prod(shape[d + 1 :]) for d in range(len(shape))])
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride, **options
    )


def _of_gradient(placements: Sequence[Placement]) -> tuple[Placement, ...]:
    """How the gradient of a DTensor has to lie; that of a sum is the gradient of every summand."""
    from torch.distributed.tensor import Replicate

    return tuple([Replicate() if p.is_partial() else p for p in placements])


# PyTorch's own to_local and from_local lose the graph of a second derivative where a gradient has to be redistributed.
# Compiled code has no second derivatives, and takes them: Dynamo would decide in its trace how a gradient lies.
class _Split(torch.autograd.Function):
    """From a DTensor to what this rank has of it, given how its gradient lies."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, of_gradient: tuple[Placement, ...]) -> Tensor:
        ctx.mesh, ctx.of_gradient, ctx.shape = tensor.device_mesh, of_gradient, tensor.shape
        local = tensor.to_local()
        return local.view_as(local)  # a tensor of its own, as autograd writes into it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Join.apply(grad, ctx.mesh, ctx.of_gradient, ctx.shape), None


class _Join(torch.autograd.Function):
    """From what the ranks have to the DTensor that lies like this."""

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...], shape: Sequence[int]
    ) -> DTensor:
        ctx.placements = placements
        return _joined(local, mesh, placements, shape)

    @staticmethod
    def backward(ctx: Any, grad: DTensor) -> tuple[Any, ...]:
        return _Split.apply(_laid(grad, _of_gradient(ctx.placements)), ctx.placements), None, None, None
