"""Activations that somebody wrote as a function: known by their source, and what each call looks up again."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision_ops
from reading import WIDTH, act_module, assert_same, count_calls, draw, method, pair, written
from torch import nn

import fastbp
from fastbp import known
from fastbp.known_acts import KnownAct, read_act

pytestmark = pytest.mark.usefixtures("seeded")

CALLS = "return self.fc2(act(self.fc1(x)))"
GELU = "return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))"
FAST = "return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))"


def function(text, head="def forward(x):", **more):
    return method(text, names={"torch": torch, "F": F, "math": math} | more, head=head)


def calling(act, text=CALLS):
    return written(text, names={"act": act, "torch": torch})


KNOWN = {
    "spelled": (function(GELU), "gelu"),
    "in lines": (function("s = torch.sigmoid(x)\nreturn x * s"), "silu"),
    "of a known function": (function("return F.leaky_relu(x, negative_slope=0.3)"), "leaky_relu(negative_slope=0.3)"),
    "with what nobody gives": (function("return F.silu(x)", head="def forward(x, inplace=False, *, a=1):"), "silu"),
}


@pytest.mark.parametrize("what", KNOWN)
@pytest.mark.parametrize("text", [CALLS, "return act(self.fc1(x))", "return self.fc2(self.up(x) * act(self.fc1(x)))"])
def test_functions_are_known_by_their_source(what, text, monkeypatch):
    act, name = KNOWN[what]
    stock, fused = pair(calling(act, text))
    ((_, call),) = known.read(stock).calls
    assert call.endswith(f", {name}")
    calls = count_calls(monkeypatch)
    assert_same(fused, stock, draw(3, 5, WIDTH))
    assert calls == [call.split(",")[0]]


def test_constants_for_float32_serve_float32_alone(monkeypatch):
    stock, fused = pair(calling(function(FAST)))
    calls = count_calls(monkeypatch)
    assert_same(fused, stock, draw(4, WIDTH))
    assert calls == []
    fused.float()(draw(4, WIDTH).float())
    assert calls == ["mlp"]


def test_modules_that_call_such_a_function_are_known():
    act = act_module("return act(x)")
    type(act).forward.__globals__["act"] = function(GELU)
    found = read_act(act)
    assert isinstance(found, KnownAct) and found.activation.name == "gelu" and found.spelled and found.holds(act)
    type(act).forward.__globals__["act"].__code__ = function(FAST).__code__
    assert not found.holds(act)


CHANGES = {
    "another function": lambda m, act: type(m).forward.__globals__.update(act=torch.tanh),
    "another code": lambda m, act: setattr(act, "__code__", function("return torch.tanh(x)").__code__),
    "another name in it": lambda m, act: act.__globals__.update(torch=F),
    "a name in it gone": lambda m, act: act.__globals__.pop("torch"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen(what, monkeypatch):
    act = function("return x * torch.sigmoid(x)")
    stock, fused = pair(calling(act))
    calls, x = count_calls(monkeypatch), draw(4, WIDTH)
    assert_same(fused, stock, x)
    assert calls == ["mlp"]
    CHANGES[what](stock, act)
    if what == "a name in it gone":
        with pytest.raises(NameError, match="torch"):
            fused(x)
    else:
        assert_same(fused, stock, x)
    assert calls == ["mlp"]


OTHERS = {
    "a sum": function("return x + 1"),
    "nearly": function("return x * torch.sigmoid(1.7 * x)"),
    "two levels": function("return act(x)", act=function(GELU)),
    "itself": function("return forward(x)"),
    "two arguments": function(GELU, head="def forward(x, y):"),
    "an argument that is used": function("return F.leaky_relu(x, negative_slope=y)", head="def forward(x, y=0.3):"),
    "decorated": torch.no_grad()(function(GELU)),
    "a print": function("print(x)\nreturn F.silu(x)"),
    "arguments": function(GELU, head="def forward(x, *args):"),
    "without source": eval("lambda x: x * 2"),
    "a built-in": torch.exp,
    "a module": nn.Softmax(-1),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_functions_are_not_known(what):
    assert isinstance(known.read(calling(OTHERS[what])), str)


def test_a_keyword_of_a_function_is_not_passed_over():
    assert isinstance(known.read(calling(KNOWN["spelled"][0], "return self.fc2(act(self.fc1(x), inplace=True))")), str)


def test_what_autocast_may_widen_is_pytorchs_where_no_linear_follows(monkeypatch):
    stock, fused = pair(calling(function("return x * torch.sigmoid(x)"), "return act(self.fc1(x))").float())
    calls, x = count_calls(monkeypatch), draw(4, WIDTH).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x), stock(x)) and calls == []
    fused(x)
    assert calls == ["linear_act"]


def test_a_block_with_a_function_compiles_whole_and_sees_changes():
    act = function("return x * torch.sigmoid(x)")
    stock, fused = pair(calling(act))
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    x = draw(4, WIDTH)
    assert torch.allclose(compiled(x), stock(x))
    type(stock).forward.__globals__["act"] = torch.tanh
    assert torch.allclose(compiled(x), stock(x))


BLOOM = ("BloomGelu.forward", "GeLUFunction.forward", "GeLUFunction.backward", "bloom_gelu_forward", "bloom_gelu_back")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("path", BLOOM)
def test_the_function_of_bloom_is_known_while_all_of_it_is_transformers(path, when, monkeypatch):
    pytest.importorskip("transformers")
    torchvision_ops.declare()
    from transformers.models.bloom import modeling_bloom as bloom

    *owner, name = path.split(".")
    owner = getattr(bloom, owner[0]) if owner else bloom
    theirs, static = getattr(owner, name), path.startswith("GeLUFunction")
    twice = lambda *args: 2 * theirs(*args)  # noqa: E731

    def patch():
        monkeypatch.setattr(owner, name, staticmethod(twice) if static else twice)

    stock = nn.Sequential(nn.Linear(WIDTH, WIDTH), bloom.BloomGelu(), nn.Linear(WIDTH, WIDTH))
    fused = copy.deepcopy(stock)
    if when == "before":
        patch()
    assert len(fastbp.fuse(fused).fused) == (when == "after")
    x = torch.randn(5, WIDTH)
    for change in (lambda: None, patch, monkeypatch.undo):
        change()
        found = []
        for m in (stock, fused):
            y = m(x)
            found.append((y, *torch.autograd.grad(y.square().sum(), list(m.parameters()))))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
