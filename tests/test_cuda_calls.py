"""Calls of the CUDA kernels, csrc/cuda/calls.cpp and layers.cpp, with the host in the GPU's place (cuda_standin.cpp).

What is launched, on which tensors, and what PyTorch computes itself: all but the kernels.
"""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from standin import VIEWS
from support import FEW, assert_accurate, call, cases, each, eager, flatten, grads, like, stock, tensors, unflatten

from fastbp.activations import bind
from fastbp.autograd import run
from fastbp.backends import native
from fastbp.forms import FORMS, LINEAR_ACT, MLP
from fastbp.problem import DTYPES, configure

pytestmark = pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}")
SIXTEEN = [dtype for dtype in DTYPES if dtype.itemsize == 2]
GELU = bind("gelu")
each_way = each(("dtype", "route"), [*((d, "library") for d in DTYPES), *((d, "fused") for d in SIXTEEN)])
accurate = functools.partial(assert_accurate, backend="native")


@each_way
@each("bias", [True, False])
@each(("form", "activation", "save"), cases(FEW))
def test_values_and_gradients(on_gpu, form, activation, save, bias, dtype, route):
    on_gpu(route)
    accurate(form, activation, save, tensors(form, dtype, seed=91, bias=bias))


@each("dtype", DTYPES)
def test_the_fused_route_fuses(on_gpu, standin, dtype):
    """Forward and backward of each layer below the last product, and nothing on the other route.

    Products of float32 stay PyTorch's, which obey its TF32 switch.
    """
    inputs = flatten(*tensors(MLP, dtype, seed=92))
    counts = []
    for route in ("library", "fused"):
        on_gpu(route)
        before = standin.fused_products()
        y = call(MLP, inputs[0], inputs[1:4], inputs[4:], activation=GELU, backend="native")
        grads(y, inputs, like(y, 93))
        counts.append(standin.fused_products() - before)
    assert counts == [0, 4 if dtype in SIXTEEN else 0]


def test_a_call_may_ask_for_its_route(on_gpu, standin, monkeypatch):
    """By its config, beside others; what is forced on every call goes before, and no other number is a route."""
    monkeypatch.setattr(native.library, "cpu_routes", lambda: native.CUDA_ROUTES)  # the tensors are on the CPU
    native.library.codes.cache_clear()
    inputs = flatten(*tensors(MLP, torch.bfloat16, seed=92))
    plain = configure("mlp", "gelu", (), "preact", "native")

    def fused(config):
        before = standin.fused_products()
        y = run(config, inputs[0], inputs[1:4], inputs[4:], tuple(inputs[1:]))
        grads(y, inputs, like(y, 93))
        return standin.fused_products() - before

    asking = {route: replace(plain, route=route) for route in native.CUDA_ROUTES}
    assert [fused(config) for config in (plain, asking["library"], asking["fused"], plain)] == [0, 0, 4, 0]
    on_gpu("library")
    assert fused(asking["fused"]) == 0
    on_gpu("")
    monkeypatch.setattr(native.library, "CUDA_ROUTES", (*native.CUDA_ROUTES, "another"))
    monkeypatch.setattr(native.library, "cpu_routes", lambda: native.library.CUDA_ROUTES)
    with pytest.raises(RuntimeError, match="no such route on a GPU"):
        fused(replace(plain, route="another"))
    native.library.codes.cache_clear()


@each(("dtype", "route"), [(torch.float32, "library"), (torch.float16, "library"), (torch.float16, "fused")])
@each("save", ["preact", "output", "recompute"])
@each("form", FORMS.values())
def test_every_choice_of_what_is_needed(on_gpu, form, save, dtype, route):
    """Every set of inputs that take a gradient: each gradient as if all were asked for, and no other."""
    on_gpu(route)
    activation = bind("tanh") if save == "output" else GELU
    if (form, activation, save) not in cases([activation]):
        pytest.skip(f"{save} does not serve {form.name}")
    inputs = flatten(*tensors(form, dtype, seed=94))

    def step(needs):
        given = [t.detach().requires_grad_(need) for t, need in zip(inputs, needs, strict=True)]
        y = call(form, *unflatten(form, given), activation=activation, save=save, backend="native")
        return grads(y, [t for t, need in zip(given, needs, strict=True) if need], like(y, 95))

    complete = step([True] * len(inputs))
    for needs in itertools.product([False, True], repeat=len(inputs)):
        if any(needs):
            expected = [g for g, need in zip(complete, needs, strict=True) if need]
            for got, want in zip(step(needs), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@each("dtype", SIXTEEN)
@each("activation", [bind("gelu_tanh"), GELU])
@each(("form", "save"), [(form, save) for form, _, save in cases([GELU])])
def test_epilogues_of_the_library(on_gpu, form, activation, save, dtype):
    """Where cuBLASLt has one, where it has none, and where it turns out not to know a product (one in three)."""
    on_gpu("cublaslt")
    for rows in ((2, 3, 5), (41,), (7, 2)):
        accurate(form, activation, save, tensors(form, dtype, seed=90, rows=rows))


@each(("dtype", "route"), [(torch.float64, "library"), (torch.bfloat16, "library"), (torch.bfloat16, "fused")])
@each("view", VIEWS)
@each("form", FORMS.values())
def test_strides(on_gpu, form, view, dtype, route):
    def viewed(tensor):
        return VIEWS[view](tensor.detach()).requires_grad_()

    on_gpu(route)
    x, weights, biases = tensors(form, dtype, seed=96)
    strided = viewed(x), [viewed(w) for w in weights], [viewed(b) for b in biases]
    accurate(form, GELU, "preact", strided, view=lambda dy: viewed(dy).detach())


@each_way
@each("form", FORMS.values())
def test_two_backward_calls_and_the_last_one(on_gpu, form, dtype, route):
    """With the graph kept nothing saved is written over; the last call may, and finds the same."""
    on_gpu(route)
    inputs = flatten(*tensors(form, dtype, seed=97, rows=(64, 16)))
    y = call(form, *unflatten(form, inputs), activation=GELU, save="preact", backend="native")
    dy = like(y, 98)
    first, second, last = (torch.autograd.grad(y, inputs, dy, retain_graph=keep) for keep in (True, True, False))
    for a, b, c in zip(first, second, last, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@each_way
@each("empty", ["rows", "in", "hidden", "out"])
@each("form", FORMS.values())
def test_sizes_of_zero(on_gpu, form, empty, dtype, route):
    on_gpu(route)
    features = [0 if empty == name else 5 for name in ("in", "hidden", "hidden", "out")]
    given = tensors(form, dtype, seed=99, rows=0 if empty == "rows" else 3, features=tuple(features))
    inputs = flatten(*given)
    y = call(form, *unflatten(form, inputs), activation=GELU, backend="native")
    expected = eager(form, *given, stock(GELU))
    near = dict(
        rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
    )  # where no size is 0: no "in" is given
    torch.testing.assert_close(y, expected, **near)
    for got, want in zip(
        grads(y, inputs, torch.ones_like(y)), grads(expected, inputs, torch.ones_like(y)), strict=True
    ):
        torch.testing.assert_close(got, want, **near)


def test_a_route_that_is_not_there(on_gpu):
    with pytest.raises(RuntimeError, match="routes on a GPU are library, fused and cublaslt"):
        on_gpu("quick")


def test_wrong_tensors_are_refused(on_gpu):
    x, weights, biases = tensors(LINEAR_ACT, torch.float32, seed=90)
    with pytest.raises(ValueError, match=r"did you mean weight\.T"):
        call(LINEAR_ACT, x, [weights[0].detach().T], biases, activation=GELU, backend="native")
