"""The op in plain torch, for any dtype and device: the yardstick of the backends, and what serves where none does.

With h_0 = x, for the hidden layers and the last plain linear of a block (docs/design.md):

    forward    z_l = h_{l-1} W_lᵀ + b_l        h_l = f(z_l)           gated: h = f(g) · u
    backward   dz_l = dh_l · f'(z_l)           dW_l = dz_lᵀ h_{l-1}   db_l = Σ dz_l   dh_{l-1} = dz_l W_l

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
from fastbp.saving import POLICIES, kept, needed_below

Maybe = Tensor | None


class Saved(NamedTuple):
    """What forward left for backward; what ``saving.kept`` does not name may be None."""

    x: Maybe
    y: Maybe
    weights: Sequence[Any]
    biases: Sequence[Any]
    residuals: Sequence[Any]


def unflatten(tensors: Sequence[Maybe], linears: int) -> Saved:
    """What was saved in one row: x, y, weights, biases, residuals."""
    half, end = 2 + linears, 2 + 2 * linears
    parts = (tensors[0], tensors[1], tensors[2:half], tensors[half:end], tensors[end:])
    return tuple.__new__(Saved, parts)  # without the Python call that Saved() is


def _grad(config: Config, dy: Maybe, z: Any, differentiable: bool) -> Maybe:
    """dz from dy and z."""
    if dy is None:
        return None
    if not differentiable:
        return config.grad(dy, z)
    return _formula_grad(config, dy, z)


def _formula_grad(config: Config, dy: Tensor, z: Tensor) -> Tensor:
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
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Maybe],
) -> Tensor:
    """y by PyTorch's own operations and nothing of ours, for transforms that cannot look into a Function or an op."""
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
    config: Config, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Maybe]
) -> tuple[Tensor, list[Tensor]]:
    """y and the residuals of the policy: z of every hidden layer, or its output, or nothing."""
    form = config.form
    residuals: list[Tensor] = []
    h = x
    if form.gated:
        g, u = F.linear(x, weights[0], biases[0]), F.linear(x, weights[1], biases[1])
        h = config.value(g) * u
        residuals = [*gated_kept(config, g, u)]
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
    """The gradients of x, of every weight and of every bias; None where ``needs`` does not ask.

    ``dy`` may be None, and ``dresiduals`` are gradients that reach the residuals themselves: both in a double backward
    only. Where ``into`` has a tensor for a weight, its gradient is added there instead (``accumulation.add_product``).
    """
    given = dy if dy is not None else next((d for d in dresiduals if d is not None), None)
    if given is not None and given.dim() != 2:
        return _backward_of_rows(config, dy, saved, needs, dresiduals, differentiable, into, given.shape[:-1])
    if given is None:
        return [None] * len(needs)
    again = config.save == "recompute"
    if POLICIES[config.save].compressed:
        dresiduals = ()  # to autograd, what was kept is no function of anything
        if differentiable:
            _check_replayable(config, saved)
            again = True
    residuals: Any = replay(config, saved, needs) if again else None
    slopes: Any = residuals
    if not again:
        residuals, slopes = read_kept(config, saved.y, saved.residuals, given.dtype)
    saved = saved._replace(residuals=residuals)
    if config.form.gated:
        return _gated_backward(config, dy, saved, needs, dresiduals, differentiable, into)

    # linear_act and mlp: the delta rule, dz_{l-1} = (dz_l W_l) · f'(z_{l-1})
    x, weights = saved.x, saved.weights
    count, from_output = len(weights), POLICIES[config.save].from_output and not again
    below = needed_below(config.form, needs)
    grads: list[Maybe] = [None] * len(needs)
    kernel: Any = config.grad
    if from_output:
        kernel = config.grad_from_output if config.save == "output" else partial(grad_from_side, config)
    plain = not differentiable and not dresiduals and dy is not None  # the first backward, where time counts
    d: Any = dy
    for i in range(count - 1, -1, -1):
        if i < len(residuals):  # from dh to dz, through the activation above linear i; none is above the last of an mlp
            if plain:
                d = kernel(d, slopes[i])
            else:
                dresidual = dresiduals[i] if dresiduals else None
                if from_output:
                    d = _grad_from_output(config, _add(d, dresidual), residuals[i], differentiable)
                else:
                    d = _add(_grad(config, d, residuals[i], differentiable), dresidual)
        if d is None:
            continue
        if needs[1 + i]:
            h: Any = x if i == 0 else residuals[i - 1] if from_output else config.value(residuals[i - 1])
            grads[1 + i] = weight_grad(d, h, weights[i]) if into is None else add_product(into[i], d, h)
        if needs[1 + count + i]:
            grads[1 + count + i] = d.sum(0)
        if not below[i]:
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

    x, y, weights, biases, residuals = saved
    flat = Saved(rows(x), rows(y), weights, biases, [rows(r) for r in residuals])
    dx, *grads = backward(config, rows(dy), flat, needs, [rows(d) for d in dresiduals], differentiable, into)
    return [None if dx is None else dx.view(*leading, dx.shape[-1]), *grads]


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
    """``gated_linear_act`` and ``gated_mlp``: dg = dh · u · f'(g), du = dh · f(g)."""
    x, _, weights, _, (g, u) = saved
    count = len(weights)
    need_x, need_weights, need_biases = needs[0], needs[1 : 1 + count], needs[1 + count :]
    grads: list[Maybe] = [None] * len(needs)
    dh: Any = dy
    if config.form.projected and dy is not None:
        if need_weights[2]:
            h = config.value(g) * u
            grads[3] = weight_grad(dy, h, weights[2]) if into is None else add_product(into[2], dy, h)
        if need_biases[2]:
            grads[6] = dy.sum(0)
        dh = dy.mm(weights[2]) if needed_below(config.form, needs)[1] else None
    dg, du = dresiduals or (None, None)
    if dh is not None and (need_x or need_weights[0] or need_biases[0]):
        dg = _add(_grad(config, dh * u, g, differentiable), dg)
    if dh is not None and (need_x or need_weights[1] or need_biases[1]):
        du = _add(dh * config.value(g), du)
    for i, dz in enumerate((dg, du)):
        if dz is None:
            continue
        if need_weights[i]:
            grads[1 + i] = weight_grad(dz, x, weights[i]) if into is None else add_product(into[i], dz, x)  # type: ignore[arg-type]
        if need_biases[i]:
            grads[1 + count + i] = dz.sum(0)
        if need_x:
            grads[0] = _add(grads[0], dz.mm(weights[i]))
    return grads


