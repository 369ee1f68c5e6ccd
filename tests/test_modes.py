"""Modes and counters of PyTorch's around calls with real tensors: they go through the native ops as through its own."""

import subprocess
import sys

import pytest
import support
import torch
from graphs import GELU, IDENTITY, TANH, draw, each_form, run
from support import assert_close, call, compressed_cases, each, eager, flatten, like, settings, unflatten
from torch._subclasses import CrossRefFakeMode, FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fastbp
from fastbp.activations import bind
from fastbp.backends import native, with_choice
from fastbp.backends.measured import Choice
from fastbp.forms import FORMS
from fastbp.problem import DTYPES, Problem, configure
from fastbp.saving import POLICIES, exact_policies, leanest

needs_native = pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}")
NATIVE = (
    [] if native.unavailable else [torch.ops.fastbp_native.forward.default, torch.ops.fastbp_native.backward.default]
)

CASES = [(form, *case) for form in FORMS.values() for case in settings([TANH, GELU, IDENTITY], form)]
COMPRESSED = compressed_cases([GELU])
each_case = each(("form", "activation", "save"), [*CASES, *COMPRESSED])


def dtype_of(save):
    return torch.float32 if POLICIES[save].compressed else torch.float64


def results(form, tensors, **settings):
    return run(lambda *t: call(form, *t, **settings), tensors)


def checked(form, tensors, **settings):
    """Output and gradients of a native call that PyTorch compares with its fakes, op by op, and those without."""
    seen = []
    expected = results(form, tensors, backend="native", **settings)
    with CrossRefFakeMode(ignore_op_fn=lambda op: bool(seen.append(op))):
        found = results(form, tensors, backend="native", **settings)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None and theirs is None) or (torch.equal(mine, theirs) and mine.stride() == theirs.stride())
    return seen


@needs_native
@each_case
@each("rows", [4, (), (2, 3), 0, (2, 0, 3), 1])
def test_fakes_of_the_native_ops(form, activation, save, rows):
    seen = checked(form, draw(form, rows, dtype=dtype_of(save)), activation=activation, save=save)
    assert set(NATIVE) <= set(seen)


@needs_native
@each_form
@each("dtype", DTYPES)
@each("bias", [True, False])
def test_fakes_in_every_dtype(form, dtype, bias):
    checked(form, draw(form, dtype=dtype, bias=bias), activation=GELU)


@needs_native
@each_case
def test_fakes_where_some_gradients_are_needed(form, activation, save):
    """Each input alone, and all but each: what backward does not read is absent."""
    tensors = draw(form, dtype=dtype_of(save))
    inputs = flatten(*tensors)
    for chosen in inputs:
        for alone in (True, False):
            for t in inputs:
                t.requires_grad_((t is chosen) == alone)
            assert NATIVE[0] in checked(form, tensors, activation=activation, save=save)


@needs_native
@each(("form", "save"), [(form, save) for form in FORMS.values() for save in exact_policies(TANH, form)])
@each("rows", [1, 5, (2, 3), 0])
def test_fakes_of_gradients_that_lie_as_weights_of_in_by_out(form, save, rows):
    """All of them, and each alone."""
    x, weights, biases = draw(form, rows)
    for which in (set(range(len(weights))), *({i} for i in range(len(weights)))):
        turned = [w.detach().mT.contiguous().mT.requires_grad_() if i in which else w for i, w in enumerate(weights)]
        checked(form, (x, turned, biases), activation=TANH, save=save)


@needs_native
@each_form
@each("size", [(1, 1, 1, 1), (3, 1, 2, 1), (0, 2, 2, 3), (3, 0, 0, 2)])
def test_fakes_of_calls_that_look_like_absent_tensors(form, size):
    """A tensor of one number, as the one that stands for none; and of no number."""
    for rows in (2, (), 1):
        tensors = support.tensors(form, torch.float32, seed=1, rows=rows, features=size)
        checked(form, tensors, activation=GELU)
        tensors[0].requires_grad_(False)
        checked(form, tensors, activation=GELU)


