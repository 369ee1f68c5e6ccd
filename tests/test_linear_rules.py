"""fastbp.Linear: what changes in between is not read, and graphs may be used again."""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from linear_twins import MAKERS, ROWS, WIDTH, assert_as_stock, assert_close, assert_equal, outcome, run, twice
from torch import Tensor, nn

import fastbp
from fastbp.linear import of_any_size


@pytest.fixture(params=MAKERS)
def maker(request):
    return MAKERS[request.param]


WRITES = {
    "h before": lambda h: h.mul_(0.5),
    "h through a view": lambda h: h[0].zero_(),
    "h through another name": lambda h: h.detach().mul_(0.5),
}


@pytest.mark.parametrize("write", WRITES)
def test_h_written_in_place_before(maker, write):
    make, _ = maker

    def program(fc, x, seen):
        g = fc[0](x)
        h = make(g, fc[1](x))
        WRITES[write](h)
        return fc[2](h)

    ours = run(fastbp.Linear, program, after=lambda *a: [])
    stock = run(nn.Linear, program, after=lambda *a: [])
    assert_equal([ours.y], [stock.y])
    assert outcome(ours.linears[2])[0] != "fused"
    for result in (stock, ours):  # PyTorch's own answer, be it a gradient or a refusal
        try:
            result.grads = torch.autograd.grad(result.y.square().sum(), [result.x, result.linears[2].weight])
        except RuntimeError as error:
            result.grads = [torch.tensor(float("modified by an inplace operation" in str(error)))]
    assert_close(ours.grads, stock.grads, 1e-10)


def test_in_place_activations():
    left = "its input was written to in place"
    assert_as_stock(lambda fc, x, seen: fc[2](F.silu(fc[0](x) * 1.0, inplace=True)), left=left)


def test_z_written_in_place_before():
    """PyTorch raises in backward, if that comes there; the linear's own gradient does not ask for z."""
    for make, _ in list(MAKERS.values())[:2]:

        def program(fc, x, seen, make=make):
            g = fc[0](x) * 1.0
            h = make(g, fc[1](x))
            g.add_(1.0)
            return fc[2](h)

        def backward(y, x, ps, result):
            return torch.autograd.grad(y.square().sum(), result.linears[2].weight)

        assert_as_stock(program, left="written to in place", after=backward)


@pytest.mark.parametrize("what", ["z", "weight", "h"])
def test_written_in_place_after(maker, what):
    """Raises as PyTorch does; but h is not kept, so writing to it does no harm: the gradient is that of before."""
    make, _ = maker

    def program(fc, x, seen):
        g = fc[0](x) * 1.0
        h = make(g, fc[1](x))
        y = fc[2](h)
        with torch.no_grad():
            {"z": g, "weight": fc[2].weight, "h": h}[what].add_(1.0)
        return y

    def attempt(kind):
        result = run(kind, program, after=lambda *a: [])
        wanted = [result.x, *(p for linear in result.linears[:3] for p in linear.parameters())]
        return torch.autograd.grad(result.y.square().sum(), wanted, allow_unused=True)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        attempt(nn.Linear)
    if what == "h":
        clean = run(fastbp.Linear, lambda fc, x, seen: fc[2](make(fc[0](x) * 1.0, fc[1](x))))
        assert_close(attempt(fastbp.Linear)[:2], clean.grads[:2], 1e-10)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            attempt(fastbp.Linear)


@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (1, ROWS, WIDTH)], ids=str)
def test_y_may_be_written_to(maker, shape):
    """Of three dimensions it is a view of a product, which autograd must not know."""
    make, what = maker

    def program(fc, x, seen):
        x = x.view(shape)
        y = fc[2](make(fc[0](x), fc[1](x)))
        y += x
        y[0].mul_(2.0)
        y.relu_()
        return y

    assert_as_stock(program, fused=what)


