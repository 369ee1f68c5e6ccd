"""Writing to an output in place: allowed wherever PyTorch allows it after its own activation, with equal gradients."""

import pytest
import torch
import torch.nn.functional as F
from graphs import draw, each_form
from support import ACTIVATIONS, assert_close, call, each, eager, flatten, like, stock_module
from torch import nn

import fastbp
from fastbp.activations import bind
from fastbp.backends import available_backends
from fastbp.forms import LINEAR_ACT
from fastbp.problem import DTYPES

each_backend = each("backend", [name for name in ("native", "reference") if available_backends()[name] == "available"])

WRITES = {
    "add_": lambda y: y.add_(like(y, 3)),
    "iadd of a leaf": lambda y: y.__iadd__(like(y, 3).requires_grad_()),
    "mul_": lambda y: y.mul_(2),
    "dropout": lambda y: F.dropout(y, 0.3, inplace=True),
    "relu_": torch.relu_,
    "a row": lambda y: y[0].zero_(),
}


def gradients(function, tensors, write):
    """Of a call whose output is written to; or the error that backward raises."""
    y = function(*tensors)
    torch.manual_seed(4)
    WRITES[write](y)
    try:
        return torch.autograd.grad(y, flatten(*tensors), like(y, 5))
    except RuntimeError as error:
        return str(error)


@each_form
@each("activation", ACTIVATIONS)
@each_backend
@pytest.mark.parametrize("write", WRITES)
def test_an_output_that_is_written_to(form, activation, backend, write):
    tensors = draw(form)
    expected = gradients(lambda *t: eager(form, *t, activation), tensors, write)
    found = gradients(lambda *t: call(form, *t, activation=activation, backend=backend), tensors, write)
    if isinstance(expected, str):
        assert not form.projected and not form.gated and activation.row.torch_keeps_output
        assert "modified by an inplace operation" in expected
        assert "modified by an inplace operation" in found
        return
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, rtol=1e-6, atol=1e-6)  # 1/6 in PyTorch's hardsigmoid is of float32


@each("activation", [a for a in ACTIVATIONS if a.row.module])
@pytest.mark.parametrize("write", ["add_", "dropout"])
def test_fused_models_and_modules(activation, write):
    """Runs of an nn.Sequential, and LinearAct by itself."""
    torch.manual_seed(1)
    dropout = [nn.Dropout(0.3, inplace=True)] if write == "dropout" else []
    fused = nn.Sequential(nn.Linear(6, 8), stock_module(activation), *dropout).double()
    module = fastbp.LinearAct(6, 8, activation=activation, dtype=torch.float64)
    module.load_state_dict({k.removeprefix("0."): v for k, v in fused.state_dict().items()})
    stock = nn.Sequential(nn.Linear(6, 8), stock_module(activation), *dropout).double()
    stock.load_state_dict(fused.state_dict())
    fastbp.fuse(fused)
    x = torch.randn(5, 6, dtype=torch.float64)

    def step(model):
        torch.manual_seed(2)
        y = model(x)
        if write == "add_":
            y += 1
        try:
            return torch.autograd.grad(y.square().sum(), list(model.parameters()))
        except RuntimeError as error:
            return str(error)

    expected = step(stock)
    for found in (step(fused), step(nn.Sequential(module, *dropout))):
        if isinstance(expected, str):
            assert "modified by an inplace operation" in found
            continue
        for mine, theirs in zip(found, expected, strict=True):
            assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@each("activation", ACTIVATIONS)
@each("dtype", DTYPES)
@each("followed", [False, True])
def test_a_layer_keeps_no_more_than_pytorchs(activation, dtype, followed):
    """Alone, and with a linear after it, which keeps y."""
    x, (weight,), (bias,) = draw(LINEAR_ACT, dtype=dtype)
    after = torch.randn(7, weight.shape[0], dtype=torch.float64).to(dtype).requires_grad_()

    def kept(function):
        with fastbp.SavedBytes(exclude=[x, weight, bias, after]) as saved:
            y = function()
            z = F.linear(y, after) if followed else y
        del y, z
        return saved.total

    ours = kept(lambda: fastbp.linear_act(x, weight, bias, activation=activation))
    assert ours <= kept(lambda: eager(LINEAR_ACT, x, [weight], [bias], activation))
    if followed and activation.row.torch_keeps_output:
        assert ours == 4 * weight.shape[0] * dtype.itemsize  # y alone


def test_what_pytorch_keeps_is_in_the_table():
    for activation in (bind(row.name) for row in fastbp.activations.TABLE if row.module):
        z = torch.randn(4, 3, requires_grad=True)
        y = stock_module(activation)(z * 1)
        with torch.no_grad():
            y.add_(0)
        try:
            y.sum().backward()
            raises = False
        except RuntimeError:
            raises = True
        assert raises == activation.row.torch_keeps_output, activation