def _add(a: Maybe, b: Maybe) -> Maybe:
    """a + b, where None is a zero that costs nothing."""
    return b if a is None else a if b is None else a + b


def replay(config: Config, saved: Saved, needs: tuple[bool, ...]) -> list[Maybe]:
    """The pre-activations again, as deep as backward looks at them."""
    x, _, weights, biases, _ = saved
    wanted = kept(config.form, "preact", True, needs)[2 + 2 * len(weights) :]
    if config.form.gated:
        return [F.linear(x, weights[i], biases[i]) if wanted[i] else None for i in range(2)]  # type: ignore[arg-type]
    zs: list[Maybe] = []
    for i in range(len(wanted)):
        if any(wanted[i:]):
            zs.append(F.linear(config.value(zs[-1]) if zs else x, weights[i], biases[i]))  # type: ignore[arg-type]
    return zs + [None] * (len(wanted) - len(zs))


def _check_replayable(config: Config, saved: Saved) -> None:
    if saved.x is None:
        raise RuntimeError(
            f"fastbp.{config.form.name}: a gradient that is differentiated again (create_graph=True) takes x under "
            f"save={config.save!r}, and x was not kept, because no weight that reads it takes a gradient; use "
            "save='preact' or 'recompute'"
        )


def jvp(config: Config, primals: Saved, tangents: Saved) -> tuple[Tensor, ...]:
    """The tangents of y and of the residuals: ż = ẋ Wᵀ + x Ẇᵀ + ḃ, ḣ = f'(z) · ż."""
    form = config.form
    tresiduals: list[Tensor] = []

    def linear(i: int, h: Any, th: Maybe) -> tuple[Tensor, Tensor]:
        weight, tweight, tbias = primals.weights[i], tangents.weights[i], tangents.biases[i]
        z = F.linear(h, weight, primals.biases[i])
        tz = None if th is None else F.linear(th, weight)
        tz = _add(tz, None if tweight is None else F.linear(h, tweight))
        tz = _add(tz, None if tbias is None else tbias.expand_as(z))
        return z, torch.zeros_like(z) if tz is None else tz

    h: Any = primals.x
    th: Any = tangents.x
    if form.gated:
        (g, tg), (u, tu) = linear(0, h, th), linear(1, h, th)
        th = _formula_grad(config, tg * u, g) + config.value(g) * tu
        h = config.value(g) * u
        tresiduals = [tg, tu] if config.save == "preact" else []
    else:
        for i in range(len(primals.weights) - form.projected):
            z, tz = linear(i, h, th)
            h, th = config.value(z), _formula_grad(config, tz, z)
            if config.save == "preact":
                tresiduals.append(tz)
            elif config.save == "output" and form.projected:
                tresiduals.append(th)
    return (linear(len(primals.weights) - 1, h, th)[1] if form.projected else th), *tresiduals
