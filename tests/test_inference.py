"""inference_mode, what is made in it, and gradients switched on within it: what plain PyTorch does there."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from graphs import GELU, compiled, draw, each_form
from module_pairs import PAIRS, K
from support import assert_close, call, each, eager, flatten, like, on_flat
from torch import nn

import fastbp
from fastbp.backends import available_backends
from fastbp.forms import FORMS
from fastbp.linear import OUTCOME, of_any_size
from fastbp.saving import exact_policies

CASES = [(form, save) for form in FORMS.values() for save in exact_policies(GELU, form)]
each_backend = each("backend", [name for name in ("native", "reference") if available_backends()[name] == "available"])


def outcome(function):
    """What a call gives: numbers and what autograd may do with them; or the error it raises."""
    try:
        found = function()
    except RuntimeError as error:
        return type(error), str(error)
    found = found if isinstance(found, (tuple, list)) else [found]
    return [(y.detach().clone(), y.requires_grad, y.is_inference(), y.grad_fn is None) for y in found]


def assert_same(mine, theirs):
    if isinstance(theirs, tuple):
        assert mine == theirs
        return
    assert isinstance(mine, list), mine
    for (y, *kind), (expected, *its_kind) in zip(mine, theirs, strict=True):
        assert kind == its_kind
        with torch.inference_mode(False):
            assert_close(y, expected)


def recorded(f, *inputs):
    """Output, and the gradient where there is one."""
    y = f(*inputs)
    leaves = [t for t in inputs if t.requires_grad]
    return [y, *torch.autograd.grad(y.sum(), leaves)] if y.requires_grad else y


def both(form, save, backend):
    mine = on_flat(call, form, activation=GELU, save=save, backend=backend)
    return mine, on_flat(eager, form, activation=GELU)


WITHIN = {
    "inference": [torch.inference_mode],
    "gradients on in inference": [torch.inference_mode, torch.enable_grad],
    "gradients off and on in inference": [torch.inference_mode, torch.no_grad, torch.enable_grad],
    "inference in gradients": [torch.enable_grad, torch.inference_mode],
    "inference left again": [torch.inference_mode, lambda: torch.inference_mode(False)],
    "inference left with gradients off": [torch.inference_mode, lambda: torch.inference_mode(False), torch.no_grad],
}


def within(modes, function, *args):
    if not modes:
        return function(*args)
    with modes[0]():
        return within(modes[1:], function, *args)


@each(("form", "save"), CASES)
@each_backend
@pytest.mark.parametrize("modes", WITHIN)
def test_a_call_within(form, backend, save, modes):
    inputs = flatten(*draw(form))
    mine, theirs = (outcome(lambda f=f: within(WITHIN[modes], recorded, f, *inputs)) for f in both(form, save, backend))
    assert isinstance(theirs, list)
    assert_same(mine, theirs)


@each_form
@each_backend
@each("frozen", [False, True])
def test_tensors_made_in_inference_mode_used_later(form, backend, frozen):
    """Any one of them, or all: what cannot be kept for backward raises as in PyTorch, and the rest computes."""
    tensors = flatten(*draw(form))
    raised = 0
    for which in [*({i} for i in range(len(tensors))), set(range(len(tensors)))]:
        with torch.inference_mode():
            made = {i: tensors[i].clone() for i in which}
        inputs = [made.get(i, t) for i, t in enumerate(tensors)]
        if frozen:
            inputs = [t if t.is_inference() else t.detach() for t in inputs]
        for mode in (torch.enable_grad, torch.no_grad):
            mine, theirs = (
                outcome(lambda f=f: within([mode], recorded, f, *inputs))  # noqa: B023
                for f in both(form, "preact", backend)
            )
            assert_same(mine, theirs)
            raised += isinstance(theirs, tuple)
    assert raised or frozen


TRANSFORMS = {
    "grad": lambda f, x, *rest: torch.func.grad(lambda x: f(x, *rest).sum())(x),
    "jvp": lambda f, x, *rest: torch.func.jvp(lambda x: f(x, *rest), (x,), (x.detach() * 2,)),
    "vmap": lambda f, *flat: torch.vmap(f, tuple(0 if i < f.inputs else None for i in range(len(flat))))(*flat),
    "jvp of jvp": lambda f, x, *rest: torch.func.jvp(
        lambda v: torch.func.jvp(lambda x: f(x, *rest), (x,), (v,))[1], (x.detach(),), (x.detach() * 2,)
    ),
}


@each_form
@each_backend
@pytest.mark.parametrize("transform", TRANSFORMS)
@each("made_in_inference", [True, False])
@each("mode", [torch.inference_mode, torch.no_grad])
def test_transforms_within(form, backend, transform, made_in_inference, mode):
    x, *rest = flatten(*draw(form))
    x = x.detach()
    if made_in_inference:
        with torch.inference_mode():
            x = x.clone()
    run = TRANSFORMS[transform]
    mine, theirs = (outcome(lambda f=f: within([mode], run, f, x, *rest)) for f in both(form, "preact", backend))
    assert_same(mine, theirs)


@each_form
def test_dual_numbers_within(form):
    x, *rest = flatten(*draw(form, requires_grad=False))

    def tangent(f):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x + 1), *rest)).tangent

    for modes in ([torch.no_grad], [torch.enable_grad], [torch.inference_mode, torch.enable_grad]):
        mine, theirs = (within(modes, tangent, f) for f in both(form, "preact", None))
        assert (mine is None) == (theirs is None) == (torch.inference_mode in modes)
        if theirs is not None:
            assert_close(mine, theirs)


@each_form
@each_backend
@each("create_graph", [False, True])
@each("inside", [False, True])
def test_backward_of_a_gradient_made_in_inference_mode(form, backend, create_graph, inside):
    inputs = flatten(*draw(form))

    def gradients(f):
        y = f(*inputs)
        with torch.inference_mode():
            dy = torch.ones_like(y)
        with torch.inference_mode(inside):
            return torch.autograd.grad(y, inputs, dy, create_graph=create_graph)

    mine, theirs = (outcome(lambda f=f: gradients(f)) for f in both(form, "preact", backend))
    assert_same(mine, theirs)


@pytest.mark.parametrize("name", PAIRS)
@each("autocast", [False, True])
def test_modules_within(name, autocast):
    """Twice in a region, then in training: a cast of inference mode serves no gradient."""
    ours, stock = PAIRS[name][0](), PAIRS[name][1]()
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(2))

    def steps(module):
        with torch.autocast("cpu", enabled=autocast):
            with torch.inference_mode(), torch.enable_grad():
                first = [module(x), module(x)]
            assert all(y.is_inference() and not y.requires_grad for y in first)
            loss = module(x).float().square().sum()
        loss.backward()
        return [*first, *(p.grad for p in module.parameters())]

    for mine, theirs in zip(steps(ours), steps(stock), strict=True):
        assert mine.dtype == theirs.dtype
        spare = 2e-2 if autocast else 1e-5
        assert (mine.float() - theirs.float()).norm() <= spare * theirs.float().norm()


MADE = {"activation": lambda z, u: F.gelu(z), "product": lambda z, u: F.silu(z) * u}


def two_linears():
    """Ours and PyTorch's, with the same parameters."""
    ours, stock = fastbp.Linear(8, 5, dtype=torch.float64), nn.Linear(8, 5, dtype=torch.float64)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


