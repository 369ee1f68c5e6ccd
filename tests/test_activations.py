"""Every row of the table against PyTorch's own function, and what users may pass as an activation."""

import copy
import functools
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
    stock_module,
    tensors,
)
from torch import nn

import fastbp
from fastbp.activations import TABLE, bind
from fastbp.forms import LINEAR_ACT
from fastbp.problem import configure
from fastbp.recognition import resolve
from fastbp.saving import legal_policies

# The names are a contract with users, and so is which of them have a slope that is a function of y.
FROM_OUTPUT = (
    *("identity", "relu", "leaky_relu", "relu6", "hardtanh", "elu", "celu", "selu", "sigmoid", "tanh", "softplus"),
    *("softsign", "hardsigmoid", "relu2"),
)
NAMES = (*FROM_OUTPUT, "silu", "gelu", "gelu_tanh", "quick_gelu", "mish", "hardswish")


def test_names():
    assert sorted(row.name for row in TABLE) == sorted(NAMES)


def test_available_activations():
    always = ("preact", "recompute")
    available = fastbp.available_activations()
    assert {name: sorted(policies) for name, policies in available.items()} == {
        name: sorted({*always, "output"} if name in FROM_OUTPUT else always) for name in NAMES
    }


def test_parameters_that_cost_the_output_policy():
    lost = {str(a) for a in bound_with_params() if "output" not in legal_policies(a)}
    assert lost == {"leaky_relu(negative_slope=-0.2)", "elu(alpha=-0.7)", "celu(alpha=-1.5)", "softplus(threshold=5)"}


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


# What users may pass.


@each("name", NAMES)
def test_name(name):
    assert resolve(name) == bind(name)


@each("activation", [a for a in ACTIVATIONS if a.row.module])
def test_module(activation):
    module = stock_module(activation)
    assert resolve(module) == activation
    if hasattr(module, "inplace"):
        module.inplace = True
        assert resolve(module) == activation


@each("row", [row for row in TABLE if row.functions])
def test_functions(row):
    z = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    for function in row.functions:
        assert resolve(function) == bind(row.name)
        assert_close(bind(row.name)(z), function(z.clone()))


@each("activation", bound_with_params())
def test_partial(activation):
    row, params = activation
    keywords = dict(zip((name for name, _ in row.params), params, strict=True))
    for function in row.functions:
        if function not in (torch.celu, torch.celu_):  # whose first argument, too, is keyword-only
            assert resolve(functools.partial(function, **keywords)) == activation
    assert resolve(functools.partial(row.functions[0], **keywords, inplace=True)) == activation


