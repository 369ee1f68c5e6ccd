"""Calls with ``gradient_accumulation_fusion``: backward adds the weights' gradients to tensors of the caller's.

What is added is not returned, so autograd cannot carry it further: no second derivative, no transform, no reduction by
DistributedDataParallel. Each is refused here with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active as functorch_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd.graph import get_gradient_edge
from torch.compiler import is_compiling
from torch.nn.parallel import DistributedDataParallel

from fastbp.accumulation import ADDED_TO, PLAIN, destination
from fastbp.autograd import owns_residuals, pick
from fastbp.backends import choose_accumulating, module_of
from fastbp.forms import Form
from fastbp.problem import Config

Maybe = Tensor | None
FLAG = "gradient_accumulation_fusion"


def check_flag(given: object, where: str) -> bool:
    """The flag; TypeError, beginning with ``where``, if it is no bool."""
    if not isinstance(given, bool):
        raise TypeError(f"{where}: {FLAG} must be True or False, got {type(given).__name__} {given!r}")
    return given


def find_owners(form: Form, x: Tensor, weights: Sequence[Tensor], tensors: Sequence[Maybe]) -> tuple[Maybe, ...] | None:
    """The weights that take a gradient, None for the others; None if none does, and the flag has no effect.

    ``weights`` are the caller's, ``tensors`` all but x, as cast. ValueError for what the flag cannot serve.
    """
    owners = tuple(w if w.requires_grad else None for w in weights)
    if not any(w is not None for w in owners):
        return None
    where = f"fastbp.{form.name}"
    for t in (x, *tensors):
        if t is not None and type(t) not in PLAIN:
            raise ValueError(f"{where}: {FLAG} takes plain tensors only, got a {type(t).__name__}; leave it out")
    for i, weight in enumerate(owners):
        if weight is not None:
            _check_owner(where, form.argument("weight", i), weight)
    return owners


def check_surroundings(form: Form, weights: Sequence[Tensor]) -> None:
    """ValueError where no call that trains one of the weights can be served as things stand."""
    if any(isinstance(w, Tensor) and w.requires_grad for w in weights):
        reason = _refusal()
        if reason:
            raise ValueError(f"fastbp.{form.name}: {FLAG} cannot serve a call {reason}")


def _refusal() -> str | None:
    """Why no call can be served as things stand, or None."""
    if functorch_active():
        return (
            "inside a transform of torch.func or vmap, which would not see the weights' gradients; leave it out there"
        )
    if forward_ad._current_level >= 0:
        return "under forward-mode AD, which has no backward that could accumulate; leave it out there"
    if is_compiling() or torch._C._is_tracing() or torch._C._get_dispatch_mode(_PROXY) is not None:
        return "in a graph that is being captured, which would not hold the accumulation; capture without it"
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is not None and ddp.require_backward_grad_sync:
        return (
            "inside a DistributedDataParallel that reduces gradients: it would reduce .grad and never main_grad; run "
            "all of forward and backward under its no_sync() and reduce main_grad yourself, or leave it out"
        )
    return None


_PROXY = torch._C._TorchDispatchModeKey.PROXY


def _check_owner(where: str, name: str, weight: Tensor) -> None:
    if not weight.is_leaf:
        raise ValueError(
            f"{where}: {name} must be a leaf for {FLAG}, got the result of {weight.grad_fn.name()}; "  # type: ignore[union-attr]
            "what it was computed from would get no gradient; leave the flag out"
        )
    if weight.dtype not in ADDED_TO:
        raise ValueError(
            f"{where}: {name} must be float32, bfloat16 or float16 for {FLAG}, got {weight.dtype}, whose gradient "
            "float32 does not hold; leave the flag out"
        )
    if (weight._backward_hooks or weight._post_accumulate_grad_hooks) and not _signals(weight):
        raise ValueError(
            f"{where}: {name} has hooks that {FLAG} would never run, as it returns no gradient; remove them, or give "
            f"{name} a main_grad and set {name}.grad_added_to_main_grad = False to have them run on a dummy"
        )
    destination(where, name, weight)


def _signals(weight: Tensor) -> bool:
    """Whether the trainer is to be told by a dummy gradient, as Megatron's is."""
    return hasattr(weight, "grad_added_to_main_grad") and getattr(weight, "main_grad", None) is not None


