"""Backward writes dz over z where z is nobody else's: the same gradients, and nothing that anybody holds is touched."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from routes import ROWS, each_route
from support import call, each, grads, like, tensors
from torch.utils.checkpoint import checkpoint

from fastbp import autograd
from fastbp.activations import bind
from fastbp.backends import native
from fastbp.forms import FORMS, GATED_MLP, LINEAR_ACT, MLP
from fastbp.problem import configure

pytestmark = pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}")
GELU = bind("gelu")


@each_route
@each("save", ["preact", "recompute"])
@each("form", [form for form in FORMS.values() if not form.given])  # z that is given is the caller's
def test_the_same_gradients(form, save, dtype, route):
    """Every subset of the gradients, with and without, over rows of more than one block."""
    x, weights, biases = tensors(form, dtype, seed=21, rows=ROWS.get(route, 1100), features=(20, 33, 18, 24))
    flat = [t.detach() for t in (*weights, *biases)]
    config = configure(form.name, "gelu", (), save, "native")
    y, *residuals = native.forward(config, x.detach(), flat)
    dy = like(y, 22)
    for some in range(1, 1 + len(flat)):
        needs = tuple((i * some) % 3 != 1 for i in range(1 + len(flat)))
        plain, over = (
            native.backward(config, dy, [x.detach(), None, *flat, *(r.clone() for r in residuals)], needs, overwrite)
            for overwrite in (False, save == "preact")
        )
        for a, b in zip(plain, over, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    if save == "preact":
        before = [r.clone() for r in residuals]
        native.backward(config, dy, [x.detach(), None, *flat, *residuals], (True,) * (1 + len(flat)), True)
        used_up = [not torch.equal(a, b) for a, b in zip(before, residuals, strict=True)]
        assert used_up == [route in ("wide", "library")] * len(used_up)  # the others hold a panel of dz at a time


def block(form=MLP, dtype=torch.float32, rows=400):
    x, weights, biases = tensors(form, dtype, seed=23, rows=rows, features=(300, 310, 290, 280))
    y = call(form, x, weights, biases, activation=GELU, backend="native")
    return y, [x, *weights, *biases]


@pytest.fixture
def owned(monkeypatch):
    """What every backward of a test decided."""
    decided = []
    original = autograd.owns_residuals
    monkeypatch.setattr(autograd, "owns_residuals", lambda *a: decided.append(original(*a)) or decided[-1])
    return decided


@each("form", [LINEAR_ACT, MLP, GATED_MLP])
@each("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_graph_and_the_last_backward(form, dtype, owned):
    y, inputs = block(form, dtype)
    dy = like(y, 24)
    first = grads(y, inputs, dy, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, grads(y, inputs, dy), strict=True))
    assert owned == [False, True]
    with pytest.raises(RuntimeError, match="second time"):
        grads(y, inputs, dy)


def by_the_node(y):
    return [t for t in y.grad_fn.saved_tensors[-2:] if t is not None]


def test_what_somebody_took_from_the_node_is_not_touched(owned):
    y, inputs = block()
    held = by_the_node(y)
    before = [t.detach().clone() for t in held]
    views = [t.detach().view(-1)[5:] for t in held]
    del held
    grads(y, inputs, like(y, 25))
    assert owned == [False]
    assert all(torch.equal(b.view(-1)[5:], v) for b, v in zip(before, views, strict=True))


@each("pack", [lambda t: t, lambda t: t.detach(), lambda t: t.view(-1)])
def test_what_hooks_hold_is_not_touched(pack, owned):
    held = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.append(pack(t)) or (held[-1], t.shape), lambda packed: packed[0].view(packed[1])
    ):
        y, inputs = block()
    before = [t.detach().clone() for t in held]
    grads(y, inputs, like(y, 26))
    assert owned == [False] and all(torch.equal(a, b) for a, b in zip(before, held, strict=True))


def test_copies_that_hooks_make_may_be_used_up(owned):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y, inputs = block()
    plain = block()
    assert all(map(torch.equal, grads(y, inputs, like(y, 27)), grads(*plain, like(y, 27))))
    assert owned == [True, True]


def test_forward_over_reverse_does_not_ask(owned):
    """While a dual level is open the gradient has a tangent of its own, which is made of z."""
    x, weights, biases = tensors(LINEAR_ACT, torch.float32, seed=28, rows=400, features=(300, 310))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        y = call(LINEAR_ACT, dual, weights, biases, activation=GELU, backend="native")
        dy = like(y, 29)
        inside = [forward_ad.unpack_dual(g) for g in grads(y, weights, dy, retain_graph=True)]
    assert owned == [] and all(g.tangent is not None for g in inside)
    for mine, earlier in zip(grads(y, weights, dy), inside, strict=True):
        torch.testing.assert_close(mine, earlier.primal, rtol=1e-4, atol=1e-4)  # by the formulas
    assert owned == [True]


def test_another_graph_that_holds_z(owned):
    """z of one node, saved by a node of somebody else: its own backward still finds it."""
    y, inputs = block(LINEAR_ACT)
    (z,) = [t.detach() for t in y.grad_fn.saved_tensors if t is not None][-1:]
    scale = torch.ones_like(z, requires_grad=True)
    product, expected = z * scale, z.clone()
    del z
    grads(y, inputs, like(y, 30))
    assert owned == [False]
    assert torch.equal(torch.autograd.grad(product.sum(), scale)[0], expected)


@each("use_reentrant", [True, False])
def test_checkpoint(use_reentrant):
    """What a checkpoint computes again it may read twice."""
    x, weights, biases = tensors(MLP, torch.float32, seed=31, rows=400, features=(300, 310, 290, 280))

    def run(x):
        return call(MLP, x, weights, biases, activation=GELU, backend="native")

    y = checkpoint(run, x, use_reentrant=use_reentrant)
    dy = like(y, 32)
    expected = grads(run(x), [x], dy)[0]
    for retain in (True, False):
        x.grad = None
        y.backward(dy, retain_graph=retain)
        assert torch.equal(x.grad, expected)
