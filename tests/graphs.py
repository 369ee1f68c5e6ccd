"""Calls to be captured in graphs, and how a captured one is run."""

import support
import torch
from support import each, flatten, like
from torch import nn

import fastbp
from fastbp.activations import bind
from fastbp.forms import FORMS
from fastbp.saving import exact_policies

SIZES = (6, 8, 7, 5)
IDENTITY, TANH, GELU, LEAKY = bind("identity"), bind("tanh"), bind("gelu"), bind("leaky_relu", (0.2,))
CASES = [(form, TANH, save) for form in FORMS.values() for save in exact_policies(TANH, form)]
CASES += [(form, activation, "auto") for form in FORMS.values() for activation in (GELU, LEAKY)]
each_form = each("form", FORMS.values())
each_case = each(("form", "activation", "save"), CASES)


def draw(form, rows=4, seed=0, dtype=torch.float64, **options):
    return support.tensors(form, dtype, seed=seed, rows=rows, features=SIZES, **options)


def run(function, tensors, **settings):
    """Output, and gradients of all that takes one."""
    inputs = flatten(*tensors)
    y = function(*tensors, **settings)
    return [y, *support.grads(y, inputs, like(y, seed=1))]


def call_of(form, **settings):
    def call(x, weights, biases):
        return support.call(form, x, weights, biases, **settings)

    return call


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def all_modules(dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(
        fastbp.Linear(6, 8, dtype=dtype),
        fastbp.LinearAct(8, 8, dtype=dtype, activation=nn.LeakyReLU(0.3)),
        fastbp.LinearAct(8, 8, dtype=dtype, activation=nn.LeakyReLU(0.2), save="recompute"),
        fastbp.GatedLinear(8, 8, dtype=dtype),
        fastbp.MLP(8, (8, 9), 8, dtype=dtype, activation="relu"),
        fastbp.GatedMLP(8, 16, dtype=dtype),
    )
