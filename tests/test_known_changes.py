"""A block that runs whole looks up every name at each call: where one has changed, its own forward runs."""

import copy
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from known_cases import ATTRIBUTE, FUNCTION, GATED, PATCHES, PLAIN, draw, stack, twice
from reading import WIDTH, act_module, assert_same, count_calls, differ, pair, step, written
from torch import nn
from torch.nn.utils import parametrize

from fastbp.fusion.surgery import base_of

pytestmark = pytest.mark.usefixtures("seeded")


def dropping(model, p):
    model.drop.p = p


def partially(model):
    """In place: the attribute stays the same object."""
    model.fn.keywords["negative_slope"] = 0.5


def parametrized(model):
    parametrize.register_parametrization(model.fc1, "weight", nn.Softsign())


def with_bias(model):
    model.up.bias = nn.Parameter(torch.ones(20, dtype=torch.float64))


def in_dict(model):
    model.__dict__["act"] = torch.tanh


def in_buffers(model):
    """Where nn.Module looks before it looks among the children."""
    model._buffers["act"] = Callable()


class Callable(torch.Tensor):
    """A buffer that can be called."""

    def __new__(cls):
        return torch.Tensor._make_subclass(cls, torch.zeros(1))

    def __call__(self, x):
        return torch.tanh(x)


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def halved(model):
    model.fc2.__class__ = Halved


# by name: the forward, the activation, what changes of a model
OF_A_MODEL = {
    "activation replaced": (PLAIN, nn.GELU, lambda m: setattr(m, "act", nn.Tanh())),
    "activation of the same attributes": (PLAIN, nn.SiLU, lambda m: setattr(m, "act", nn.Mish())),
    "activation of the same class": (PLAIN, nn.GELU, lambda m: setattr(m, "act", nn.GELU("tanh"))),
    "activation without a module": (PLAIN, nn.GELU, lambda m: m.__setattr__("act", nn.Softmax(-1))),
    "linear of a subclass": (PLAIN, nn.GELU, halved),
    "linear parametrized": (PLAIN, nn.GELU, parametrized),
    "linear with a hook": (PLAIN, nn.GELU, lambda m: m.fc1.register_forward_hook(twice)),
    "linear with a hook before": (PLAIN, nn.GELU, lambda m: m.fc2.register_forward_pre_hook(lambda m, a: a[0] * 2)),
    "linear with a hook in backward": (
        PLAIN,
        nn.GELU,
        lambda m: m.fc2.register_full_backward_hook(lambda m, i, o: (i[0] * 3,)),
    ),
    "activation with a hook": (PLAIN, nn.GELU, lambda m: m.act.register_forward_hook(twice)),
    "idle child with a hook": (PLAIN, nn.GELU, lambda m: m.idle.register_forward_hook(twice)),
    "idle dropout with a hook": (PLAIN, nn.GELU, lambda m: m.drop.register_forward_hook(twice)),
    "forward of a linear": (PLAIN, nn.GELU, lambda m: setattr(m.fc1, "forward", lambda x: x @ m.fc1.weight.T)),
    "forward of the activation": (PLAIN, nn.GELU, lambda m: setattr(m.act, "forward", torch.tanh)),
    "forward of an idle child": (PLAIN, nn.GELU, lambda m: setattr(m.idle, "forward", torch.tanh)),
    "forward of the module": (PLAIN, nn.GELU, lambda m: setattr(m, "forward", m.norm.weight[:12].mul)),
    "idle child replaced": (PLAIN, nn.GELU, lambda m: setattr(m, "idle", m.norm)),
    "dropout drops": (PLAIN, nn.GELU, lambda m: dropping(m, 0.5)),
    "approximate": (PLAIN, nn.GELU, lambda m: setattr(m.act, "approximate", "tanh")),
    "slope": (PLAIN, nn.LeakyReLU, lambda m: setattr(m.act, "negative_slope", 0.5)),
    "function": (ATTRIBUTE, nn.GELU, lambda m: setattr(m, "fn", torch.tanh)),
    "function becomes a module": (ATTRIBUTE, nn.GELU, lambda m: delattr(m, "fn") or setattr(m, "fn", nn.Tanh())),
    "shadow in __dict__": (PLAIN, nn.GELU, in_dict),
    "shadow among buffers": (PLAIN, nn.GELU, in_buffers),
}


@pytest.mark.parametrize("change", [with_bias, lambda m: setattr(m, "up", m.layers[0])], ids=["bias", "linear"])
def test_another_plain_linear_is_taken(change, monkeypatch):
    """A bias where there was None, a linear in another's place: still one call, with the new parameters."""
    assert_seen(written(GATED), [change], monkeypatch, calls_after=1)


@pytest.mark.parametrize("what", OF_A_MODEL)
def test_changes_of_a_model(what, monkeypatch):
    text, act, change = OF_A_MODEL[what]
    assert_seen(written(text, act()), [change], monkeypatch)


