"""Autocast, as F.linear behaves under it, eager and compiled."""

import pytest
import torch
import torch.nn.functional as F
from graphs import GELU, call_of, compiled, draw, each_form, run
from support import assert_close, each, flatten, like, unflatten
from torch import nn

import fastbp
from fastbp.forms import MLP

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

AUTOCAST = [torch.bfloat16, torch.float16]


@each_form
@each("dtype", AUTOCAST)
@each("how", ["eager", "compiled"])
def test_autocast_casts_inputs_and_returns_float32_gradients(form, dtype, how):
    call = call_of(form, activation=GELU)
    function = call if how == "eager" else compiled(call)
    tensors = draw(form, dtype=torch.float32)
    x, weights, biases = tensors
    with torch.autocast("cpu", dtype=dtype):
        assert F.linear(x, weights[form.inputs - 1], biases[0]).dtype == dtype
        y = function(*tensors)
    gradients = torch.autograd.grad(y, flatten(*tensors), like(y, seed=1))
    assert y.dtype == dtype
    assert [g.dtype for g in gradients] == [torch.float32] * len(gradients)

    narrow = [t.detach().to(dtype).requires_grad_() for t in flatten(*tensors)]
    expected = call(*unflatten(form, narrow))
    assert torch.equal(y, expected)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, narrow, like(y, seed=1)), strict=True):
        assert torch.equal(mine, theirs.float())


@each_form
@each("dtype", AUTOCAST)
@each("how", ["eager", "compiled"])
def test_autocast_off_inside_autocast(form, dtype, how):
    call = call_of(form, activation=GELU)

    def region(*tensors):
        with torch.autocast("cpu", enabled=False):
            return call(*tensors)

    tensors = draw(form, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y = (region if how == "eager" else compiled(region))(*tensors)
    assert y.dtype == torch.float32
    assert torch.equal(y, call(*tensors))


@each_form
@each("how", ["eager", "compiled"])
def test_autocast_leaves_float64_alone(form, how):
    call = call_of(form, activation=GELU)
    tensors = draw(form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(tensors[0], tensors[1][0]).dtype == torch.float64
        mine = run(call if how == "eager" else compiled(call), tensors)
    for found, expected in zip(mine, run(call, tensors), strict=True):
        assert found.dtype == torch.float64
        assert_close(found, expected)


@each_form
def test_autocast_takes_mixed_inputs(form):
    """A narrow x with float32 weights, which is what the layer before it hands over."""
    call = call_of(form, activation=GELU)
    x, weights, biases = draw(form, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, plain = call(x.bfloat16(), weights, biases), call(x, weights, biases)
    assert torch.equal(mixed, plain)


def test_autocast_does_not_reach_backward_or_what_comes_after():
    call = call_of(MLP, activation=GELU)
    tensors = draw(MLP, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(*tensors)
        inside = torch.autograd.grad(y.float().sum(), flatten(*tensors), retain_graph=True)
        assert torch.is_autocast_enabled("cpu")
    outside = torch.autograd.grad(y.float().sum(), flatten(*tensors))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    assert call(*tensors).dtype == torch.float32


@each_form
def test_a_compiled_call_follows_autocast_as_it_comes_and_goes(form):
    tensors = draw(form, dtype=torch.float32)
    run_compiled = compiled(call_of(form, activation="gelu"))
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert run_compiled(*tensors).dtype == (torch.bfloat16 if enabled else torch.float32)


@each("dtype", [torch.float32, torch.bfloat16])
def test_what_a_fused_block_refuses_in_a_region_is_said(dtype, monkeypatch):
    """x may have the dtype of the region already, where the weights have not."""

    def refuse(*arguments):
        raise ValueError("fastbp.mlp: this backend cannot take this call")

    block = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    fastbp.fuse(block)
    monkeypatch.setattr(fastbp.functional, "call", refuse)
    with torch.autocast("cpu"), pytest.raises(ValueError, match="this backend cannot take this call"):
        block(torch.randn(3, 6, dtype=dtype))
