"""Modules whose forward is given as text, and how the tests run what is known of them."""

import copy
import itertools
import linecache
import math
import textwrap

import torch
import torch.nn.functional as F
from torch import nn

from fastbp import functional, known
from fastbp.fusion.surgery import swap_in

WIDTH, HIDDEN = 12, 20
_numbers = itertools.count()


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def method(text, names=None, head="def forward(self, x):"):
    """A function of this source, whose globals are ``names``, as from a file."""
    lines = [line + "\n" for line in (head + "\n" + textwrap.indent(textwrap.dedent(text), "    ")).splitlines()]
    file = f"<text {next(_numbers)}>"
    linecache.cache[file] = (len(lines), None, lines, file)
    space = {"torch": torch, "nn": nn, "F": F} if names is None else names
    exec(compile("".join(lines), file, "exec"), space)
    return space["forward"]


class Written(nn.Module):
    """Children and attributes for the forwards of tests."""

    def __init__(self, act=None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.up, self.narrow = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN)
        self.act, self.drop, self.idle, self.norm = act or nn.GELU(), nn.Dropout(0.0), nn.Identity(), nn.LayerNorm(20)
        self.layer = nn.Linear(HIDDEN, HIDDEN)
        self.fn, self.scale, self.layers = F.silu, 2.0, nn.ModuleList([nn.Linear(WIDTH, HIDDEN)])


def written(text, act=None, **options):
    """A module with this forward."""
    return type("Made", (Written,), {"forward": method(text, **options)})(act).double()


def act_module(text, **attributes):
    """A module that takes one tensor."""
    module = type("Act", (nn.Module,), {"forward": method(text, names={"torch": torch, "F": F, "math": math})})()
    module.__dict__.update(attributes)
    return module


def swap(model):
    """Make every module of the model that is known run whole; what is known of each."""
    plans = {name: known.read(module) for name, module in model.named_modules()}
    found = {name: plan for name, plan in plans.items() if not isinstance(plan, str)}
    for name, plan in found.items():
        swap_in(model.get_submodule(name), plan)
    return found


def pair(model):
    """A stock model, and a copy that runs whole."""
    stock, fused = model, copy.deepcopy(model)
    assert swap(fused)
    return stock, fused


def count_calls(monkeypatch):
    """A list that grows by the form of each fused call."""
    calls, call = [], functional.call
    monkeypatch.setattr(
        functional, "call", lambda form, *rest, **kw: calls.append(form.name) or call(form, *rest, **kw)
    )
    return calls


def step(model, x):
    """Output and the gradients of x and of every parameter that takes part; dropouts draw the same numbers."""
    x = x.detach().clone().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        y = model(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], dy, allow_unused=True)]


def assert_same(model, stock, x, tolerance=1e-12):
    """One step of each."""
    for a, b in zip(step(model, x), step(stock, x), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def differ(a, b):
    """Whether two steps differ."""
    return any(
        (p is None) != (q is None) or (p is not None and not torch.allclose(p, q)) for p, q in zip(a, b, strict=True)
    )