@pytest.mark.parametrize("modes", WITHIN)
@pytest.mark.parametrize("made", MADE)
@each("frozen", [False, True])
def test_a_linear_that_reads_its_input_within(modes, made, frozen):
    """The input was made outside, and its own graph goes on to be what it was."""
    ours, stock = two_linears()
    read = []

    def step(linear):
        linear.requires_grad_(not frozen)
        z, u = (like(torch.empty(4, 8, dtype=torch.float64), seed).requires_grad_() for seed in (1, 2))
        h = MADE[made](z, u)
        with of_any_size():
            found = within(WITHIN[modes], recorded, lambda h, *_: linear(h), h, *linear.parameters())
        read.append(linear.__dict__.get(OUTCOME) is not None)
        found = found if isinstance(found, list) else [found]
        return [*found, *torch.autograd.grad(h.sum(), [z, u][: 1 + (made == "product")])]

    mine, theirs = outcome(lambda: step(ours)), outcome(lambda: step(stock))
    assert isinstance(theirs, list)
    assert_same(mine, theirs)
    records = modes == "inference left again"
    assert len(theirs) == 2 + records * (3 - 2 * frozen) + (made == "product")
    assert read[0] == (records and (made == "product" or not frozen))


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_linear_whose_parameter_was_made_in_inference_mode(made, which):
    def step(linear):
        z, u = (like(torch.empty(4, 8, dtype=torch.float64), seed).requires_grad_() for seed in (1, 2))
        with torch.inference_mode():
            setattr(linear, which, nn.Parameter(getattr(linear, which).clone(), requires_grad=False))
        with of_any_size():
            y = linear(MADE[made](z, u))
        return [y, *torch.autograd.grad(y.sum(), [z, *(p for p in linear.parameters() if p.requires_grad)])]

    ours, stock = two_linears()
    mine, theirs = outcome(lambda: step(ours)), outcome(lambda: step(stock))
    assert isinstance(theirs, tuple) == (which == "weight")
    assert_same(mine, theirs)


def test_no_gradient_is_accumulated_within():
    x, weight, bias = flatten(*draw(fastbp.forms.LINEAR_ACT, dtype=torch.float32))
    weight.main_grad = torch.zeros_like(weight)
    with torch.inference_mode(), torch.enable_grad():
        y = fastbp.linear_act(x, weight, bias, gradient_accumulation_fusion=True)
    assert y.is_inference() and not y.requires_grad and not weight.main_grad.any()


@pytest.mark.usefixtures("fresh_dynamo")
@each_form
def test_compiled_code_within(form):
    x, *rest = flatten(*draw(form))
    mine, theirs = both(form, "auto", None)

    def within_graph(*inputs):
        with torch.inference_mode(), torch.enable_grad():
            return mine(*inputs)

    found, expected = compiled(within_graph)(x, *rest), within([torch.inference_mode], theirs, x, *rest)
    assert not found.requires_grad
    with torch.inference_mode():
        assert_close(found.clone(), expected)
