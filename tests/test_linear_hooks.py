"""fastbp.Linear: who looks at h, or at f(g), sees what PyTorch would show."""

import contextlib
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from linear_twins import MAKERS, ROWS, WIDTH, assert_as_stock, outcome, twice

import fastbp
from fastbp import producers
from fastbp.linear import of_any_size


@pytest.fixture(params=MAKERS)
def maker(request):
    return MAKERS[request.param]


def kept_by_hooks(what: str) -> str:
    """A gate whose h has hooks keeps f(g): nothing takes the place of the product that the hooks are on."""
    return "linear of mul" if what.startswith("gated") else what


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("after", ["once", "twice"])
def test_hooks_on_h_see_the_gradient_once_and_may_change_it(maker, when, hold, after):
    make, what = maker

    def program(fc, x, seen):
        h = make(fc[0](x), fc[1](x))

        def hook(g):
            seen.append(g.detach())
            return g.tanh()

        if when == "before":
            h.register_hook(hook)
        y = fc[2](h)
        if when == "after":
            h.register_hook(hook)
        if hold:
            y.h = h
        return y

    options = {"after": twice} if after == "twice" else {}
    ours = assert_as_stock(program, fused=kept_by_hooks(what) if when == "before" else what, **options)
    assert len(ours.seen) == (1 if after == "once" else 3)


def test_a_hook_that_was_taken_off_is_gone(maker):
    make, what = maker

    def program(fc, x, seen):
        h = make(fc[0](x), fc[1](x))
        y = fc[2](h)
        h.register_hook(lambda g: seen.append(g)).remove()
        return y

    assert not assert_as_stock(program, fused=what).seen


@pytest.mark.parametrize("when", ["before", "after"])
def test_retained_gradients(maker, when):
    make, what = maker

    def program(fc, x, seen):
        h = make(fc[0](x), fc[1](x))
        if when == "before":
            h.retain_grad()
        y = fc[2](h)
        if when == "after":
            h.retain_grad()
        y.h = h
        return y

    def backward(y, x, parameters, result):
        y.square().sum().backward()
        return [y.h.grad, x.grad, *(p.grad for p in parameters)]

    fused = kept_by_hooks(what) if when == "before" else what
    assert_as_stock(program, fused=fused, after=backward)


def test_gradients_asked_of_h(maker):
    make, what = maker

    def program(fc, x, seen):
        h = make(fc[0](x), fc[1](x))
        y = fc[2](h)
        y.h = h
        return y

    def first(y, x, ps, r):
        return torch.autograd.grad(y.square().sum(), [y.h, x, *ps], allow_unused=True)

    assert_as_stock(program, fused=what, after=first)

    def second(y, x, ps, r):
        (dh,) = torch.autograd.grad(y.square().sum(), y.h, create_graph=True)
        return torch.autograd.grad(dh.square().sum(), [y.h, x, *ps], allow_unused=True)

    assert_as_stock(program, fused=what, after=second)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["hook", "retain_grad", "asked", "reader"])
@pytest.mark.parametrize("after", ["once", "twice"])
@pytest.mark.parametrize("counted", [False, True])
def test_the_activation_in_a_gate_is_seen_too(how, when, after, counted):
    """f(g), which the product no longer keeps; also where SavedBytes looks at what is kept."""

    def program(fc, x, seen):
        g, u = fc[0](x), fc[1](x)
        a = F.silu(g)

        def look():
            if how == "hook":
                a.register_hook(lambda grad: seen.append(grad.detach()) or grad.tanh())
            elif how == "retain_grad":
                a.retain_grad()
            return a.sin().sum() if how == "reader" else 0

        other = look() if when == "before" else 0
        with fastbp.SavedBytes() if counted else contextlib.nullcontext():
            h = a * u
            y = fc[2](h)
        y = y + (look() if when == "after" else other)
        if how != "hook":
            y.a = a
        return y

    def backward(y, x, parameters, result):
        wanted = [x, *parameters, *([y.a] if how in ("asked", "reader") else [])]
        found = torch.autograd.grad(y.square().sum(), wanted, create_graph=after == "twice", allow_unused=True)
        if after == "twice":
            squares = sum(g.square().sum() for g in found if g is not None)
            found = (*found, *torch.autograd.grad(squares, wanted, allow_unused=True))
        return [*found, *([y.a.grad] if how == "retain_grad" else [])]

    ours = assert_as_stock(program, fused="gated_act_linear, silu", after=backward)
    assert how != "hook" or len(ours.seen) == 1 + (after == "twice")


