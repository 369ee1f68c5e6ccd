"""Weights that are kept as (in, out): gradients lie as they do, so that autograd adds them without a copy."""

import pytest
import torch
from graphs import draw
from support import assert_close, call, cases, each, flatten, like

from fastbp.activations import bind
from fastbp.forms import FORMS

ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@each(("form", "save"), [(form, save) for form, _, save in cases([bind("gelu")])])
@each("backend", ["native", "reference"])
@each("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each("rows", [1, 5, (2, 9)])
def test_gradients_lie_as_the_weights(form, backend, save, dtype, rows):
    x, weights, biases = draw(form, rows, dtype=dtype)
    others, own = weights[: form.inputs - 1], weights[form.inputs - 1 :]
    kept = [w.detach().mT.contiguous().requires_grad_() for w in own]
    y = call(form, x, [*others, *(w.mT for w in kept)], biases, activation="gelu", save=save, backend=backend)
    grads = torch.autograd.grad(y, [x, *others, *kept, *biases], like(y, seed=1))
    turned = range(form.inputs, form.inputs + len(kept))
    assert all(grads[i].is_contiguous() for i in turned)
    expected = call(form, x, weights, biases, activation="gelu", save=save, backend="reference")
    wanted = torch.autograd.grad(expected, flatten(x, weights, biases), like(y, seed=1))
    for i, (mine, theirs) in enumerate(zip((*grads, y), (*wanted, expected), strict=True)):
        mine, theirs = (mine.mT if i in turned else mine).double(), theirs.double()
        assert (mine - theirs).norm() <= ROUNDING[dtype] * theirs.norm()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_one_of_the_weights_alone(backend):
    """The others lie as ever; and a first weight of which backward needs the gradient alone."""
    x, weights, biases = draw(FORMS["mlp"])
    x = x.detach()
    for turned in range(len(weights)):
        kept = [w.detach().mT.contiguous() if i == turned else w.detach() for i, w in enumerate(weights)]
        kept = [w.requires_grad_() for w in kept]
        used = [w.mT if i == turned else w for i, w in enumerate(kept)]
        y = call(FORMS["mlp"], x, used, biases, activation="tanh", backend=backend)
        grads = torch.autograd.grad(y, kept, like(y, seed=1))
        expected = call(FORMS["mlp"], x, weights, biases, activation="tanh", backend="reference")
        wanted = torch.autograd.grad(expected, weights, like(y, seed=1))
        assert all(dw.is_contiguous() for dw in grads[1:])  # of the first backward has no strides
        for i, (mine, theirs) in enumerate(zip(grads, wanted, strict=True)):
            assert_close(mine.mT if i == turned else mine, theirs)
