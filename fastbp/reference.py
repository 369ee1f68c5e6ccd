"""The op in plain torch, for any dtype and device: the yardstick of the backends, and what serves where none does.

With h_0 = x, for the hidden layers and the last plain linear of a block (docs/design.md):

    forward    z_l = h_{l-1} W_lᵀ + b_l        h_l = f(z_l)           gated: h = f(g) · u
    backward   dz_l = dh_l · f'(z_l)           dW_l = dz_lᵀ h_{l-1}   db_l = Σ dz_l   dh_{l-1} = dz_l W_l

Of a given form z, or g and u, are the inputs, and their gradients are dz, or dg and du.

Everything here is differentiable. ``differentiable=True`` takes the formulas of the table, which can be differentiated
any number of times and in forward mode, instead of PyTorch's fused gradient kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbp.accumulation import add_product
from fastbp.activations import Bound, rounded, wide
from fastbp.forms import Form
from fastbp.problem import Config
from fastbp.residuals import gated_kept, grad_from_side, output_and_kept, read_kept
from fastbp.saving import POLICIES, kept, needed_below, safe_policies

Maybe = Tensor | None


class Saved(NamedTuple):
    """What forward left for backward; what ``saving.kept`` does not name may be None."""

    inputs: Sequence[Any]
    y: Maybe
    weights: Sequence[Any]
    biases: Sequence[Any]
    residuals: Sequence[Any]


def unflatten(form: Form, tensors: Sequence[Maybe], count: int) -> Saved:
    """What was saved in one row: the inputs, y, weights, biases, residuals, of a call of ``count`` tensors."""
    y, end = form.inputs, 1 + count
    half = (end + y + 1) // 2
    parts = (tensors[:y], tensors[y], tensors[y + 1 : half], tensors[half:end], tensors[end:])
    return tuple.__new__(Saved, parts)  # without the Python call that Saved() is


def _grad(config: Config, dy: Maybe, z: Any, differentiable: bool) -> Maybe:
    """dz from dy and z."""
    if dy is None:
        return None
    if not differentiable:
        return config.grad(dy, z)
    return formula_grad(config, dy, z)


def formula_grad(config: Config, dy: Tensor, z: Tensor) -> Tensor:
    """dz from dy and z by the table's formula, which can be differentiated."""
    dtype = wide(z.dtype)
    return config.row.grad(dy.to(dtype), z.to(dtype), *config.params).to(z.dtype)


def _grad_from_output(config: Config, dy: Maybe, y: Any, differentiable: bool) -> Maybe:
    """dz from dy and y."""
    formula, kernel = config.row.grad_from_output, config.grad_from_output
    assert formula is not None and kernel is not None, config.row.name
    if dy is None or not config.row.grad_reads_output:
        return dy
    if not differentiable:
        return kernel(dy, y)
    params = rounded(config.params, y.dtype) if config.row.limits else config.params
    dtype = wide(dy.dtype)
    return formula(dy.to(dtype), y.to(dtype), *params).to(dy.dtype)


def compose(
    form: Form,
    activation: Bound | Callable[[Tensor], Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Maybe],
) -> Tensor:
    """y by PyTorch's own operations and nothing of ours, for transforms that cannot look into a Function or an op."""
    x = inputs[0]
    if form.given:
        return F.linear(activation(x) * inputs[1] if form.gated else activation(x), weights[0], biases[0])
    if not form.gated and not form.projected:
        return activation(F.linear(x, weights[0], biases[0]))
    h = x
    if form.gated:
        h = activation(F.linear(x, weights[0], biases[0])) * F.linear(x, weights[1], biases[1])
    else:
        for i in range(len(weights) - 1):
            h = activation(F.linear(h, weights[i], biases[i]))
    return F.linear(h, weights[-1], biases[-1]) if form.projected else h


