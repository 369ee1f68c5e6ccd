"""What users may pass as an activation: names, PyTorch's modules and functions, strangers; and what is refused."""

import functools

import pytest
import torch
import torch.nn.functional as F
from support import (
    ACTIVATIONS,
    assert_close,
    bound_with_params,
    each,
    stock_module,
    tensors,
)
from torch import nn

import fastbp
from fastbp.activations import ROWS, TABLE, bind
from fastbp.forms import LINEAR_ACT
from fastbp.recognition import resolve


@each("name", ROWS)
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
    if hasattr(row.functions[0], "__code__"):  # those of C++ have no such argument
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
    "a class": (nn.GELU, TypeError, "got the class GELU; try GELU()"),
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