def test_two_backwards_over_one_graph_have_equal_bits(maker):
    """And the same sum as PyTorch's where gradients accumulate."""
    make, what = maker

    def backward(y, x, parameters, result):
        loss = y.square().sum()
        loss.backward(retain_graph=True)
        of = [p for p in (x, *parameters) if p.grad is not None]
        first = [p.grad.clone() for p in of]
        loss.backward(retain_graph=True)
        both = [p.grad.clone() for p in of]
        assert_equal(both, [2 * g for g in first])
        return both

    assert_as_stock(lambda fc, x, seen: fc[2](make(fc[0](x), fc[1](x))), fused=what, after=backward, rows=300, width=64)


def test_a_freed_graph_is_refused(maker):
    make, _ = maker
    result = run(fastbp.Linear, lambda fc, x, seen: fc[2](make(fc[0](x), fc[1](x))))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(result.y.sum(), result.x)


@pytest.mark.parametrize("after", ["once", "twice"])
def test_a_shared_weight(maker, after):
    make, what = maker

    def program(fc, x, seen):
        y = fc[2](make(fc[0](x), fc[1](x)))
        return fc[2](make(y, fc[1](y)))

    assert_as_stock(program, fused=what, **({"after": twice} if after == "twice" else {}))


def test_gradients_that_do_not_come(maker):
    """A branch that is not used, and a y whose gradient is None."""
    make, _ = maker

    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y * 1.0

        @staticmethod
        def backward(ctx, grad):
            return None

    def program(fc, x, seen):
        h = make(fc[0](x), fc[1](x))
        return Drop.apply(fc[2](h)) + fc[0](x) + h * 0

    ours = run(fastbp.Linear, program)
    stock = run(nn.Linear, program)
    assert_equal([ours.y], [stock.y])
    assert_close(ours.grads, stock.grads, 1e-10)


def test_a_strangers_function_is_not_taken_for_ours():
    """By its name: what the node is of is compared as well."""

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.config = None
            ctx.save_for_backward(a)
            return a.exp()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0].exp()

    def program(fc, x, seen):
        h = Made.apply(fc[0](x))
        assert type(h.grad_fn).__name__ == "MadeBackward"
        return fc[2](h)

    assert_as_stock(program)


def test_h_made_under_a_graph_and_read_without_one(maker):
    """What made h is not touched by a linear that has no gradient."""
    make, what = maker

    def program(fc, x, seen):
        h = make(fc[0](x), fc[1](x))
        with torch.no_grad():
            y = fc[2](h)
        assert not y.requires_grad and outcome(fc[2]) == ("", "")
        seen.append(y)
        return fc[2](h)

    assert_as_stock(program, fused=what)


def test_of_any_size_is_of_one_thread():
    layer, found = fastbp.Linear(WIDTH, WIDTH), []

    def other():
        layer(F.silu(torch.randn(ROWS, WIDTH, requires_grad=True)))
        found.append(outcome(layer)[0])

    with of_any_size():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == ["left"]


@pytest.mark.parametrize("policy", ["auto", "fp8"])
def test_nothing_is_held_longer_than_the_graph(policy):
    """Neither h nor codes of it: what backward has read is free, though y lives."""
    layers = [fastbp.Linear(32, 32) for _ in range(3)]
    x = torch.randn(64, 32, requires_grad=True)
    with fastbp.use(save=policy), of_any_size():
        g, u = layers[0](x), layers[1](x)
        h = F.silu(g) * u
        y = layers[2](h)
    held = [weakref.ref(t) for t in (g, u, h)]
    sizes = []

    def count() -> int:
        return sum(type(o) is Tensor and o.numel() >= 1024 and o is not x for o in gc.get_objects())

    del h
    assert held[2]() is None
    sizes.append(count())
    y.sum().backward()
    del g, u
    gc.collect()
    assert [ref() for ref in held] == [None] * 3
    assert count() < sizes[0]
