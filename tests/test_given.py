"""Forms that are given z, or gate and up: what is kept of a call, by whom, and backward without its forward."""

import pytest
import torch
import torch.nn.functional as F
from support import FEW, call, cases, compressed_cases, each, eager, flatten, grads, like, saved_row, stock, tensors
from torch.profiler import ProfilerActivity, profile

import fastbp
from fastbp.activations import bind
from fastbp.backends import BACKENDS, native
from fastbp.forms import FORMS
from fastbp.problem import configure
from fastbp.residuals import kept_of_given
from fastbp.saving import find_kept

GIVEN = [form for form in FORMS.values() if form.given]
EXACT, COMPRESSED = cases(FEW, GIVEN), compressed_cases([bind("gelu"), bind("silu")], GIVEN)
BOTH = ["reference", pytest.param("native", marks=pytest.mark.skipif(native.unavailable is not None, reason="native"))]


@each(("form", "activation", "save"), EXACT)
def test_nothing_is_kept_beside_what_was_there(form, activation, save):
    """Under preact only the inputs, which the caller has; else the hidden layer's output alone, and no input."""
    x, weights, biases = tensors(form, torch.float32, seed=101)
    others, own = weights[: form.inputs - 1], weights[form.inputs - 1 :]
    inputs = [x, *others]
    with fastbp.SavedBytes(exclude=[*own, *(b for b in biases if b is not None)]) as kept:
        call(form, x, weights, biases, activation=activation, save=save)
    read = find_kept(form, save, activation.row.grad_reads_output, (True,) * (len(inputs) + 2))
    assert kept.total == 4 * x.numel() * (sum(read[: form.inputs]) + (save == "output"))
    assert sum(read[: form.inputs]) == (form.inputs if save == "preact" else 0)


@each("backend", BOTH)
@each(("form", "activation", "save"), [*EXACT, *COMPRESSED])
def test_backward_of_a_product_that_the_caller_made(form, activation, save, backend):
    """``F.linear`` of h, and backward from ``kept_of_given``: the gradients of the call itself."""
    dtype = torch.float32
    x, weights, biases = tensors(form, dtype, seed=102, rows=(3, 7))
    flat = flatten(x, weights, biases)
    inputs, (weight,), (bias,) = form.split([t.detach() for t in flat])
    config = configure(form.name, activation.name, activation.params, save, backend)
    y = call(form, x, weights, biases, activation=activation, save=save, backend=backend)
    dy = like(y, 103)
    expected = grads(y, flat, dy)

    h = config.value(inputs[0]) * inputs[1] if form.gated else config.value(inputs[0])
    kept = kept_of_given(config, inputs, h)
    if save == "output":
        assert kept[0] is h, "made again"
    made = kept[0] if save == "output_lsb" else h
    torch.testing.assert_close(F.linear(made, weight, bias), y, rtol=1e-5, atol=1e-5)
    needs = (True,) * len(flat)
    read = find_kept(form, save, activation.row.grad_reads_output, needs)
    saved = saved_row(form, [*inputs, weight, bias], None, kept)
    saved = [t if k else None for t, k in zip(saved, read, strict=True)]
    for mine, theirs in zip(BACKENDS[backend].backward(config, dy, saved, needs, False), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)  # codes differ where f is rounded otherwise


@each(("form", "activation", "save"), COMPRESSED)
def test_a_second_derivative_takes_what_the_policy_dropped(form, activation, save):
    inputs = tensors(form, torch.float32, seed=104)
    y = call(form, *inputs, activation=activation, save=save)
    words = rf"^fastbp\.{form.name}: .* \(create_graph=True\) takes .* was not kept.*use save='preact'$"
    with pytest.raises(RuntimeError, match=words):
        torch.autograd.grad(y.sum(), inputs[0], create_graph=True)


@pytest.mark.skipif(native.unavailable is not None, reason="native")
@each("route", ["library"], indirect=True)
@each("form", GIVEN)
def test_dz_of_what_is_given_goes_over_dh(form, route):
    """So backward makes nothing of that size but what it returns, and h where the weight's gradient takes it."""
    x, weights, biases = tensors(form, torch.float32, seed=108, rows=64, requires_grad=False)
    flat = flatten(x, weights, biases)
    config = configure(form.name, "gelu", (), "preact", "native")
    (y,) = native.forward(config, x, flat[1:])
    for some in range(1, 2**form.inputs):
        for weight in (False, True):
            needs = (*(bool(some >> i & 1) for i in range(form.inputs)), weight, False)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
                native.backward(config, y, saved_row(form, flat, None, []), needs)
            made = [e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
            assert made.count(x.nbytes) == sum(needs[: form.inputs]) + weight


@each("form", GIVEN)
@each("backend", BOTH)
def test_what_is_given_is_left_as_it_was(form, backend, monkeypatch):
    """A packed tensor cut in two, one number in many places: nothing is written over, whoever lets go of the inputs."""
    monkeypatch.setattr("fastbp.autograd._WORTH_ASKING", 1)
    activation = bind("silu")
    _, weights, biases = tensors(form, torch.float32, seed=105)
    own, n = weights[form.inputs - 1 :], weights[-1].shape[1]
    packed = like(torch.empty(64, 2 * n), 106).requires_grad_()
    row = like(torch.empty(n), 107).requires_grad_()
    for make in (lambda: packed.chunk(2, -1)[::-1], lambda: (row.expand(64, n), row.expand(64, n) * 1)):
        leaves = [t for t in (packed, row) if make()[0].grad_fn is not None]
        results = []
        for function in (call, eager):
            given = make()[: form.inputs]
            options = {"activation": activation, "backend": backend} if function is call else {}
            last = () if function is call else (stock(activation),)
            y = function(form, given[0], [*given[1:], *own], biases, *last, **options)
            del given
            results.append(torch.autograd.grad(y.square().sum(), [*leaves, *own], allow_unused=True))
        for mine, theirs in zip(*results, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
