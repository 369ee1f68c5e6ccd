"""Dropouts and activation modules with one node that keeps least: a byte a number of a mask, z of an activation.

PyTorch's dropout keeps its mask in the dtype of its input on a CPU, and an activation written in several operations
keeps what each of them made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from fastbp import producers, reference
from fastbp.activations import Activation, Bound
from fastbp.autograd import c_apply, is_special
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
    """``y = f(z)``: ``apply(config, z)`` keeps z alone."""

    @staticmethod
    def forward(ctx: Any, config: Config, z: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.config = config
        ctx.save_for_backward(z)
        return _value(config, z)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[None, Tensor | None]:
        (z,) = ctx.saved_tensors
        if dy is None:
            return None, None
        grad = ctx.config.row.spelled_grad or ctx.config.grad
        return None, reference.formula_grad(ctx.config, dy, z) if is_grad_enabled() else grad(dy, z)


def _value(config: Config, z: Tensor) -> Tensor:
    """f(z) by PyTorch's kernel, or as people write it, which in 16 bits takes less time than the formula in 32."""
    return config.value(z) if config.row.aten_value is not None else _spelled(config.row)(z)


@lru_cache(maxsize=64)
def _spelled(row: Activation) -> Callable[[Tensor], Tensor]:
    return row.spelled[0]


_dropped, _activated = c_apply(Dropout), c_apply(Activated)  # where no transform is active


def dropped(x: Tensor, p: float) -> Tensor:
    """F.dropout(x, p), 0 < p < 1, on a CPU."""
    return _dropped(x, p)  # type: ignore[no-any-return]


def activated(bound: Bound, z: Tensor) -> Tensor:
    """f(z)."""
    return _activated(configure(LINEAR_ACT.name, bound.name, bound.params, "preact", "auto"), z)  # type: ignore[no-any-return]


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
    lambda node: _value(node.config, node.saved_tensors[0]),
    lambda node: producers.of_activation(Bound(node.config.row, node.config.params), node.saved_tensors[0], node),
)