class _Stranger(nn.Module):
    """Somebody's own module: no parameters, any forward."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z):
        return self.function(z)


STRANGERS = {
    "relu": lambda z: z.clamp(min=0),
    "leaky_relu": lambda z: F.leaky_relu(z, inplace=True),
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
    "silu": lambda z: z * torch.sigmoid(z),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "gelu": functools.partial(F.gelu, approximate="none"),
    "gelu_tanh": lambda z: 0.5 * z * (1.0 + torch.tanh(0.79788456 * (z + 0.044715 * torch.pow(z, 3.0)))),
    "mish": lambda z: z * torch.tanh(F.softplus(z)),
    "relu2": lambda z: torch.square(torch.relu(z)),
}


@pytest.mark.parametrize(("name", "function"), STRANGERS.items(), ids=STRANGERS)
def test_strangers_are_recognised_by_their_values(name, function):
    assert resolve(function) == resolve(_Stranger(function)) == bind(name)


@pytest.mark.parametrize(
    "mode",
    [lambda: torch.device("meta"), torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")],
    ids=["meta", "no_grad", "inference_mode", "autocast"],
)
def test_strangers_are_recognised_in_every_mode(mode):
    with mode():
        assert resolve(STRANGERS["silu"]) == bind("silu")


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad, torch.func.jacfwd], ids=lambda t: t.__name__)
def test_strangers_are_recognised_within_transforms(transform):
    x, weights, biases = tensors(LINEAR_ACT, seed=11, requires_grad=False)

    def loss(x, activation):
        return fastbp.linear_act(x, *weights, *biases, activation=activation).sum()

    recognised, named = (functools.partial(loss, activation=a) for a in (STRANGERS["silu"], "silu"))
    assert_close(transform(recognised)(x), transform(named)(x))


def test_a_subclass_is_taken_at_its_own_word():
    class Other(nn.GELU):
        def forward(self, input):
            return torch.tanh(input)

    assert resolve(Other()) == bind("tanh")


def test_a_module_may_change_between_calls():
    x, weights, biases = tensors(LINEAR_ACT, seed=9)
    module = nn.LeakyReLU(0.2)
    for slope in (0.2, 0.7):
        module.negative_slope = slope
        y = fastbp.linear_act(x, *weights, *biases, activation=module)
        assert_close(y, F.leaky_relu(F.linear(x, *weights, *biases), slope))


def _with(module, **attributes):
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def _hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


def _straight_through(z):
    return z + (torch.relu(z) - z).detach()


REFUSED = {
    "a misspelt name": ("gelo", ValueError, "unknown activation 'gelo'; did you mean 'gelu'"),
    "no name": ("zzz", ValueError, "unknown activation 'zzz'; known: identity, relu, .*relu2"),
    "a number": (3, TypeError, "must be a name, an nn.Module or a function, got int 3"),
    "None": (None, TypeError, "got NoneType None; use 'identity' for none"),
    "trained": (nn.PReLU(), ValueError, r"PReLU has parameters or buffers of its own \(weight\)"),
    "trained inside": (nn.Sequential(nn.PReLU()), ValueError, r"Sequential has parameters .*\(0.weight\)"),
    "hooked": (_hooked(nn.ReLU()), ValueError, "ReLU has hooks"),
    "hooked inside": (nn.Sequential(_hooked(nn.ReLU())), ValueError, "hooks"),
    "patched": (_with(nn.ReLU(), forward=torch.tanh), ValueError, "a forward of its own"),
    "random": (nn.RReLU(), ValueError, "RReLU computes none of the known activations"),
    "random by half": (nn.Dropout(0.5), ValueError, "Dropout computes none"),
    "other values": (nn.Tanhshrink(), ValueError, "Tanhshrink computes none"),
    "other values far out": (lambda z: z.clamp(-500, 500), ValueError, "computes none"),
    "other gradients": (_straight_through, ValueError, "_straight_through computes none"),
    "not elementwise": (nn.Softmax(-1), ValueError, "Softmax computes none"),
    "not the same in every shape": (lambda z: F.relu(z) if z.dim() == 1 else F.silu(z), ValueError, "computes none"),
    "not of this shape": (nn.GLU(), ValueError, "GLU computes none"),
    "no tensor": (lambda z: 1.0, ValueError, "computes none"),
    "a class": (nn.GELU, ValueError, "GELU computes none"),
    "no parameters for it": (functools.partial(F.relu, slope=2), ValueError, "computes none"),
    "alpha 0": (nn.CELU(0.0), ValueError, "celu: alpha must not be 0"),
    "beta 0": (nn.Softplus(0.0), ValueError, "softplus: beta must not be 0"),
    "limits crossed": (_with(nn.Hardtanh(), min_val=2.0), ValueError, "min_val must be below max_val, got 2.0 and 1.0"),
    "NaN": (nn.LeakyReLU(float("nan")), ValueError, "leaky_relu: parameters must be finite"),
    "inf, in a partial": (functools.partial(F.elu, alpha=float("inf")), ValueError, "elu: parameters must be finite"),
    "a word": (nn.ELU("one"), TypeError, r"the parameters of elu must be numbers, got \('one',\)"),
}


@pytest.mark.parametrize(("activation", "exception", "text"), REFUSED.values(), ids=REFUSED)
def test_refused(activation, exception, text):
    x, weights, biases = tensors(LINEAR_ACT, seed=10)
    state = torch.get_rng_state()
    with pytest.raises(exception, match=f"^fastbp.linear_act: .*{text}"):
        fastbp.linear_act(x, *weights, *biases, activation=activation)
    assert torch.equal(torch.get_rng_state(), state), "it was tried at the cost of the user's random numbers"
