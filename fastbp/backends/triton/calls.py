"""A whole call each way: its layers in order, and the products that belong to PyTorch.

The mathematics is that of ``fastbp/reference.py``, which also serves what is too small or empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torch._C import _AutoDispatchBelowADInplaceOrView

from fastbp import reference
from fastbp.accumulation import add_product
from fastbp.backends.triton import layers
from fastbp.backends.triton.choice import stays_eager
from fastbp.backends.triton.layers import Kept
from fastbp.problem import Config
from fastbp.reference import Saved, unflatten
from fastbp.saving import POLICIES, kept, needed_below

Maybe = Tensor | None


def _left_to_pytorch(config: Config, given: Tensor, weights: Sequence[Maybe]) -> bool:
    """Whether PyTorch's operations serve this call throughout: it is small, or a size in it is 0.

    ``given`` is x or dy: both have a row for each row of every hidden layer.
    """
    sizes = [given.shape[-1], *(size for w in weights if w is not None for size in w.shape)]
    rows = given.numel() // max(given.shape[-1], 1)
    return rows == 0 or 0 in sizes or stays_eager(config, rows * max(sizes))


def forward(config: Config, x: Tensor, tensors: Sequence[Maybe]) -> list[Tensor]:
    """y and the residuals of the policy, none of them a view in the eyes of autograd."""
    inputs, weights, biases = config.form.split((x, *tensors))
    with _AutoDispatchBelowADInplaceOrView(), layers.on(x.device):
        if _left_to_pytorch(config, x, weights):
            y, residuals = reference.forward(config, inputs, weights, biases)  # type: ignore[arg-type]
        elif config.form.given:
            h, *residuals = layers.output_of(config, inputs)  # type: ignore[arg-type]
            residuals = [h, *residuals] if POLICIES[config.save].from_output else residuals
            y = F.linear(h, weights[0], biases[0])  # type: ignore[arg-type]
        elif config.form.gated:
            y, residuals = _gated_forward(config, x, weights, biases)  # type: ignore[arg-type]
        else:
            y, residuals = _forward(config, x, weights, biases)  # type: ignore[arg-type]
        return [y, *residuals]


def _forward(
    config: Config, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Maybe]
) -> tuple[Tensor, list[Tensor]]:
    h, residuals, projected = x, list[Tensor](), config.form.projected
    for i in range(len(weights) - projected):
        h, *kept_ones = layers.forward(config, h, weights[i], biases[i], keep=config.save == "preact")
        residuals += [h, *kept_ones] if projected and POLICIES[config.save].from_output else kept_ones
    return (F.linear(h, weights[-1], biases[-1]) if projected else h), residuals


def _gated_forward(
    config: Config, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Maybe]
) -> tuple[Tensor, list[Tensor]]:
    keep = config.save == "preact"
    h, *residuals = layers.gated_forward(config, x, weights[:2], biases[:2], keep)
    return (F.linear(h, weights[2], biases[2]) if config.form.projected else h), residuals


def backward(
    config: Config,
    dy: Tensor,
    saved: Sequence[Maybe],
    needs: tuple[bool, ...],
    overwrite: bool,
    into: Sequence[Maybe] | None,
) -> list[Maybe]:
    """The gradients of the inputs, of every weight and of every bias; None where ``needs`` does not ask.

    Where ``into`` has a tensor for a weight, its gradient is added there instead.
    """
    parts = unflatten(config.form, saved, len(needs))
    # Nothing here is to be differentiated, and 15 operations without a stop at autograd's kernels count.
    with _AutoDispatchBelowADInplaceOrView(), layers.on(dy.device):
        if _left_to_pytorch(config, dy, parts.weights):
            return reference.backward(config, dy, parts, needs, into=into)
        inputs, y, weights, biases, residuals = parts
        if config.form.given and config.save == "preact":
            residuals = inputs
        elif config.save == "recompute":
            replay = reference.replay if config.form.gated else _replay
            residuals, overwrite = replay(config, parts, needs), True
        elif POLICIES[config.save].from_output and not config.form.projected:
            residuals = (y, *residuals)
        flat = [None if r is None else layers.rows_of(r).contiguous() for r in residuals]
        rows = [None if t is None else layers.rows_of(t) for t in inputs]
        run = _gated_backward if config.form.gated else _backward
        there = Saved(rows, None, weights, biases, _by_linear(config, flat))
        grads = run(config, layers.rows_of(dy), there, needs, overwrite, into)
        for i in range(len(inputs)):
            d = grads[i]
            grads[i] = None if d is None else d.view(*dy.shape[:-1], d.shape[-1])
        return grads


def _by_linear(config: Config, residuals: Sequence[Maybe]) -> list[Kept]:
    """What was kept, of each hidden linear."""
    if config.save in ("output_bits", "fp8"):
        return [Kept(*pair) for pair in zip(residuals[0::2], residuals[1::2], strict=True)]
    return [Kept(r) for r in residuals]


def _backward(
    config: Config, dy: Tensor, saved: Saved, needs: tuple[bool, ...], overwrite: bool, into: Sequence[Maybe] | None
) -> list[Maybe]:
    """linear_act, mlp and act_linear: dz_{l-1} = (dz_l W_l) · f'(z_{l-1}), from the last linear to the first.

    Layer 0 of act_linear, which is given z, has no linear: layer i has linear i - 1.
    """
    (x,), _, weights, _, residuals = saved
    given = int(config.form.given)
    count, from_output = len(weights), POLICIES[config.save].from_output
    overwrite = overwrite and not from_output
    below = needed_below(config.form, needs)
    grads: list[Maybe] = [None] * len(needs)
    d, db = dy, None
    if not config.form.projected:
        over = residuals[0].main if overwrite else None
        d, _, db = layers.chain_rule(config, dy, residuals[0], False, needs[1 + count], over)
    for layer in range(count - 1 + given, -1, -1):
        i = layer - given
        if i < 0:
            grads[0] = d
            break
        if needs[1 + count + i]:
            grads[1 + count + i] = d.sum(0) if db is None else db
        h: Maybe = x if layer == 0 else residuals[layer - 1].main if from_output else None
        following: layers.Slope | None = None
        rebuild = needs[1 + i] and h is None
        if layer > 0 and below[layer]:
            bias = i > 0 and needs[count + i]  # of the linear beneath
            following = layers.dgrad(config, d, weights[i], residuals[layer - 1], rebuild, bias, overwrite)
            h = following.h if rebuild else h
        elif rebuild:
            h = layers.value(config, d.dtype, residuals[layer - 1])
        if needs[1 + i]:
            grads[1 + i] = d.mT.mm(h) if into is None else add_product(into[i], d, h)  # type: ignore[arg-type]
        if layer == 0 and needs[0]:
            grads[0] = d.mm(weights[0])
        if following is None:
            break
        d, db = following.dz, following.db
    return grads


def _gated_backward(
    config: Config, dy: Tensor, saved: Saved, needs: tuple[bool, ...], overwrite: bool, into: Sequence[Maybe] | None
) -> list[Maybe]:
    """gated_linear_act, gated_mlp and gated_act_linear: dg = dh · u · f'(g), du = dh · f(g)."""
    (x, *_), _, weights, _, (gate, up) = saved
    form, count, last = config.form, len(weights), len(weights) - 1
    grads: list[Maybe] = [None] * len(needs)
    biases = (False, False) if form.given else needs[1 + count : 3 + count]
    wanted = needs[:2] if form.given else tuple(needs[0] or needs[1 + i] or biases[i] for i in range(2))
    if form.projected:
        place = form.inputs + last
        rebuild = needs[place]
        if any(wanted):
            slope = layers.gated_dgrad(config, dy, weights[last], gate, up, wanted, biases, rebuild, overwrite)
            h = slope.h
        elif rebuild:
            h = layers.value(config, dy.dtype, gate, up)
        if rebuild:
            grads[place] = dy.mT.mm(h) if into is None else add_product(into[last], dy, h)  # type: ignore[arg-type]
        if needs[-1]:
            grads[-1] = dy.sum(0)
        if form.given and any(wanted):
            grads[:2] = slope.dgate, slope.dup
        if form.given or not any(wanted):
            return grads
    else:
        over = (gate.main, up.main) if overwrite else (None, None)
        slope = layers.gated_chain_rule(config, dy, gate, up, wanted, biases, False, *over)
    for i, (dz, db) in enumerate(((slope.dgate, slope.dgate_bias), (slope.dup, slope.dup_bias))):
        if dz is None:
            continue
        if needs[1 + i]:
            grads[1 + i] = dz.mT.mm(x) if into is None else add_product(into[i], dz, x)
        grads[1 + count + i] = db
        if needs[0]:  # the second product adds to the first in float32, and rounds once
            dx = grads[0]
            grads[0] = dz.mm(weights[i]) if dx is None else dx.addmm_(dz, weights[i])
    return grads


def _replay(config: Config, saved: Saved, needs: tuple[bool, ...]) -> list[Maybe]:
    """``reference.replay`` of a chain, with the layers' outputs on the way by the kernels that made them before."""
    (x,), _, weights, biases, _ = saved
    wanted = kept(config.form, "preact", True, needs)[1 + len(needs) :]
    zs: list[Maybe] = []
    h = x
    for i in range(len(wanted)):
        z: Maybe = None
        if any(wanted[i + 1 :]):
            h, z = layers.forward(config, h, weights[i], biases[i], keep=True)
        elif wanted[i]:
            z = F.linear(h, weights[i], biases[i])
        zs.append(z)
    return zs