def forward(
    config: Config, inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Maybe]
) -> tuple[Tensor, list[Tensor]]:
    """y and the residuals of the policy: z of every hidden layer, or its output, or nothing."""
    form = config.form
    residuals: list[Tensor] = []
    h = x = inputs[0]
    if form.gated:
        g, u = inputs if form.given else (F.linear(x, w, b) for w, b in zip(weights[:2], biases[:2], strict=True))
        h = config.value(g) * u
        residuals = [*gated_kept(config, g, u)]
    elif form.given:
        h, kept = output_and_kept(config, x)
        residuals = [t.clone() if t is x else t for t in kept]  # an input must not be returned
    else:
        for i in range(len(weights) - form.projected):
            z = F.linear(h, weights[i], biases[i])
            h, kept = output_and_kept(config, z)
            # identity's value is z itself, and one tensor must not be returned twice
            residuals += [t.clone() if t is h and not form.projected else t for t in kept]
    return (F.linear(h, weights[-1], biases[-1]) if form.projected else h), residuals


def backward(
    config: Config,
    dy: Maybe,
    saved: Saved,
    needs: tuple[bool, ...],
    dresiduals: Sequence[Maybe] = (),
    differentiable: bool = False,
    into: Sequence[Maybe] | None = None,
) -> list[Maybe]:
    """The gradients of the inputs, of every weight and of every bias; None where ``needs`` does not ask.

    ``dy`` may be None, and ``dresiduals`` are gradients that reach the residuals themselves: both in a double backward
    only. Where ``into`` has a tensor for a weight, its gradient is added there instead (``accumulation.add_product``).
    """
    any_grad = dy if dy is not None else next((d for d in dresiduals if d is not None), None)
    if any_grad is not None and any_grad.dim() != 2:
        return _backward_of_rows(config, dy, saved, needs, dresiduals, differentiable, into, any_grad.shape[:-1])
    if any_grad is None:
        return [None] * len(needs)
    again = config.save == "recompute"
    if POLICIES[config.save].compressed:
        dresiduals = ()  # to autograd, what was kept is no function of anything
        if differentiable:
            _check_replayable(config, saved)
            again = True
    residuals: Any = None
    if config.form.given and (again or config.save == "preact"):
        residuals = saved.inputs
    elif again:
        residuals = replay(config, saved, needs)
    slopes: Any = residuals
    if residuals is None:
        residuals, slopes = read_kept(config, saved.y, saved.residuals, any_grad.dtype)
    saved = saved._replace(residuals=residuals)
    if config.form.gated:
        return _gated_backward(config, dy, saved, needs, dresiduals, differentiable, into)

    # linear_act, mlp and act_linear: the delta rule, dz_{l-1} = (dz_l W_l) · f'(z_{l-1})
    (x,), weights = saved.inputs, saved.weights
    count, from_output = len(weights), POLICIES[config.save].from_output and not again
    given = int(config.form.given)  # then layer 0 has no linear, and layer i has linear i - 1
    below = needed_below(config.form, needs)
    grads: list[Maybe] = [None] * len(needs)
    kernel: Any = config.grad
    if from_output:
        kernel = config.grad_from_output if config.save == "output" else partial(grad_from_side, config)
    plain = not differentiable and not dresiduals and dy is not None  # the first backward, where time counts
    d: Any = dy
    for layer in range(count - 1 + given, -1, -1):
        i = layer - given
        if layer < len(residuals):  # from dh to dz, through the activation of the layer; a last plain linear has none
            if plain:
                d = kernel(d, slopes[layer])
            else:
                dresidual = dresiduals[layer] if dresiduals else None
                if from_output:
                    d = _grad_from_output(config, add(d, dresidual), residuals[layer], differentiable)
                else:
                    d = add(_grad(config, d, residuals[layer], differentiable), dresidual)
        if d is None or i < 0:
            continue
        if needs[1 + i]:
            h: Any = x if layer == 0 else residuals[layer - 1]
            h = h if layer == 0 or from_output else config.value(h)
            grads[1 + i] = weight_grad(d, h, weights[i]) if into is None else add_product(into[i], d, h)
        if needs[1 + count + i]:
            grads[1 + count + i] = d.sum(0)
        if not below[layer]:
            break
        d = d.mm(weights[i])
    else:
        grads[0] = d
    return grads