def assert_seen(model, changes, monkeypatch, calls_after=0):
    """The block is one call; with the changes it is none, computes what stock computes, and no longer what it did."""
    stock, fused = pair(model)
    calls, x = count_calls(monkeypatch), draw(5, WIDTH)
    assert_same(fused, stock, x)
    assert len(calls) == 1
    before = step(stock, x)[:2]
    for change in changes:
        change(stock)
        change(fused)
    after = step(stock, x)[:2]
    assert differ(before, after)
    assert_same(fused, stock, x)
    assert len(calls) == 1 + calls_after
    return stock, fused


def test_contents_of_a_partial(monkeypatch):
    model = written(ATTRIBUTE)
    model.fn = functools.partial(F.leaky_relu, negative_slope=0.1)
    assert_seen(model, [partially], monkeypatch)


def test_copies_of_a_partial_run_whole(monkeypatch):
    model = written(ATTRIBUTE)
    model.fn = functools.partial(F.leaky_relu, negative_slope=0.1)
    stock, fused = pair(model)
    calls = count_calls(monkeypatch)
    assert_same(copy.deepcopy(fused), stock, draw(3, WIDTH))
    assert len(calls) == 1


@pytest.mark.parametrize("what", PATCHES)
def test_patches(what, monkeypatch):
    text, patch = PATCHES[what]
    stock = written(text)
    with pytest.MonkeyPatch.context() as patched:
        assert_seen(stock, [lambda m: patched.setattr(*patch(m), raising=False)], monkeypatch)


def test_a_global_that_is_bound_again(monkeypatch):
    stock = written(FUNCTION)
    names = type(stock).forward.__globals__
    _, fused = assert_seen(stock, [lambda m: names.update(F=types.SimpleNamespace(gelu=torch.tanh))], monkeypatch)
    del names["F"]
    with pytest.raises(NameError, match="F"):
        fused(draw(2, WIDTH))


def test_the_code_of_a_forward_is_exchanged(monkeypatch):
    stock = written(PLAIN)
    code = written("return self.fc2(self.act(self.act(self.fc1(x))))")
    assert_seen(stock, [lambda m: setattr(type(stock).forward, "__code__", type(code).forward.__code__)], monkeypatch)


OTHER = {"F": types.SimpleNamespace(gelu=torch.tanh)}


def with_other_globals(kind):
    """The forward of a class, of the very same code, finds other functions."""
    kind.forward = types.FunctionType(kind.forward.__code__, OTHER, "forward")


def with_other_code(kind):
    kind.forward.__code__ = (lambda self, x: x * 2).__code__


@pytest.mark.parametrize("change", [with_other_globals, with_other_code])
def test_the_forward_of_an_activation_is_exchanged(change, monkeypatch):
    act = act_module("return F.gelu(x)")
    assert_seen(
        written(PLAIN, act),
        [lambda m: change(type(act)) if type(act).forward.__globals__ is not OTHER else None],
        monkeypatch,
    )


def test_a_forward_of_the_same_code_and_other_globals(monkeypatch):
    assert_seen(written(FUNCTION), [lambda m: with_other_globals(base_of(m))], monkeypatch)


OF_A_SEQUENTIAL = {
    "appended": lambda m: m.append(nn.Tanh()),
    "replaced": lambda m: m.__setitem__(1, nn.Tanh()),
    "deleted": lambda m: m.__delitem__(1),
    "inserted": lambda m: m.insert(1, nn.Tanh()),
    "hook": lambda m: m[0].register_forward_hook(twice),
    "dropout": lambda m: setattr(m[2], "p", 0.5),
    "attribute": lambda m: setattr(m[1], "approximate", "tanh"),
    "linear": lambda m: setattr(m[3], "__class__", Halved),
    "shadow": lambda m: m.__dict__.update({"1": nn.Tanh()}) or setattr(m[1], "approximate", "tanh"),
}


@pytest.mark.parametrize("what", OF_A_SEQUENTIAL)
def test_changes_of_a_sequential(what, monkeypatch):
    assert_seen(stack(), [OF_A_SEQUENTIAL[what]], monkeypatch)


@pytest.mark.parametrize("name", ["forward", "__iter__"])
def test_patches_of_sequential(name, monkeypatch):
    other = {"forward": lambda self, x: 2 * x, "__iter__": lambda self: iter(list(self._modules.values())[:1] * 1)}[
        name
    ]
    stock, fused = pair(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()).double())
    calls, x = count_calls(monkeypatch), draw(3, WIDTH)
    monkeypatch.setattr(nn.Sequential, name, other)
    assert torch.equal(fused(x), stock(x)) and not calls


def test_a_run_that_is_not_plain_leaves_the_others(monkeypatch):
    stock, fused = pair(stack(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 5)).double())
    calls = count_calls(monkeypatch)
    for m in (stock, fused):
        m[0].register_forward_hook(twice)
    assert_same(fused, stock, draw(4, WIDTH))
    assert calls == ["mlp"]


# Surroundings


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_block_sees_changes():
    changes = [OF_A_MODEL[what][2] for what in ("approximate", "activation replaced", "dropout drops")]
    stock, fused = pair(written(PLAIN))
    compiled, x = torch.compile(fused, backend="aot_eager"), draw(4, WIDTH)
    assert_same(compiled, stock, x)
    for change in changes:
        change(stock)
        change(fused)
        assert_same(compiled, stock, x)
