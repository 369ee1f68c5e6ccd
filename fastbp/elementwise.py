"""Dropouts and activation modules with one node that keeps least: a byte a number of a mask, z of an activation.

PyTorch's dropout keeps its mask in the dtype of its input on a CPU, and an activation written in several operations
keeps what each of them made. On a CPU our own pass over z is the faster one for most activations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastbp import producers, reference
from fastbp.activations import Activation, Bound
from fastbp.autograd import c_apply, is_special
from fastbp.backends import AUTO, native
from fastbp.forms import LINEAR_ACT
from fastbp.problem import Config, configure


class Dropout(torch.autograd.Function):
    """``y = x · noise``, noise 0 or 1 / (1 - p): ``apply(x, p)`` draws and computes as F.dropout does on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        noise = torch.empty_like(x).bernoulli_(1 - p)
        ctx.set_materialize_grads(False)
        ctx.p = p
        ctx.save_for_backward(noise.to(torch.uint8))  # which PyTorch reads faster than bool
        return noise.div_(1 - p).mul_(x).data  # of which nobody has seen that it was written to

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None]:
        (mask,) = ctx.saved_tensors
        if dy is None:
            return None, None
        noise = _noise(mask, ctx.p, dy.dtype)
        return dy * noise if is_special(dy) else noise.mul_(dy), None  # in place: new memory takes longer than the rest


def _noise(mask: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """What forward multiplied by, to the bit."""
    return mask.to(dtype).div_(1 - p)


class Activated(torch.autograd.Function):
    """``y = f(z)``: ``apply(config, z)`` keeps z alone, or y alone as the policy of the config has it."""

    @staticmethod
    def forward(ctx: Any, config: Config, z: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.config = config
        y = _value(config, z)
        ctx.save_for_backward(y if config.save == "output" else z)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[None, Tensor | None]:
        (kept,) = ctx.saved_tensors
        config: Config = ctx.config
        if dy is None:
            return None, None
        if config.save == "output":
            return None, config.grad_from_output(dy, kept)  # type: ignore[misc]
        if is_special(dy):
            return None, reference.formula_grad(config, dy, kept)
        if native.passes_over(config, kept) and native.goes_with(dy, kept):
            return None, native.activate_backward(config, dy, kept)
        return None, (config.row.spelled_grad or config.grad)(dy, kept)


def _value(config: Config, z: Tensor) -> Tensor:
    """f(z) by our own kernel where that takes less time, else by PyTorch's, or as people write it, which in 16 bits
    takes less time than the formula in 32."""
    if native.passes_over(config, z):
        return native.activate(config, z)
    return config.value(z) if config.row.aten_value is not None else _spelled(config.row)(z)


@lru_cache(maxsize=64)
def _spelled(row: Activation) -> Callable[[Tensor], Tensor]:
    return row.spelled[0]


_dropped, _activated = c_apply(Dropout), c_apply(Activated)  # where no transform is active


def dropped(x: Tensor, p: float) -> Tensor:
    """F.dropout(x, p), 0 < p < 1, on a CPU."""
    return _dropped(x, p)  # type: ignore[no-any-return]


def activated(bound: Bound, backend: str | None, z: Tensor) -> Tensor:
    """f(z), recorded for backward where gradients are."""
    return _activated(_config(bound, backend), z)  # type: ignore[no-any-return]


def is_faster(bound: Bound, backend: str | None, z: Tensor) -> bool:
    """Whether ``activated`` takes less time than PyTorch's activation."""
    return native.passes_over(_config(bound, backend), z)


def _config(bound: Bound, backend: str | None) -> Config:
    save = "output" if bound.row.torch_keeps_output else "preact"
    return configure(LINEAR_ACT.name, bound.name, bound.params, save, backend or AUTO)


def _keeps_output(node: Any) -> bool:
    return node.config.save == "output"  # type: ignore[no-any-return]


def _read_activated(node: Any) -> producers.Producer | None:
    if _keeps_output(node):
        return None
    return producers.of_activation(Bound(node.config.row, node.config.params), node.saved_tensors[0], node)


def _value_of_dropped(node: Any) -> Tensor:
    x = producers.rebuild(node.next_functions[0][0])
    return _noise(node.saved_tensors[0], node.p, x.dtype).mul_(x)


producers.OWN["DropoutBackward"] = producers.Own(
    Dropout._backward_cls,
    lambda node: producers.can_rebuild(node.next_functions[0][0], producers.DEPTH - 1),
    _value_of_dropped,
    lambda node: None,
    activation=False,
)
producers.OWN["ActivatedBackward"] = producers.Own(
    Activated._backward_cls,
    lambda node: True,
    lambda node: node.saved_tensors[0] if _keeps_output(node) else _value(node.config, node.saved_tensors[0]),
    _read_activated,
    keeps_output=_keeps_output,
    said=lambda node: node.config.row.name,
)
