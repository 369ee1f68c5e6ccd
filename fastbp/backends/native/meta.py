"""What PyTorch's own tools ask of the ops: results without numbers, arithmetic, and what stands for them in a graph."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowADInplaceOrView
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from fastbp import flops, reference, shapes
from fastbp.backends.native.library import config_of, decoded, is_absent, ops, present, unavailable
from fastbp.problem import check


def _forward_fake(x: Tensor, tensors: list[Tensor], settings: int, params: list[float]) -> list[Tensor]:
    """What ``forward`` returns, unwritten."""
    form, save, *_ = decoded(settings)
    (_, *others), weights, biases = form.split((x, *tensors))
    check(form, x, weights, present(biases), others)
    return shapes.new_results(form, save, x, [w.shape for w in weights])


def _forward_flops(x: Tensor, tensors: list[Tensor], settings: int, params: list[float]) -> int:
    _, weights, _ = decoded(settings)[0].split((x, *tensors))
    return shapes.forward_flops(prod(x.shape[:-1]), [w.shape for w in weights])


def _weights_of(dy: Tensor, saved: list[Tensor], settings: int, needs: tuple[bool, ...]) -> list[shapes.Shape]:
    """The shapes of a backward call's weights, those too that it does not read."""
    form, save, row, _ = decoded(settings)
    inputs, _, weights, _, residuals = reference.unflatten(form, saved, len(needs))
    return shapes.find_weights(
        form,
        save,
        row.grad_reads_output,
        needs,
        dy.shape,
        [t.shape for t in inputs],
        [w.shape if w.dim() == 2 else None for w in weights],
        [r.shape for r in residuals],
    )


def _backward_fake(
    dy: Tensor, saved: list[Tensor], settings: int, params: list[float], needs: list[bool]
) -> list[Tensor]:
    """What ``backward`` returns, unwritten."""
    for tensor in saved:
        if tensor.device != dy.device and not is_absent(tensor):
            raise RuntimeError(f"fastbp_native: tensors on {tensor.device} and {dy.device} in one call")
    weights = _weights_of(dy, saved, settings, tuple(needs))
    grads = [None if s is None else dy.new_empty(s) for s in shapes.gradient_shapes(dy.shape, weights, needs)]
    form, *_, route = decoded(settings)
    if dy.device.type == "cpu" and route in ("", "library", "row") and all(map(all, (dy.shape, *weights))):
        for i, weight in enumerate(reference.unflatten(form, saved, len(needs)).weights, start=form.inputs):
            grad = grads[i]
            if grad is not None and weight.dim() == 2 and weight.stride(0) == 1 != weight.stride(1):
                grads[i] = grad.new_empty(grad.shape[::-1]).mT  # it lies as the weight does
    return [grad for grad in grads if grad is not None]


def _recorded_forward(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """A call that make_fx records, as PyTorch's operations: this op has no derivative, and its settings no meaning
    in another process."""
    x, tensors, settings, params = args
    config = config_of(settings, params)
    with mode, _AutoDispatchBelowADInplaceOrView():
        y, residuals = reference.forward(config, *config.form.split((x, *present(tensors))))
    return [y, *residuals]


def _recorded_backward(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The same of backward."""
    dy, saved, settings, params, needs = args
    config = config_of(settings, params)
    parts = reference.unflatten(config.form, present(saved), len(needs))
    with mode, _AutoDispatchBelowADInplaceOrView():
        grads = reference.backward(config, dy, parts, tuple(needs))
    return [grad for grad in grads if grad is not None]


def _backward_flops(dy: Tensor, saved: list[Tensor], settings: int, params: list[float], needs: list[bool]) -> int:
    form, save, *_ = decoded(settings)
    weights = _weights_of(dy, saved, settings, tuple(needs))
    return shapes.backward_flops(form, save, prod(dy.shape[:-1]), weights, tuple(needs))


def _activate_fake(z: Tensor, settings: int, params: list[float]) -> Tensor:
    return torch.empty_like(z)


def _activate_backward_fake(dy: Tensor, z: Tensor, settings: int, params: list[float]) -> Tensor:
    return torch.empty_like(z)


def _recorded_activate(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    z, settings, params = args
    with mode, _AutoDispatchBelowADInplaceOrView():
        return config_of(settings, params).value(z)


def _recorded_activate_backward(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    dy, z, settings, params = args
    with mode, _AutoDispatchBelowADInplaceOrView():
        return config_of(settings, params).grad(dy, z)


if unavailable is None:
    # Autograd is the business of the Functions around the ops, and its fallback costs a detour.
    _beneath_autograd = torch.library.Library("fastbp_native", "IMPL", "Autograd")
    _more = torch.library.Library("fastbp_native", "FRAGMENT")
    _known: tuple[tuple[Any, Callable[..., Any], Callable[..., int] | None, Callable[..., Any]], ...] = (
        (ops().forward, _forward_fake, _forward_flops, _recorded_forward),
        (ops().backward, _backward_fake, _backward_flops, _recorded_backward),
        (ops().activate, _activate_fake, None, _recorded_activate),
        (ops().activate_backward, _activate_backward_fake, None, _recorded_activate_backward),
    )
    for _packet, _fake, _flops, _recorded in _known:
        _beneath_autograd.impl(_packet.__name__, torch.library.fallthrough_kernel)
        _name = f"fastbp_native::{_packet.__name__}"
        torch.library.register_fake(_name, _fake, lib=_more)
        torch.library.register_torch_dispatch(_name, ProxyTorchDispatchMode, _recorded, lib=_more)
        if _flops is not None:  # of products alone
            flops.count_as(_packet, _flops)
