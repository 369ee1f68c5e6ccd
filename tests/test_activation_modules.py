"""Activation modules whose kernel ``fuse`` exchanges, where our pass over z takes less time than PyTorch's."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from exchanged import GELU, MODULES, TANH, exchanged, faster, is_exchanged, numbers, value_and_gradient
from known_cases import activations_of_transformers
from support import assert_as_good_as_eager, each, stock_module
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fastbp
from fastbp.activations import bind
from fastbp.backends import native
from fastbp.linear import of_any_size

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}"),
]


@pytest.fixture(autouse=True)
def any_size():
    with of_any_size():
        yield


@each("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each("activation", MODULES)
def test_modules_of_pytorch_are_as_good_as_stock(activation, dtype):
    act, z = stock_module(activation), numbers(dtype)
    fused = exchanged(copy.deepcopy(act))
    found = [value_and_gradient(fused, z), value_and_gradient(act, z), value_and_gradient(act, z.double())]
    assert is_exchanged(found[0][0]) == faster(activation)
    assert_as_good_as_eager(*found, spare_units=2)
    with torch.no_grad():
        assert torch.equal(fused(z), found[0][0])
    with torch.inference_mode():
        assert torch.equal(fused(z), found[0][0])


@each("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each("name", ["gelu_new", "gelu_fast", "quick_gelu", "relu2"])
def test_modules_of_transformers_are_as_good_as_stock(name, dtype):
    act = activations_of_transformers().ACT2FN[name]
    fused = exchanged(activations_of_transformers().ACT2FN[name])
    z = 2 * numbers(dtype, 500)
    if name == "quick_gelu":  # gelu_new overflows in its cube
        z = torch.cat([z, torch.tensor([3e4, -3e4, math.inf, -math.inf, math.nan, 0.0, -0.0]).to(dtype)])
    found = [value_and_gradient(fused, z), value_and_gradient(act, z), value_and_gradient(act, z.double())]
    assert is_exchanged(found[0][0])
    assert_as_good_as_eager(*found)


@each("activation", MODULES)
def test_derivatives_of_every_order(activation):
    act = stock_module(activation)
    fused = exchanged(copy.deepcopy(act))
    z = (numbers(torch.float64, 4, 3) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(fused, z) and torch.autograd.gradgradcheck(fused, z)
    assert torch.autograd.gradcheck(fused, z, check_forward_ad=True, check_batched_grad=True, check_backward_ad=True)
    both = [
        torch.autograd.functional.hvp(lambda z, f=f: f(z).square().sum(), z, torch.ones_like(z)) for f in (fused, act)
    ]
    assert_close(*both, rtol=1e-10, atol=1e-10)


@each("activation", [GELU, bind("softplus"), bind("mish"), TANH])
def test_what_is_kept(activation):
    """z, or of an activation that PyTorch takes the slope of from y, y alone; and it may be written to as in stock."""
    act = stock_module(activation)
    fused, z = exchanged(copy.deepcopy(act)), numbers().requires_grad_()
    with fastbp.SavedBytes() as saved:
        y = fused(z)
    assert saved.total == y.numel() * y.element_size()
    y = fused(z).mul_(2)
    if activation is TANH:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        return
    (mine,) = torch.autograd.grad(y.sum(), z)
    assert_close(mine, torch.autograd.grad(act(z).mul(2).sum(), z)[0])


def test_gradients_of_any_layout():
    """As those of a sum, which are one number in many places, and batched ones."""
    act, fused, z = nn.Mish(), exchanged(nn.Mish()), numbers(torch.float64, 7, 5).requires_grad_()
    for dy in (torch.ones(1, 1, dtype=torch.float64).expand(7, 5), numbers(torch.float64, 5, 7).mT):
        assert_close(*(torch.autograd.grad(f(z), z, dy) for f in (fused, act)))
    many = numbers(torch.float64, 3, 7, 5)
    assert_close(*(torch.autograd.grad(f(z), z, many, is_grads_batched=True) for f in (fused, act)))
    assert_close(*(torch.func.vmap(torch.func.grad(lambda z, f=f: f(z).sum()))(z.detach()) for f in (fused, act)))


class Behind(nn.Module):
    """A block that is not known as one, for it takes a second argument."""

    def __init__(self, act):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(24, 96), act, nn.Linear(96, 24)

    def forward(self, x, drop=0.0):
        h = self.act(self.first(x))
        return self.last(F.dropout(h, drop) if drop else h)


@each("activation", [a for a in MODULES if a.params == bind(a.name).params])
def test_a_linear_behind_reads_it(activation):
    stock = Behind(stock_module(activation)).double()
    model, x = copy.deepcopy(stock), torch.randn(50, 24, dtype=torch.float64)
    fastbp.fuse(model)
    with fastbp.SavedBytes(exclude=[model, x]) as saved:
        y = model(x)
    assert saved.total == 50 * 96 * 8, "z, or what tanh keeps, and nothing else"
    (site,) = fastbp.report(model).sites
    if activation.row.torch_keeps_output:
        assert site.reason == f"{activation!r} keeps its output, which is this linear's input, and it is kept once"
    else:
        assert site.what == f"act_linear, {activation!r}"
    mine, theirs = (torch.autograd.grad(f(x).square().sum(), list(f.parameters())) for f in (model, stock))
    assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert_close(y, stock(x), rtol=1e-12, atol=1e-12)


def test_a_gate_is_read():
    """g and u are kept, and f(g) not, although the node of f is ours."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.act = nn.Linear(24, 96), nn.Linear(24, 96), nn.SiLU()
            self.down = nn.Linear(96, 24)

        def forward(self, x, scale=None):
            return self.down(self.act(self.gate(x)) * self.up(x))

    stock = Gated().double()
    model, x = copy.deepcopy(stock), torch.randn(50, 24, dtype=torch.float64)
    fastbp.fuse(model, filter_fn=lambda module, name: name != "")
    with fastbp.SavedBytes(exclude=[model, x]) as saved:
        y = model(x)
    assert saved.total == 2 * 50 * 96 * 8
    mine, theirs = (torch.autograd.grad(f(x).square().sum(), list(f.parameters())) for f in (model, stock))
    assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert_close(y, stock(x), rtol=1e-12, atol=1e-12)


