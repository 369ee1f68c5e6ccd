"""Calls that are served, to be spoilt one argument at a time, and the words of a refusal.

A call that has to be refused may not compute anything on the way, so each is made with every kernel forbidden.
"""

import contextlib

import pytest
import support
import torch
from support import each
from torch.utils._python_dispatch import TorchDispatchMode

import fastbp
from fastbp.forms import FORMS

K, N, INNER, OUT = SIZES = (6, 8, 7, 5)
MODULES = {
    "LinearAct": lambda **settings: fastbp.LinearAct(K, N, **settings),
    "GatedLinear": lambda **settings: fastbp.GatedLinear(K, N, **settings),
    "MLP": lambda **settings: fastbp.MLP(K, N, OUT, **settings),
    "GatedMLP": lambda **settings: fastbp.GatedMLP(K, N, OUT, **settings),
}
MODULE_OF = dict(zip(FORMS, MODULES, strict=False))  # of those that have one


def good(form):
    """The tensors of a call that is served, by the caller's names."""
    x, weights, biases = support.tensors(form, torch.float32, seed=0, rows=3, features=SIZES, requires_grad=False)
    names = [*form.names_of_inputs, *(form.argument("weight", i) for i in range(len(biases)))]
    named = dict(zip(names, (x, *weights), strict=True))
    return named | {form.argument("bias", i): bias for i, bias in enumerate(biases)}


def call(form, named, **settings):
    return support.call(form, *support.unflatten(form, [*named.values()]), **{"activation": "gelu"} | settings)


METADATA = {torch.ops.aten.dim.default, torch.ops.aten.sym_size.default, torch.ops.aten.sym_size.int}


class Forbidden(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in METADATA:  # what jagged tensors answer in Python
            return func(*args, **kwargs or {})
        if func.namespace == "fastbp_native":  # looks at the tensors itself, and has to refuse them before it computes
            func(*args, **kwargs or {})
        raise AssertionError(f"{func} ran in a call that has to be refused")


@contextlib.contextmanager
def refused(error, where, *words, computing=False):
    """The block raises ``error``, its message begins with ``fastbp.where:`` and has the words, and no kernel runs."""
    with pytest.raises(error) as caught, contextlib.nullcontext() if computing else Forbidden():
        yield
    message = str(caught.value)
    assert message.startswith(f"fastbp.{where}: "), message
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


ARGUMENTS = [(form, name) for form in FORMS.values() for name in good(form)]
each_form = each("form", FORMS.values())
each_argument = each(("form", "name"), ARGUMENTS)
each_weight = each(("form", "name"), [pair for pair in ARGUMENTS if "weight" in pair[1]])
each_bias = each(("form", "name"), [pair for pair in ARGUMENTS if "bias" in pair[1]])
