"""What autocast casts before a call, and the casts of weights, kept until the region ends as F.linear's are.

PyTorch's own cache cannot be asked for a tensor, and returns a cast from before its weight was changed. So the casts
are kept here. When a region ends, or ``torch.clear_autocast_cache`` is called, only PyTorch's cache is told; so it is
given something to hold, the cast of an empty tensor, on whose node in the graph the casts hang. With that they go.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active as functorch_active
from torch.compiler import is_compiling
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Casts(dict[int, tuple["weakref.ref[Any]", int, int, Tensor]]):
    """By the id of a weight: the weight, its version and address when it was cast, and the cast."""

    __slots__ = ("__weakref__",)


_PLAIN = (nn.Parameter, Tensor)
_current: weakref.ref[_Casts] = weakref.ref(_Casts())  # of all threads, as PyTorch's cache is


def cast_all(tensors: Sequence[Any], dtype: torch.dtype, device: str) -> list[Any]:
    """As autocast casts the arguments of F.linear on this type of device: floating point except float64."""
    casts = _of_region(dtype, device)
    if casts is None:
        return [_plain(t, dtype) for t in tensors]
    found = []
    for t in tensors:
        cast = _kept(casts, t, dtype)
        found.append(_cast(t, dtype, casts, tensors) if cast is None else cast)
    return found


def cast_weight(weight: Tensor) -> Tensor:
    """A weight as autocast casts it, for who takes views of it: they share one cast, as one F.linear does.

    Without autocast, and for what is no float32 leaf that takes gradients, the weight itself, whose views are cast.
    """
    device = weight.device.type
    if is_compiling() or device == "meta" or not torch.is_autocast_enabled(device) or not _is_weight(weight):
        return weight
    (cast,) = cast_all((weight,), torch.get_autocast_dtype(device), device)
    return cast  # type: ignore[no-any-return]


def _of_region(dtype: torch.dtype, device: str) -> _Casts | None:
    """Where casts are kept now, if they are."""
    if is_compiling() or not torch.is_autocast_cache_enabled() or _passing(device):
        return None
    casts = _current()
    return _begin(device, dtype) if casts is None else casts


def _kept(casts: _Casts, tensor: Any, dtype: torch.dtype) -> Tensor | None:
    """The cast of a weight, if there is one of the weight as it is."""
    entry = casts.get(id(tensor))
    if entry is None:
        return None
    weight, version, address, cast = entry
    owner: Any = weight()
    fresh = owner is tensor and owner._version == version and owner.data_ptr() == address
    # Made in inference mode it serves no gradient.
    fits = cast.requires_grad or not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    return cast if fresh and fits and cast.dtype is dtype and tensor.requires_grad else None


def _plain(tensor: Any, dtype: torch.dtype) -> Any:
    """The tensor as autocast casts it, kept by nobody."""
    if not isinstance(tensor, Tensor) or tensor.dtype is dtype:
        return tensor
    return tensor if tensor.dtype is torch.float64 or not tensor.is_floating_point() else tensor.to(dtype)


def _is_weight(tensor: Tensor) -> bool:
    """Whether F.linear's cast of it would be kept: of float32 leaves that take a gradient."""
    weight = tensor.requires_grad and tensor.is_leaf and tensor.dtype is torch.float32 and type(tensor) in _PLAIN
    return weight and not tensor._is_view() and not tensor.is_inference()


def _cast(tensor: Any, dtype: torch.dtype, casts: _Casts, tensors: Sequence[Any]) -> Any:
    """One cast for a call of these tensors, kept if it is of a weight, or taken of a weight's."""
    if not isinstance(tensor, Tensor) or tensor.dtype is not torch.float32 or tensor.dtype is dtype:
        return _plain(tensor, dtype)
    if tensor._is_view():
        part = _part_of_weight(tensor, dtype, casts, tensors)
        return tensor.to(dtype) if part is None else part
    return _cast_weight(tensor, dtype, casts) if _is_weight(tensor) else tensor.to(dtype)


def _cast_weight(weight: Tensor, dtype: torch.dtype, casts: _Casts) -> Tensor:
    version = weight._version
    with torch.enable_grad():  # a later call may want gradients; inference mode, stronger, has a cast of its own
        cast = weight.to(dtype)
    if type(cast) is Tensor:  # not of a mode that computes without data
        casts[id(weight)] = weakref.ref(weight), version, weight.data_ptr(), cast
    return cast


def _part_of_weight(view: Tensor, dtype: torch.dtype, casts: _Casts, tensors: Sequence[Any]) -> Tensor | None:
    """A view of a weight, as gate and up of one parameter are, by the weight's cast; None where it needs its own.

    Only where the call's views have as many numbers as the weight, so that its cast is none too many.
    """
    weight: Any = view._base
    if not _is_weight(weight) or view.is_neg() or type(view) is not Tensor or forward_ad._current_level >= 0:
        return None
    if sum(t.numel() for t in tensors if isinstance(t, Tensor) and t._base is weight) < weight.numel():
        return None
    offset = view.storage_offset() - weight.storage_offset()
    last = offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    if offset < 0 or last >= weight.numel():  # it looks beside the weight
        return None
    cast = _kept(casts, weight, dtype)
    if cast is None:
        cast = _cast_weight(weight, dtype, casts)
    if type(cast) is not Tensor or cast.stride() != weight.stride():
        return None
    return _Part.apply(view, (cast.detach(), offset))  # type: ignore[no-any-return]


class _Part(torch.autograd.Function):
    """A view of a weight as the same view of the cast. Its gradient is the view's, as that of a cast of its own is.

    So whoever holds the view finds it in the graph, with its hooks. The tuple hides the cast from autograd.
    """

    @staticmethod
    def forward(ctx: Any, view: Tensor, cast: tuple[Tensor, int]) -> Tensor:
        ctx.dtype = view.dtype
        return cast[0].as_strided(view.shape, view.stride(), cast[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def _passing(device: str) -> bool:
    """Whether casts made now belong to a transform, to a graph being captured, and not to what comes after."""
    return functorch_active() or (device == "cuda" and torch.cuda.is_current_stream_capturing())


def _begin(device: str, dtype: torch.dtype) -> _Casts:
    """The casts of a region, which live as long as PyTorch keeps its own."""
    global _current
    _watch_optimizers()
    # Modes of the user's neither see nor change this, and it saves nothing that hooks of theirs would see.
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.inference_mode(False):
        leaf, empty = _empty(device, dtype)
        node = torch.addmm(leaf, empty, empty).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    casts: _Casts = node.metadata.setdefault("fastbp", _Casts())  # type: ignore[union-attr]
    _current = weakref.ref(casts)
    return casts


@cache
def _empty(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A leaf for autocast to cast, and what needs no cast beside it."""
    leaf = torch.empty((0, 0), device=device, dtype=torch.float32, requires_grad=True)
    return leaf, torch.empty_like(leaf, dtype=dtype, requires_grad=False)


@cache
def _watch_optimizers() -> None:
    """Forget all casts after any optimizer's step.

    Fused steps do not count up the version of what they change, and the optimizers of some trainers change copies of
    the weights, which are then written back by way of ``.data``, past the counter too.
    """
    register_optimizer_step_post_hook(_forget)


def _forget(*_: Any) -> None:
    casts = _current()
    if casts is not None:
        casts.clear()
