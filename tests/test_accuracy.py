"""Errors of values and gradients against float64, and where NaN and inf stand: at least as good as plain PyTorch."""

import torch
from special_points import EXACT, assert_one_of, at_special_points
from support import (
    ACTIVATIONS,
    DTYPES,
    FEW,
    assert_accurate,
    call,
    cases,
    each,
    eager,
    grads,
    like,
    places,
    tensors,
)

from fastbp import saving
from fastbp.activations import bind
from fastbp.forms import GATED_LINEAR_ACT, LINEAR_ACT, MLP


@each("dtype", DTYPES)
@each(
    ("form", "activation", "save", "bias"),
    [(*case, True) for case in cases(ACTIVATIONS)] + [(*case, False) for case in cases(FEW)],
)
def test_values_and_gradients(form, activation, save, bias, dtype):
    assert_accurate(form, activation, save, tensors(form, dtype, seed=1, bias=bias))


@each("dtype", DTYPES)
@each(("form", "activation", "save"), cases(ACTIVATIONS, [LINEAR_ACT, GATED_LINEAR_ACT]))
def test_gradients_that_can_be_differentiated(form, activation, save, dtype):
    assert_accurate(form, activation, save, tensors(form, dtype, seed=1), create_graph=True)


@each("dtype", [dtype for dtype in DTYPES if dtype != torch.float64])  # which has no yardstick finer than itself
@each("mean", [-6, 6])
@each(("activation", "save"), [(activation, save) for form, activation, save in EXACT if form is LINEAR_ACT])
def test_saturated_units(activation, save, mean, dtype):
    """Where every slope is small its error is small too."""
    x, weights, biases = tensors(LINEAR_ACT, dtype, seed=3)
    with torch.no_grad():
        biases[0].add_(mean)
    assert_accurate(LINEAR_ACT, activation, save, (x, weights, biases))


@each("dtype", DTYPES)
@each(("form", "activation", "save"), EXACT)
def test_nan_and_inf_stand_where_eager_has_them(form, activation, save, dtype):
    def dy(y):
        return like(y, seed=4).abs() / 64

    x, results = at_special_points(form, activation, save, dtype, dy)
    for found in zip(*results, strict=True):
        assert_one_of(*map(places, found), x)
    *_, differentiable = at_special_points(form, activation, save, dtype, dy, create_graph=True)[1][0]
    unit = 16 * max(torch.finfo(t).eps for t in (dtype, torch.float32))  # PyTorch's hardsigmoid has a 1/6 of float32
    torch.testing.assert_close(differentiable, results[0][1], rtol=unit, atol=unit, equal_nan=True)


@each("dtype", DTYPES)
@each(("form", "activation", "save"), EXACT)
def test_an_overflow_above_is_seen_below_where_eager_shows_it(form, activation, save, dtype):
    """What a GradScaler looks for neither disappears nor appears."""
    for dy in (float("inf"), float("nan")):
        x, results = at_special_points(form, activation, save, dtype, lambda y, dy=dy: torch.full_like(y, dy))
        assert_one_of(*(dx.isfinite() for _, dx in results), x)


@each("dtype", DTYPES)
@each("save", ["preact", "output", "recompute"])
def test_limits_that_the_dtype_rounds_inwards(save, dtype):
    activation = bind("hardtanh", (-0.42, 1.68))
    low, high = activation.params_for(dtype)
    x = torch.tensor([[-2.0], [low], [0.5], [high], [2.0]], dtype=torch.float64).to(dtype).requires_grad_()
    one = torch.ones(1, 1, dtype=dtype)
    ours = call(LINEAR_ACT, x, [one], [None], activation=activation, save=save)
    theirs = eager(LINEAR_ACT, x, [one], [None], activation)
    assert torch.equal(ours, theirs)
    (dx,), (expected,) = (grads(y, [x], torch.ones_like(y)) for y in (ours, theirs))
    if save == "output":  # does not know a z on a limit from one beyond it
        expected[[1, 3]] = 0
    assert torch.equal(dx, expected)


@each("activation", ACTIVATIONS)
def test_auto_keeps_least_of_what_is_exact_and_may_be_written_to(activation):
    exact = "output" in saving.legal_policies(activation) and activation.row.output_exact
    assert saving.resolve("auto", activation, MLP, "") == ("output" if exact else "preact")
    seen = exact and activation.name in ("identity", "relu", "sigmoid", "tanh")
    assert saving.resolve("auto", activation, LINEAR_ACT, "") == ("output" if seen else "preact")
    assert activation.name != "relu2" or not exact