READERS = {
    "none": lambda fc, h: 0,
    "function": lambda fc, h: h.sin(),
    "fused": lambda fc, h: fc[3](h),
    "plain": lambda fc, h: F.linear(h, fc[3].weight),
}


@pytest.mark.parametrize("looks", ["hook", "asked", "nobody"])
@pytest.mark.parametrize("late", READERS)
@pytest.mark.parametrize("early", READERS)
def test_other_readers_of_h(maker, early, late, looks):
    """Whoever reads h, before and after: their gradients are summed before anybody sees them."""
    make, _ = maker

    def program(fc, x, seen):
        h = make(fc[0](x), fc[1](x))
        y = READERS[early](fc, h) + fc[2](h) + READERS[late](fc, h)
        if looks == "hook":
            h.register_hook(lambda g: seen.append(g.detach()) or g.tanh())
        if looks == "asked":
            y.h = h
        return y

    def backward(y, x, parameters, result):
        wanted = [x, *parameters, *([y.h] if looks == "asked" else [])]
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True, allow_unused=True)
        squares = sum(g.square().sum() for g in first if g is not None)
        return [*first, *torch.autograd.grad(squares, wanted, allow_unused=True)]

    ours = assert_as_stock(program, fused="", after=backward)
    assert len(ours.seen) == 2 * (looks == "hook")


def test_a_gate_that_was_read_before_keeps_its_product():
    """Its reader has an edge to the product's node: a hook on h put on another node would see a part."""
    read = {"read": True, "not read": False, "read without a graph": False}
    for how, expected in read.items():

        def program(fc, x, seen, how=how):
            h = F.silu(fc[0](x)) * fc[1](x)
            if how == "read":
                y = h.sin()
            with torch.no_grad():
                seen.append(h.abs().mean())
            return fc[2](h) + (y if how == "read" else h.detach())

        assert_as_stock(program, fused="linear of mul" if expected else "gated_act_linear")


def test_what_a_reader_before_kept_of_h_is_still_valid():
    """h becomes the output of another node, and its version stays."""

    def program(fc, x, seen):
        with torch.no_grad():
            other = torch.ones((), dtype=x.dtype)
        h = F.silu(fc[0](x)) * fc[1](x)
        version = h._version
        y = fc[2](h)
        assert h._version == version and h.requires_grad
        return y * other + fc[3](h)

    ours = assert_as_stock(program, fused="gated_act_linear")
    assert outcome(ours.linears[3]) == ("fused", "gated_act_linear, silu")


def test_dead_h_is_passed_by(monkeypatch):
    """Where nobody looks, the gradient goes from y to z, or to g and u, in one step."""
    monkeypatch.setattr(producers, "rebuild", None)
    from fastbp import rebuilt

    called = []
    monkeypatch.setattr(rebuilt, "_value_of", lambda *a: called.append(a))
    for maker, (make, what) in MAKERS.items():
        if maker != "dropout":
            assert_as_stock(lambda fc, x, seen, make=make: fc[2](make(fc[0](x), fc[1](x))), fused=what)
    assert not called


@pytest.mark.parametrize("gated", [False, True])
def test_nothing_goes_past_it(gated):
    """No zeros in place of the gradient of h, and what made h computes none of its own."""
    layers, x = [fastbp.Linear(WIDTH, WIDTH) for _ in range(3)], torch.randn(ROWS, WIDTH)
    with of_any_size():
        h = F.silu(layers[0](x))
        h = h * layers[1](x) if gated else h
        y = layers[2](h)
        del h
    dy = torch.ones_like(y)
    with torch.profiler.profile() as profile:
        y.backward(dy)
    count = Counter({event.key: event.count for event in profile.key_averages()})
    assert count["ActLinearBackward"] == 1
    assert count["aten::silu_backward"] <= 1 and not count["aten::zeros"] and not count["aten::zeros_like"]


def test_a_hook_on_an_activation_that_is_gone():
    """The product kept f(g), and with it goes the last that held it; its hook does not."""

    def program(fc, x, seen):
        a = F.silu(fc[0](x))
        a.register_hook(lambda g: seen.append(g.detach()) or g.tanh())
        h = a * fc[1](x)
        del a
        return fc[2](h)

    assert len(assert_as_stock(program, fused="gated_act_linear, silu").seen) == 1


def test_the_second_reader_of_a_gate_minds_its_activation():
    def program(fc, x, seen):
        a = F.silu(fc[0](x))
        h = a * fc[1](x)
        y = fc[2](h) + fc[3](h)
        a.register_hook(lambda g: seen.append(g.detach()) or g.tanh())
        return y

    assert len(assert_as_stock(program, fused="gated_act_linear, silu").seen) == 1
