"""Derivatives of every order, in every mode, of every form: against finite differences and against plain PyTorch."""

import itertools

import pytest
import torch
from support import (
    FEW,
    SETTINGS,
    SMALL,
    assert_close,
    call,
    cases,
    each,
    eager,
    flatten,
    grads,
    like,
    on_flat,
    tensors,
)
from torch import func
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from fastbp.autograd import FUNCTIONS
from fastbp.forms import FORMS, LINEAR_ACT
from fastbp.problem import configure

SMOOTH = [a for a in FEW if a.name not in ("identity", "relu")]


def _check(form, activation, save):
    x, weights, biases = tensors(form, seed=11, rows=3, features=SMALL)
    function, inputs = on_flat(call, form, activation=activation, save=save), flatten(x, weights, biases)
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(function, inputs, check_batched_grad=True, check_fwd_over_rev=True)


@each(("activation", "save"), SETTINGS)
def test_finite_differences_of_every_activation(activation, save):
    _check(LINEAR_ACT, activation, save)


@each(("form", "activation", "save"), cases(FEW, [form for form in FORMS.values() if form is not LINEAR_ACT]))
def test_finite_differences_of_every_form(form, activation, save):
    _check(form, activation, save)


@each("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("outer", [func.jacrev, func.jacfwd], ids=["reverse", "forward"])
@each(
    ("activation", "save"),
    # PyTorch has no second derivative of hardsigmoid; from relu2's y even the first is lost far out.
    [(a, s) for a, s in SETTINGS if a.name != "hardsigmoid" and (a.row.output_exact or s != "output")],
)
def test_second_derivatives_are_finite_far_out(activation, save, outer, dtype):
    z = torch.tensor([[sign * v] for v in (90.0, 800.0, 65504.0, 1e30) for sign in (1, -1)], dtype=dtype)
    one = torch.ones(1, 1, dtype=dtype)

    def second(function, **options):
        f = on_flat(function, LINEAR_ACT, activation=activation, **options)
        return torch.vmap(outer(func.jacrev(lambda z: f(z, one, None).sum())))(z)

    ours, theirs = second(call, save=save), second(eager)
    known = theirs.isfinite()  # PyTorch's own is NaN here and there
    assert known.any()
    torch.testing.assert_close(ours[known], theirs[known])


# Transforms of torch.func, as (f, inputs) -> results; f takes x, *weights, *biases.


def _scalar(f):
    return lambda *inputs: f(*inputs).square().sum()


def _all(inputs):
    return tuple(range(len(inputs)))


def _stacked(inputs, count=3):
    return [torch.stack([like(t, seed) for seed in range(count)]) for t in inputs]


def _directions(inputs, seed=21):
    return tuple(like(t, seed + i) for i, t in enumerate(inputs))


def _jvp(f, inputs):
    return func.jvp(f, tuple(inputs), _directions(inputs))


def _vjp(f, inputs):
    y, pull = func.vjp(f, *inputs)
    return y, pull(like(y, seed=22))


def _jvp_of_jvp(f, inputs):
    inner = _directions(inputs, seed=23)
    return func.jvp(lambda *inputs: func.jvp(f, inputs, inner), tuple(inputs), _directions(inputs))


def _jvp_of_jvp_of_jvp(f, inputs):
    return _jvp(lambda *inputs: _jvp_of_jvp(f, inputs)[1][1], inputs)


def _grad_of_jvp(f, inputs):
    inner = _directions(inputs)
    return func.grad(lambda *inputs: func.jvp(f, inputs, inner)[1].square().sum(), _all(inputs))(*inputs)


def _along(f, inputs, dim):
    """What vmap is told where the inputs of a call are batched, and its parameters are not."""
    return (*[dim] * f.inputs, *[None] * (len(inputs) - f.inputs))


def _per_sample(f, inputs):
    return torch.vmap(func.grad(_scalar(f), _all(inputs)), _along(f, inputs, 0))(*inputs)


def _jvp_along(f, inputs):
    return func.jvp(f, inputs, tuple(t.cos() for t in inputs))


TRANSFORMS = {
    "grad": lambda f, inputs: func.grad(_scalar(f), _all(inputs))(*inputs),
    "vjp": _vjp,
    "jvp": _jvp,
    "jacrev": lambda f, inputs: func.jacrev(f, _all(inputs))(*inputs),
    "jacfwd": lambda f, inputs: func.jacfwd(f, _all(inputs))(*inputs),
    "hessian": lambda f, inputs: func.hessian(_scalar(f), _all(inputs))(*inputs),
    "grad of grad": lambda f, inputs: func.grad(_scalar(func.grad(_scalar(f))), _all(inputs))(*inputs),
    "jvp of jvp": _jvp_of_jvp,  # PyTorch takes the jvp of a Function for a constant here
    "jvp of jvp of jvp": _jvp_of_jvp_of_jvp,
    "jvp of grad": lambda f, inputs: _jvp(func.grad(_scalar(f), _all(inputs)), inputs),
    "grad of jvp": _grad_of_jvp,
    "jacfwd of jacrev": lambda f, inputs: func.jacfwd(func.jacrev(f))(*inputs),
    "jacfwd of jacfwd": lambda f, inputs: func.jacfwd(func.jacfwd(f))(*inputs),
    "jacrev of jacfwd": lambda f, inputs: func.jacrev(func.jacfwd(f))(*inputs),
    "vmap over x": lambda f, inputs: torch.vmap(f, (0, *[None] * (len(inputs) - 1)))(_stacked(inputs)[0], *inputs[1:]),
    "vmap over x, not first": lambda f, inputs: torch.vmap(f, _along(f, inputs, 1), 1)(
        *[torch.stack([t, t.cos()], 1) for t in inputs[: f.inputs]], *inputs[f.inputs :]
    ),
    "vmap over all": lambda f, inputs: torch.vmap(f)(*_stacked(inputs)),
    "vmap over a weight": lambda f, inputs: torch.vmap(f, (None, 0, *[None] * (len(inputs) - 2)))(
        inputs[0], _stacked(inputs)[1], *inputs[2:]
    ),
    "vmap of vmap": lambda f, inputs: torch.vmap(lambda *i: torch.vmap(f, _along(f, i, 0))(*i))(*_stacked(inputs)),
    "per-sample gradients": _per_sample,
    "vmap of grad over all": lambda f, inputs: torch.vmap(func.grad(_scalar(f), _all(inputs)))(*_stacked(inputs)),
    "vmap of jvp over all": lambda f, inputs: torch.vmap(lambda *i: _jvp_along(f, i))(*_stacked(inputs)),
}


@each("transform", TRANSFORMS)
@each(("form", "activation", "save"), cases(SMOOTH))
def test_func(form, activation, save, transform):
    x, weights, biases = tensors(form, seed=12, rows=2, features=SMALL, requires_grad=False)
    inputs = flatten(x, weights, biases)
    ours = TRANSFORMS[transform](on_flat(call, form, activation=activation, save=save), inputs)
    theirs = TRANSFORMS[transform](on_flat(eager, form, activation=activation), inputs)
    assert_close(ours, theirs)


def _subsets(count):
    """Every choice of at least one of so many."""
    return itertools.islice(itertools.product((False, True), repeat=count), 1, None)


@each("grad_enabled", [True, False])
@each(("form", "activation", "save"), cases(SMOOTH))
def test_dual_numbers(form, activation, save, grad_enabled):
    x, weights, biases = tensors(form, seed=13, rows=2, features=SMALL)
    inputs = flatten(x, weights, biases)
    for chosen in _subsets(len(inputs)):
        with forward_ad.dual_level(), torch.set_grad_enabled(grad_enabled):
            duals = [forward_ad.make_dual(t, like(t, 31)) if c else t for t, c in zip(inputs, chosen, strict=True)]
            ours = forward_ad.unpack_dual(on_flat(call, form, activation=activation, save=save)(*duals))
            theirs = forward_ad.unpack_dual(on_flat(eager, form, activation=activation)(*duals))
            assert_close(ours.primal, theirs.primal)
            assert_close(ours.tangent, theirs.tangent)


def _frozen(inputs, chosen):
    return [t.detach().requires_grad_(c) for t, c in zip(inputs, chosen, strict=True)]


def _penalised(f, inputs):
    """The gradients of a loss that reads y and a gradient of y: what a gradient penalty trains with."""
    y = f(*inputs)
    first = [g for g in grads(y, inputs, like(y, 32), create_graph=True) if g is not None]
    loss = y.square().sum() + sum(g.square().sum() for g in first)
    return first, grads(loss, inputs, torch.ones_like(loss))


@each(("form", "activation", "save"), cases(SMOOTH))
def test_second_derivatives_with_frozen_inputs(form, activation, save):
    inputs = flatten(*tensors(form, seed=14, rows=3, features=SMALL))
    for chosen in _subsets(len(inputs)):
        ours = _penalised(on_flat(call, form, activation=activation, save=save), _frozen(inputs, chosen))
        theirs = _penalised(on_flat(eager, form, activation=activation), _frozen(inputs, chosen))
        assert [g is not None for g in ours[1]] == list(chosen)
        for mine, reference in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
            if reference is not None:
                assert_close(mine, reference)


@each(("form", "activation", "save"), cases(SMOOTH))
def test_third_derivatives(form, activation, save):
    inputs = flatten(*tensors(form, seed=16, rows=2, features=SMALL))

    def third(f):
        loss = f(*inputs).square().sum()
        for order in range(3):
            found = torch.autograd.grad(loss, inputs, create_graph=order < 2)
            loss = sum(g.pow(3).sum() for g in found)
        return found

    ours, theirs = (
        third(on_flat(call, form, activation=activation, save=save)),
        third(on_flat(eager, form, activation=activation)),
    )
    for mine, reference in zip(ours, theirs, strict=True):
        assert_close(mine, reference, atol=1e-12 * reference.abs().max().item())


def _applied(form, activation, save):
    """The public Function itself, without the function of fastbp in front."""
    config = configure(form.name, activation.name, activation.params, save, "reference")

    def apply(*inputs):
        return FUNCTIONS[form.name].apply(config, *inputs)[0]

    apply.inputs = form.inputs
    return apply


@each("transform", ["grad", "jvp", "hessian", "vmap over x", "vmap over all", "per-sample gradients"])
@each(("form", "activation", "save"), cases(SMOOTH))
def test_functions_apply_under_func(form, activation, save, transform):
    inputs = flatten(*tensors(form, seed=17, rows=2, features=SMALL, requires_grad=False))
    ours = TRANSFORMS[transform](_applied(form, activation, save), inputs)
    assert_close(ours, TRANSFORMS[transform](on_flat(eager, form, activation=activation), inputs))


@each(("form", "activation", "save"), cases(SMOOTH))
def test_functions_apply(form, activation, save):
    inputs = flatten(*tensors(form, seed=18))
    ours = _applied(form, activation, save)(*inputs)
    theirs = on_flat(eager, form, activation=activation)(*inputs)
    assert_close(ours, theirs)
    dy = like(ours, 34)
    for mine, reference in zip(grads(ours, inputs, dy), grads(theirs, inputs, dy), strict=True):
        assert_close(mine, reference)