def _backward_of_rows(
    config: Config,
    dy: Maybe,
    saved: Saved,
    needs: tuple[bool, ...],
    dresiduals: Sequence[Maybe],
    differentiable: bool,
    into: Sequence[Maybe] | None,
    leading: torch.Size,
) -> list[Maybe]:
    """``backward`` with the leading sizes of x made one, so that it sees matrices only."""
    count = prod(leading)  # leading.numel() would make a number of a symbol

    def rows(t: Maybe) -> Maybe:
        return None if t is None else t.reshape(count, t.shape[-1])

    inputs, y, weights, biases, residuals = saved
    flat = Saved([rows(t) for t in inputs], rows(y), weights, biases, [rows(r) for r in residuals])
    grads = backward(config, rows(dy), flat, needs, [rows(d) for d in dresiduals], differentiable, into)
    for i in range(len(inputs)):
        d = grads[i]
        grads[i] = None if d is None else d.view(*leading, d.shape[-1])
    return grads


def weight_grad(d: Tensor, h: Any, weight: Maybe) -> Any:
    """``dᵀ h``, laid out as the weight is, if that was kept: for one of (in, out) anything else is copied again."""
    by_columns = weight is not None and weight.stride(0) == 1 != weight.stride(1)
    return h.mT.mm(d).mT if by_columns else d.mT.mm(h)


def _gated_backward(
    config: Config,
    dy: Maybe,
    saved: Saved,
    needs: tuple[bool, ...],
    dresiduals: Sequence[Maybe],
    differentiable: bool,
    into: Sequence[Maybe] | None,
) -> list[Maybe]:
    """``gated_linear_act``, ``gated_mlp`` and ``gated_act_linear``: dg = dh · u · f'(g), du = dh · f(g)."""
    form = config.form
    (x, *_), _, weights, _, (g, u) = saved
    need_inputs, need_weights, need_biases = form.split(needs)
    need_x, count, first, last = need_inputs[0], len(weights), form.inputs, len(weights) - 1
    grads: list[Maybe] = [None] * len(needs)
    dh: Any = dy
    if form.projected and dy is not None:
        if need_weights[last]:
            h = config.value(g) * u
            grads[first + last] = weight_grad(dy, h, weights[last]) if into is None else add_product(into[last], dy, h)
        if need_biases[last]:
            grads[-1] = dy.sum(0)
        dh = dy.mm(weights[last]) if needed_below(form, needs)[1] else None
    wanted = need_inputs if form.given else [need_x or need_weights[i] or need_biases[i] for i in range(2)]
    dg, du = dresiduals or (None, None)
    if dh is not None and wanted[0]:
        dg = add(_grad(config, dh * u, g, differentiable), dg)
    if dh is not None and wanted[1]:
        du = add(dh * config.value(g), du)
    if form.given:
        grads[:2] = dg, du
        return grads
    for i, dz in enumerate((dg, du)):
        if dz is None:
            continue
        if need_weights[i]:
            grads[1 + i] = weight_grad(dz, x, weights[i]) if into is None else add_product(into[i], dz, x)
        if need_biases[i]:
            grads[1 + count + i] = dz.sum(0)
        if need_x:
            grads[0] = add(grads[0], dz.mm(weights[i]))
    return grads


def add(a: Maybe, b: Maybe) -> Maybe:
    """a + b, where None is a zero that costs nothing."""
    return b if a is None else a if b is None else a + b


def replay(config: Config, saved: Saved, needs: tuple[bool, ...]) -> list[Maybe]:
    """The pre-activations again, as deep as backward looks at them; of a form whose linears make them."""
    (x, *_), _, weights, biases, _ = saved
    wanted = kept(config.form, "preact", True, needs)[1 + len(needs) :]
    if config.form.gated:
        return [F.linear(x, weights[i], biases[i]) if wanted[i] else None for i in range(2)]
    zs: list[Maybe] = []
    for i in range(len(wanted)):
        if any(wanted[i:]):
            zs.append(F.linear(config.value(zs[-1]) if zs else x, weights[i], biases[i]))  # type: ignore[arg-type]
    return zs + [None] * (len(wanted) - len(zs))


def _check_replayable(config: Config, saved: Saved) -> None:
    if any(t is None for t in saved.inputs):
        form = config.form
        names = " and ".join(form.names_of_inputs)
        why = "the policy keeps less in its place" if form.given else "no weight that reads it takes a gradient"
        raise RuntimeError(
            f"fastbp.{form.name}: a gradient that is differentiated again (create_graph=True) takes {names} under "
            f"save={config.save!r}, and {names} was not kept, because {why}; use save={safe_policies(form)}"
        )