@needs_native
@each_form
@each("rows", [1, 4])
@each("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_way_to_compute_that_is_asked_for(form, rows, dtype):
    """Only some of the ways let gradients lie as weights of (in, out) do."""
    inputs, weights, biases = form.split(flatten(*draw(form, rows, dtype=dtype, requires_grad=False)))
    parameters = (*(w.mT.contiguous().mT for w in weights), *biases)
    config = configure(form.name, "gelu", (), leanest(form), "native")
    for route in ("", *native.routes(Problem(config, inputs[0].device, dtype), rows)):
        config = with_choice(config, Choice("native", route))
        with CrossRefFakeMode():
            (y,) = native.forward(config, inputs[0], (*inputs[1:], *parameters))
            saved = (*inputs, None, *parameters)
            native.backward(config, like(y, 2), saved, (True,) * (len(inputs) + len(parameters)))


@each_form
def test_fake_tensors_of_real_inputs(form):
    """Where a FakeTensorMode takes real tensors for fake ones, a call makes fake tensors of the right kind."""
    tensors = draw(form, (2, 3))
    expected = results(form, tensors, activation=GELU)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = call(form, *tensors, activation=GELU)
        found = [y, *torch.autograd.grad(y, flatten(*tensors), torch.ones_like(y))]
    for fake, real in zip(found, expected, strict=True):
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@each_form
def test_wrong_calls_are_refused_by_the_fakes_too(form):
    x, weights, biases = draw(form)
    wrong = [
        (x[:, :-1], weights, biases),
        (x, [*weights[:-1], weights[-1][:, :-1]], biases),
        (x, weights, [*biases[:-1], biases[-1][:-1]]),
        (x, weights, [biases[0].float(), *biases[1:]]),
        (x.float(), weights, biases),
    ]
    for tensors in wrong:
        with pytest.raises((ValueError, TypeError), match=f"fastbp.{form.name}: ") as real:
            call(form, *tensors, activation=GELU)
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(real.type) as fake:
            call(form, *tensors, activation=GELU)
        assert str(fake.value) == str(real.value)


# Operations.


def flops(function, tensors):
    """Of forward, and of backward, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        y = function(*tensors)
    forward = counter.get_total_flops()
    inputs = [t for t in flatten(*tensors) if t is not None and t.requires_grad]
    with counter:
        torch.autograd.grad(y, inputs, torch.ones_like(y))
    return forward, counter.get_total_flops()


def of_fastbp(form, **settings):
    return lambda *tensors: call(form, *tensors, **settings)


def of_op(form, activation, save):
    """The op that graphs hold."""
    op = getattr(torch.ops.fastbp, form.name)

    def function(x, weights, biases):
        packed = [*weights, *biases] if form.parts else [weights, biases]
        return op(x, *packed, activation.name, list(activation.params), save, "auto")[0]

    return function


def on_meta(x, weights, biases):
    def moved(t):
        return None if t is None else t.detach().to("meta").requires_grad_(t.requires_grad)

    return moved(x), [moved(w) for w in weights], [moved(b) for b in biases]


def every_need(tensors):
    """Gradients of all, of each input alone, of all but each, set on the tensors one after another."""
    inputs = flatten(*tensors)
    for wanted in [set(range(len(inputs)))] + [{i} for i in range(len(inputs))]:
        for chosen in (wanted, set(range(len(inputs))) - wanted):
            if chosen:
                for i, t in enumerate(inputs):
                    t.requires_grad_(i in chosen)
                yield


@each_case
@each("rows", [4, (2, 3), ()])
def test_flops_are_those_of_pytorch_s_operations(form, activation, save, rows):
    """By the native ops, by the ops of graphs, on meta tensors: what the reference, made of aten's products, counts."""
    tensors = draw(form, rows, dtype=dtype_of(save))
    settings = dict(activation=activation, save=save)
    for _ in every_need(tensors):
        expected = flops(of_fastbp(form, **settings, backend="reference"), tensors)
        assert flops(of_fastbp(form, **settings), tensors) == expected
        assert flops(of_op(form, activation, save), tensors) == expected
        assert flops(of_fastbp(form, **settings), on_meta(*tensors)) == expected


@each_form
@each("activation", [TANH, GELU, bind("relu2")])
def test_flops_are_those_of_stock_modules(form, activation):
    """In total; and recompute's are one product more for each hidden linear."""
    tensors = draw(form, (2, 3))
    _, weights, _ = form.split(flatten(*tensors))
    for _ in every_need(tensors):
        expected = flops(lambda *t: eager(form, *t, activation), tensors)
        assert min(expected) > 0 or not any(w.requires_grad for w in weights)
        assert flops(of_fastbp(form, activation=activation), tensors) == expected
    if form.given:
        return
    again = sum(2 * 6 * w.numel() for w in weights[: form.hidden(len(weights)) * form.width])
    for t in flatten(*tensors):
        t.requires_grad_()
    forward, backward = flops(lambda *t: eager(form, *t, activation), tensors)
    assert flops(of_fastbp(form, activation=activation, save="recompute"), tensors) == (forward, backward + again)


def test_flops_of_a_model_by_module_and_without_gradients():
    stock = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 5))
    ours = torch.nn.Sequential(fastbp.LinearAct(6, 8), fastbp.MLP(8, 7, 5))
    x = torch.randn(3, 6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ours(x)
    counts = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    assert counts["Sequential.0"] == 2 * 3 * 6 * 8
    assert counts["Sequential.1"] == 2 * 3 * (8 * 7 + 7 * 5)
    assert counts["Global"] == counts["Sequential.0"] + counts["Sequential.1"]
    with FlopCounterMode(display=False) as counter:
        stock(x).sum().backward()
    expected = counter.get_total_flops()
    fastbp.fuse(stock)
    with counter:
        stock(x).sum().backward()
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("first", ["fastbp", "torch.utils.flop_counter"])
def test_the_counter_is_told_whenever_it_is_imported(first):
    """And is not imported for that; a second import of it, and reloading, change nothing."""
    program = f"""
import sys
import {first}
assert ("torch.utils.flop_counter" in sys.modules) == ({first!r} != "fastbp")
import fastbp, torch, importlib
finders = len(sys.meta_path)
import torch.utils.flop_counter as counter
assert not any(getattr(finder, "name", "") == "torch.utils.flop_counter" for finder in sys.meta_path)
print(sorted(str(op) for op in counter.flop_registry if str(op).startswith("fastbp")))
with counter.FlopCounterMode(display=False) as mode:
    fastbp.linear_act(torch.randn(2, 3), torch.randn(4, 3))
print(mode.get_total_flops())
"""
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert outcome.returncode == 0, outcome.stderr
    names, count = outcome.stdout.strip().splitlines()
    expected = [f"fastbp.{form}{end}" for form in FORMS for end in ("", "_backward")]
    expected += [] if native.unavailable else ["fastbp_native.forward", "fastbp_native.backward"]
    assert names == str(sorted(expected))
    assert int(count) == 2 * 2 * 3 * 4


# What records a program.


@each(
    ("form", "activation", "save", "traced"),
    [(*case, "forward") for case in [*CASES, *COMPRESSED]] + [(*case, "step") for case in CASES if case[1] is TANH],
)
def test_make_fx_of_real_tensors_records_pytorch_s_operations(form, activation, save, traced):
    """What is recorded has derivatives and needs no fastbp; x, or a weight, alone may take a gradient."""
    dtype = dtype_of(save)

    def forward(*inputs):
        return call(form, *unflatten(form, inputs), activation=activation, save=save)

    def step(*inputs):
        y = forward(*inputs)
        return y, *torch.autograd.grad(y.square().sum(), [t for t in inputs if t.requires_grad])

    inputs, others = (flatten(*draw(form, (2, 3), seed=seed, dtype=dtype)) for seed in (0, 5))
    exact = dtype == torch.float64
    close = {"rtol": 1e-12, "atol": 1e-12} if exact else {"rtol": 2e-2, "atol": 2e-2}  # bits of slopes may flip
    for frozen in ((), (0,)):
        for i, (t, other) in enumerate(zip(inputs, others, strict=True)):
            t.requires_grad_(i not in frozen), other.requires_grad_(i not in frozen)
        graph = make_fx(forward if traced == "forward" else step)(*inputs)
        called = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        assert called and all(op.namespace in ("aten", "prims") for op in called)
        expected = step(*others)
        if traced == "forward":
            y = graph(*others)
            found = [y, *torch.autograd.grad(y.square().sum(), [t for t in others if t.requires_grad])]
        else:
            found = graph(*others)
        compared = zip(found, expected, strict=True) if exact else [(found[0], expected[0])]
        for mine, theirs in compared:
            torch.testing.assert_close(mine, theirs, **close)


@each_form
@each("activation", [GELU, TANH])
def test_functionalize(form, activation):
    """And what it records of a gradient."""
    inputs = flatten(*draw(form))

    def f(x):
        return call(form, *unflatten(form, [x, *inputs[1:]]), activation=activation)

    x = inputs[0].detach()
    assert_close(torch.func.functionalize(f)(x), f(x))
    gradient = torch.func.grad(lambda x: f(x).square().sum())
    assert_close(torch.func.functionalize(gradient)(x), gradient(x))
    graph = make_fx(torch.func.functionalize(gradient))(x)
    assert_close(graph(x + 1), gradient(x + 1))
