"""Every row of the table against PyTorch's own function."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import (
    ACTIVATIONS,
    OTHER_PARAMS,
    assert_as_good_as_eager,
    assert_close,
    bound_with_params,
    each,
    formula,
    like,
    places,
    special,
    stock,
)

import fastbp
from fastbp.activations import ROWS, TABLE, bind
from fastbp.problem import configure
from fastbp.saving import legal_policies

# The names are a contract with users, and so is which of them have a slope that is a function of y.
FROM_OUTPUT = (
    *("identity", "relu", "leaky_relu", "relu6", "hardtanh", "elu", "celu", "selu", "sigmoid", "tanh", "softplus"),
    *("softsign", "hardsigmoid", "relu2"),
)
FROM_SIDE = ("silu", "gelu", "gelu_tanh", "quick_gelu", "mish")
NAMES = (*FROM_OUTPUT, "silu", "gelu", "gelu_tanh", "quick_gelu", "mish", "hardswish")


def test_names():
    assert sorted(row.name for row in TABLE) == sorted(NAMES)


def test_available_activations():
    always, sides = ("preact", "recompute"), ("output_bits", "output_lsb")
    available = fastbp.available_activations()
    assert {name: sorted(policies) for name, policies in available.items()} == {
        name: sorted(
            {*always, *(("output",) if name in FROM_OUTPUT else ("fp8",)), *(sides if name in FROM_SIDE else ())}
        )
        for name in NAMES
    }


def test_parameters_that_cost_the_output_policy():
    lost = {str(a) for a in bound_with_params() if "output" not in legal_policies(a)}
    assert lost == {"leaky_relu(negative_slope=-0.2)", "elu(alpha=-0.7)", "celu(alpha=-4)", "softplus(threshold=5)"}


@each("row", [row for row in TABLE if row.module and row.params])
def test_defaults_are_those_of_the_module(row):
    module = row.module()
    assert {name: getattr(module, name) for name, _ in row.params} == dict(row.params)


def test_every_row_with_parameters_is_tested_with_others():
    # nn.ReLU6 is a hardtanh that takes no limits
    assert {row.name for row in TABLE if row.params} == {*OTHER_PARAMS, "relu6"}


# Both ways of a row's computation: the formulas, which the kernels of other backends are rendered from and derivatives
# of higher order taken from; and PyTorch's kernels where the row names them.


FLOAT32_SIXTH = 2**-24  # PyTorch's gradient of hardsigmoid multiplies by a 1/6 of float32, in float64 too


def _formulas(activation):
    def bound(function):
        return function and (lambda *tensors: function(*tensors, *activation.params))

    row = activation.row
    return bound(row.value), bound(row.grad), bound(row.grad_from_output)


def _kernels(activation):
    config = configure("linear_act", activation.name, activation.params, "preact", "reference")
    return config.value, config.grad, config.grad_from_output


routes = pytest.mark.parametrize("route", [_formulas, _kernels], ids=["formulas", "kernels"])


def _differentiated(f, z, dy):
    """The value of f at z and the gradient that autograd takes of it."""
    z = z.detach().requires_grad_()
    y = f(z)
    return y.detach(), torch.autograd.grad(y, z, dy)[0]


@routes
@each("activation", ACTIVATIONS)
def test_float64(activation, route):
    value, grad, _ = route(activation)
    z = 4 * torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dy = like(z, seed=2)
    y, dz = _differentiated(stock(activation), z, dy)
    assert_close(value(z), y)
    assert_close(grad(dy, z), dz, rtol=FLOAT32_SIXTH if activation.name == "hardsigmoid" else 1e-12)


@routes
@each("activation", ACTIVATIONS)
def test_float32(activation, route):
    value, grad, _ = route(activation)
    z = 4 * torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    dy = like(z, seed=4)
    theirs = _differentiated(stock(activation), z, dy)
    exact = _differentiated(formula(activation), z.double(), dy.double())
    assert_as_good_as_eager([value(z), grad(dy, z)], theirs, exact)


@each("dtype", [torch.float64, torch.float32])
@routes
@each("activation", ACTIVATIONS)
def test_special_points(activation, route, dtype):
    # PyTorch's scalar and vectorised kernels part at NaN, so every point fills whole vectors
    z = special(activation, dtype)[:, None].expand(-1, 64).contiguous()
    value, grad, _ = route(activation)
    f = stock(activation)

    def results(dy):
        without_onednn = _differentiated(lambda z: f(z.mT).mT, z, dy)  # oneDNN's float32 gelu(inf) is NaN
        return zip((value(z), grad(dy, z)), _differentiated(f, z, dy), without_onednn, strict=True)

    for mine, first, second in results(like(z, seed=5)):
        expected = torch.where(places(mine) == places(first), first, second)
        wrong = places(mine) != places(expected)
        assert not wrong.any(), f"NaN or inf stand elsewhere at z = {z[wrong].unique().tolist()}"
        finite = expected.isfinite()
        torch.testing.assert_close(mine[finite], expected[finite], rtol=1e-5, atol=1e-5)

    # Where PyTorch answers 0 to any dy, inf does not become inf * 0.
    _, (mine, first, second) = results(torch.full_like(z, float("inf")))
    wrong = (mine.isfinite() != first.isfinite()) & (mine.isfinite() != second.isfinite())
    assert not wrong.any(), f"dy = inf is answered otherwise at z = {z[wrong].unique().tolist()}"


@routes
@each("activation", [a for a in ACTIVATIONS if a.row.grad_from_output and not a.row.output_lost(*a.params)])
def test_gradient_from_output(activation, route):
    value, grad, grad_from_output = route(activation)
    z = 4 * torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    if activation.row.output_exact:
        z = torch.cat([z, special(activation, torch.float64).repeat_interleave(64)])
    dy = like(z, seed=7)
    from_output, from_z = grad_from_output(dy, value(z)), grad(dy, z)
    # At its threshold softplus is cut off where the slope is still short of 1 by e^-20, and y is past it before z.
    rtol = {"hardsigmoid": FLOAT32_SIXTH, "softplus": math.exp(-20)}.get(activation.name, 1e-12)
    assert_close(from_output, from_z, rtol=rtol)


def test_relu2_from_output_is_lost_where_the_square_is():
    z = torch.tensor([1e-30, 1e30])
    value, _, grad_from_output = _formulas(bind("relu2"))
    assert grad_from_output(torch.ones(2), value(z)).tolist() == [0.0, float("inf")]


@each("dtype", [torch.bfloat16, torch.float16])
def test_limits_are_rounded_as_clamp_rounds_them(dtype):
    activation = bind("hardtanh", (-0.42, 1.68))
    z = torch.tensor([-2.0, 2.0], dtype=dtype)
    assert activation.params_for(dtype) == tuple(F.hardtanh(z, -0.42, 1.68).tolist())
    assert activation.params_for(torch.float64) == activation.params


@each("activation", ACTIVATIONS)
def test_copies_are_the_same_activation(activation):
    assert copy.deepcopy(activation) == activation == pickle.loads(pickle.dumps(activation))


@pytest.mark.parametrize("name", ROWS)
def test_no_gradient_at_zero_from_no_gradient(name):
    """The Triton kernels add up whole tiles, and read zeros beyond the last row."""
    row, nothing = ROWS[name], torch.zeros(1)
    params = tuple(default for _, default in row.params)
    gradients = [row.grad, row.grad_from_output] if row.grad_from_output else [row.grad]
    assert all(torch.equal(gradient(nothing, nothing, *params), nothing) for gradient in gradients)