@each("name", ["gelu", "tanh"])
def test_a_linear_behind_a_dropout_reads_it(name):
    stock = Behind(stock_module(bind(name))).double()
    model, x = copy.deepcopy(stock), torch.randn(50, 24, dtype=torch.float64)
    fastbp.fuse(model)
    found = []
    for f in (model, stock):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(f(x, 0.3).square().sum(), list(f.parameters())))
    assert_close(*found, rtol=1e-10, atol=1e-10)
    assert "linear of mul" in str(fastbp.report(model))


@each("reentrant", [True, False])
def test_inside_a_checkpoint(reentrant):
    act, fused, z = nn.GELU(), exchanged(nn.GELU()), numbers(torch.float64, 9, 7).requires_grad_()
    y = checkpoint(fused, z, use_reentrant=reentrant)
    assert_close(
        torch.autograd.grad(y.sum(), z) if not reentrant else _accumulated(y, z), torch.autograd.grad(act(z).sum(), z)
    )


def _accumulated(y, z):
    y.sum().backward()
    return (z.grad,)


def test_copies_pickles_and_the_way_back():
    model = exchanged(nn.Softplus(beta=2.0))
    kind, z = type(model[0]), numbers().requires_grad_()
    assert isinstance(model[0], nn.Softplus) and kind is not nn.Softplus
    for copied in (copy.copy(model[0]), copy.deepcopy(model)[0]):
        assert type(copied) is kind and is_exchanged(copied(z))
    assert type(pickle.loads(pickle.dumps(model))[0]) is nn.Softplus
    assert fastbp.unfuse(model) == ["0"] and type(model[0]) is nn.Softplus
    assert set(vars(model[0])) == set(vars(nn.Softplus()))