def refuse_apart(accumulates: bool, form: Form, linears: Sequence[nn.Module]) -> None:
    """ValueError for a block with the flag whose linears have to be called as they are: nothing would accumulate."""
    if accumulates and torch.is_grad_enabled() and any(p.requires_grad for m in linears for p in m.parameters()):
        kinds = ", ".join(type(m).__name__ for m in linears)
        raise ValueError(
            f"fastbp.{form.name}: {FLAG} needs plain nn.Linear modules, without hooks on them or on all modules and "
            f"with plain tensors as weights, got {kinds} of which one is not; leave the flag out"
        )


class _AccumulatingFunction(torch.autograd.Function):
    """A call of any form; the residuals are no outputs, for there is no second derivative."""

    @staticmethod
    def forward(ctx: Any, config: Config, owners: tuple[Maybe, ...], nodes: Any, x: Tensor, *tensors: Maybe) -> Tensor:
        output = tuple(module_of(config).forward(config, x, tensors))
        ctx.set_materialize_grads(False)
        ctx.config, ctx.owners, ctx.nodes = config, owners, nodes
        needs = ctx.needs = ctx.needs_input_grad[3:]
        ctx.save_for_backward(*pick(config, needs)((config, x, *tensors, *output, None)))
        return output[0]  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Maybe) -> tuple[Maybe, ...]:
        config, owners = ctx.config, ctx.owners
        if dy is None:
            return (None,) * (3 + len(ctx.needs))
        where = f"fastbp.{config.form.name}"
        batched = functorch_active() or is_legacy_batchedtensor(dy)
        if torch.is_grad_enabled() or batched or forward_ad._current_level >= 0 or is_compiling():
            raise RuntimeError(
                f"{where}: the backward of a call with {FLAG} can be neither differentiated (create_graph=True), nor "
                "batched, nor traced: it adds the weights' gradients and does not return them; leave the flag out"
            )
        saved = ctx.saved_tensors
        needs = list(ctx.needs)
        into: list[Maybe] = [None] * len(owners)
        for i, owner in enumerate(owners):
            if owner is None:
                continue
            try:
                accumulates = torch._C._will_engine_execute_node(ctx.nodes[i])
            except RuntimeError:
                continue  # autograd.grad asks for this weight: it gets the gradient, and nothing is added
            if accumulates:
                into[i] = destination(where, config.form.argument("weight", i), owner, make=True)
            else:
                needs[config.form.inputs + i] = False  # autograd.grad and backward(inputs=...) leave out the others
        alone = owns_residuals(ctx, dy, saved)
        grads = module_of(config).backward(config, dy, saved, tuple(needs), alone, into)
        for i, owner in enumerate(owners):
            if into[i] is not None and _signals(owner):
                make = torch.zeros if getattr(owner, "zero_out_wgrad", False) else torch.empty
                grads[config.form.inputs + i] = make(owner.shape, dtype=dy.dtype, device=dy.device)
                owner.grad_added_to_main_grad = True
        return (None, None, None, *grads)


def run(config: Config, owners: tuple[Maybe, ...], x: Tensor, tensors: tuple[Maybe, ...]) -> Tensor:
    """y of a checked call whose ``owners`` get their gradients added; ``tensors`` the other tensors of it."""
    config = choose_accumulating(config, x.device, x.dtype)
    nodes = tuple(None if w is None else get_gradient_edge(w).node for w in owners)
    return _AccumulatingFunction.apply(config, owners, nodes, x, *tensors)  # type: ignore[no-any-return]
