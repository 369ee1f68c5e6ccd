"""Calls in graphs: what ``torch.compile`` and ``torch.export`` capture, what other exporters get, and what is refused.

A captured call is one op of ``ops``. Its derivative is registered with the dispatcher here, so whoever holds the graph
can train it: AOTAutograd, an exported program, and an exported program that is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active as functorch_active
from torch._C import _AutoDispatchBelowAutograd as BelowAutograd
from torch._C._functorch import is_legacy_batchedtensor
from torch.onnx import is_in_onnx_export

from fastbp import ops, reference
from fastbp.activations import ROWS, bind
from fastbp.forms import FORMS, Form
from fastbp.problem import Names, configure
from fastbp.reference import unflatten
from fastbp.saving import find_kept, leanest

_T = TypeVar("_T", bound=Callable[..., Any])


class _Op(torch.autograd.Function):
    """The op forward and the op backward: ``apply(names, *inputs, *weights, *biases)`` returns y and the residuals."""

    @staticmethod
    def forward(ctx: Any, names: Names, *tensors: Any) -> tuple[Tensor, ...]:
        form, activation, _, save, _ = names
        inputs, weights, biases = FORMS[form].split(tensors)
        with BelowAutograd():
            y, residuals = ops.traced_forward(names, inputs, weights, biases)
        ctx.mark_non_differentiable(*residuals)
        ctx.names, ctx.needs = names, tuple(ctx.needs_input_grad[1:])
        keep = find_kept(FORMS[form], save, ROWS[activation].grad_reads_output, ctx.needs)
        ctx.reads = keep[: len(inputs)]
        # The inputs go along for second derivatives and every weight and bias for the shapes that the op's fake needs;
        # the compiler drops what is not read.
        kept = (r if k else None for r, k in zip(residuals, keep[1 + len(tensors) :], strict=True))
        ctx.save_for_backward(*inputs, y if keep[len(inputs)] else None, *weights, *biases, *kept)
        return (y, *residuals)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        form, activation, params, _, backend = ctx.names
        saved = unflatten(FORMS[form], ctx.saved_tensors, len(ctx.needs))
        there = (*saved.inputs, *saved.weights, *saved.biases)
        needs = tuple(n and t is not None for n, t in zip(ctx.needs, there, strict=True))
        if is_grad_enabled() or functorch_active() or is_legacy_batchedtensor(dy):
            # The gradient is going to be differentiated or is batched: in plain torch and from the inputs, for to
            # autograd the residuals are constants.
            config = configure(form, activation, params, leanest(FORMS[form]), backend)
            return (None, *reference.backward(config, dy, saved, needs, differentiable=True))
        saved = saved._replace(inputs=[t if r else None for t, r in zip(saved.inputs, ctx.reads, strict=True)])
        return (None, *ops.traced_backward(ctx.names, dy, saved, needs))


def _differentiable(form: Form) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    """What the op of a form is to autograd."""
    op = getattr(torch.ops.fastbp, form.name).default
    plain = ops.decompositions()[op]

    def kernel(*args: Any) -> tuple[Tensor, list[Tensor]]:
        if functorch_active() or forward_ad._current_level >= 0:
            return plain(*args)  # type: ignore[no-any-return]  # transforms look into PyTorch's own operations
        if is_grad_enabled() and torch._C._any_requires_grad(*args):
            inputs, rest = args[: form.inputs], args[form.inputs :]
            weights, biases, (activation, params, save, backend) = ops.unpacked(form, rest)
            names = form.name, activation, tuple(params), save, backend
            y, *residuals = _Op.apply(names, *inputs, *weights, *biases)
            return y, residuals
        with BelowAutograd():
            return op(*args)  # type: ignore[no-any-return]

    return kernel


_library = torch.library.Library("fastbp", "IMPL")
for _form in FORMS.values():
    _library.impl(_form.name, _differentiable(_form), "Autograd")


def run_captured(
    names: Names, inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Tensor:
    """y of a checked call in a graph being captured, of ``Config.names``."""
    form, activation, params, _, backend = names
    if functorch_active() or is_in_onnx_export():  # an op would be a constant to the one, and unknown to the other
        return reference.compose(FORMS[form], bind(activation, params), inputs, weights, biases)
    if not (is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, *weights, *biases))):
        names = (form, activation, params, leanest(FORMS[form]), backend)  # no backward can follow
    return ops.traced_forward(names, inputs, weights, biases)[0]


def refuse_torchscript(where: str, what: str) -> NoReturn:
    """RuntimeError for ``torch.jit``, whose graphs would hold one backend's call by numbers of this process."""
    raise RuntimeError(
        f"fastbp.{where}: {what} cannot capture this call, because TorchScript has no form for it; use "
        "torch.export.export(model, args), torch.compile(model) or torch.onnx.export(model, args, dynamo=True), or "
        "call fastbp.unfuse(model) first, if fastbp.fuse made the call"
    )


def refuse_script(self: torch.nn.Module) -> NoReturn:
    """``__prepare_scriptable__`` of modules: ``torch.jit.script`` asks it what to compile in their place."""
    refuse_torchscript(type(self).__name__, "torch.jit.script")


def unscriptable(function: _T) -> _T:
    """The function, for which ``torch.jit.script`` gets a reason instead of an error about its source."""

    def refuse() -> NoReturn:
        refuse_torchscript(function.__name__, "torch.jit.script")

    function.__prepare_scriptable__ = refuse  # type: ignore[attr-defined]
    return function
