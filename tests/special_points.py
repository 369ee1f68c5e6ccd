"""Calls at the points where formulas go wrong, beside eager PyTorch's."""

import torch
from support import ACTIVATIONS, call, cases, eager, grads, special, stock

from fastbp.forms import GATED_LINEAR_ACT, LINEAR_ACT

# From relu2's y the slope is lost where y over- or underflows, and the documentation says so.
EXACT = [c for c in cases(ACTIVATIONS, [LINEAR_ACT, GATED_LINEAR_ACT]) if c[1].row.output_exact or c[2] != "output"]


def widely(f):
    """A composition of several kernels whose intermediates do not overflow before its result does."""
    return lambda z: f(z.double()).to(z.dtype)


def at_special_points(form, activation, save, dtype, make_dy, backend=None, device="cpu", **options):
    """x, and y and dx for it by fastbp and by PyTorch in two ways, where every z is an entry of x, 64 times over."""
    x = special(activation, dtype).to(device)[:, None].requires_grad_()
    weights = [torch.ones(64, 1, dtype=dtype, device=device)] * form.width  # a sum over one feature is no sum
    biases = [None] * form.width
    f = stock(activation) if activation.row.aten_value else widely(stock(activation))
    ys = (
        call(form, x, weights, biases, activation=activation, save=save, backend=backend),
        eager(form, x, weights, biases, f),
        # oneDNN's gelu(inf) is NaN, PyTorch's own is inf; a transposed tensor takes the latter.
        eager(form, x, weights, biases, lambda z: f(z.mT).mT),
    )
    return x, [(y.detach(), *grads(y, [x], make_dy(y), **options)) for y in ys]


def assert_one_of(ours, theirs, others, x):
    wrong = (ours != theirs) & (ours != others)
    assert not wrong.any(), f"z = {x[wrong.any(1)].flatten().tolist()}"
