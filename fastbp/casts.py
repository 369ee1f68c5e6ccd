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
    casts = None
    if not is_compiling() and torch.is_autocast_cache_enabled() and not _passing(device):
        casts = _current()
        if casts is None:
            casts = _begin(device, dtype)
    found = []
    for t in tensors:
        entry = None if casts is None else casts.get(id(t))
        if entry is not None:
            weight, version, address, cast = entry
            owner: Any = weight()
            fresh = owner is t and owner._version == version and owner.data_ptr() == address
            # Made in inference mode it serves no gradient.
            fits = cast.requires_grad or not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
            if fresh and fits and cast.dtype is dtype and t.requires_grad:
                found.append(cast)
                continue
        found.append(_cast(t, dtype, casts))
    return found


def _cast(tensor: Any, dtype: torch.dtype, casts: _Casts | None) -> Any:
    """One cast, kept if F.linear's would be: of float32 leaves that take a gradient."""
    if not isinstance(tensor, Tensor) or tensor.dtype is dtype:
        return tensor
    if tensor.dtype is torch.float64 or not tensor.is_floating_point():
        return tensor
    weight = tensor.requires_grad and tensor.is_leaf and tensor.dtype is torch.float32 and type(tensor) in _PLAIN
    if casts is None or not weight or tensor._is_view() or tensor.is_inference():
        return tensor.to(dtype)
    version = tensor._version
    with torch.enable_grad():  # a later call may want gradients; inference mode, stronger, has a cast of its own
        cast = tensor.to(dtype)
    if type(cast) is Tensor:  # not of a mode that computes without data
        casts[id(tensor)] = weakref.ref(tensor), version, tensor.data_ptr(), cast
    return cast


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
