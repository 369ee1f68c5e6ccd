"""Which way the C++ kernels take by themselves, told from the bits of what they compute."""

import copy
import os
from pathlib import Path

import pytest
import torch
from support import call, flatten, grads, like, tensors

import fastbp
from fastbp.activations import bind
from fastbp.backends import native
from fastbp.forms import FORMS

pytestmark = [
    pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}"),
    pytest.mark.skipif("FASTBP_CPU_CAPABILITY" in os.environ, reason="the CPU is told to do less than it can"),
]

CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
AMX = pytest.mark.skipif("amx_bf16" not in CPU, reason="this CPU has no AMX")
INTEL = pytest.mark.skipif("GenuineIntel" not in CPU, reason="this CPU is not Intel's")
PAIRS = pytest.mark.skipif("avx512_bf16" not in CPU, reason="this CPU does not multiply bfloat16 itself")
OTHERS = pytest.mark.skipif("GenuineIntel" in CPU, reason="this CPU is Intel's")
FLOAT, BFLOAT = torch.float32, torch.bfloat16


def results(x, layer, dy):
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)]


# docs/decisions/2026-11-27-narrow-layers-beside-amx.md has the figures.
@pytest.mark.parametrize(
    ("rows", "features", "dtype", "chosen", "other"),
    [
        pytest.param(4096, 256, BFLOAT, "library", "narrow_pairs", marks=AMX),
        pytest.param(8192, 64, BFLOAT, "library", "narrow_pairs", marks=AMX),
        pytest.param(64, 256, BFLOAT, "library", "narrow_pairs", marks=AMX),
        pytest.param(8192, 32, BFLOAT, "narrow_pairs", "library", marks=AMX),
        pytest.param(1024, 64, BFLOAT, "narrow_pairs", "library", marks=AMX),
        pytest.param(16, 256, BFLOAT, "narrow_pairs", "library", marks=AMX),
        pytest.param(256, 256, FLOAT, "library", "narrow", marks=INTEL),
        pytest.param(1024, 256, FLOAT, "narrow", "library", marks=INTEL),
        pytest.param(256, 64, FLOAT, "narrow", "library", marks=INTEL),
        pytest.param(1024, 512, BFLOAT, "library", "wide", marks=PAIRS),
        pytest.param(200, 256, FLOAT, "narrow", "wide", marks=OTHERS),
        pytest.param(1024, 688, FLOAT, "narrow", "wide", marks=OTHERS),
        pytest.param(512, 688, FLOAT, "wide", "narrow", marks=OTHERS),
        pytest.param(1200, 776, torch.float64, "wide", "narrow", marks=OTHERS),
        (1, 256, FLOAT, "row", "wide"),
        (1, 256, FLOAT, "row", "library"),
    ],
)
def test_narrow_layers_take_the_faster_way(rows, features, dtype, chosen, other, seeded):
    layer = fastbp.LinearAct(features, features, activation="gelu", backend="native", dtype=dtype)
    x = torch.randn(rows, features, dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, features, dtype=dtype)
    found = results(x, layer, dy)
    try:
        torch.ops.fastbp_native.set_debug(False, chosen)
        same = results(x, layer, dy)
        torch.ops.fastbp_native.set_debug(False, other)
        different = results(x, layer, dy)
    finally:
        torch.ops.fastbp_native.set_debug(False, "")
    assert all(map(torch.equal, found, same))
    assert not all(map(torch.equal, found, different))


@pytest.mark.parametrize(
    ("rows", "features", "dtype", "chosen", "other"),
    [
        (256, 64, FLOAT, "library", "wide"),
        (255, 64, FLOAT, "wide", "library"),
        (256, 64, torch.float64, "library", "wide"),
        (255, 64, torch.float64, "wide", "library"),
        pytest.param(2048, 64, BFLOAT, "library", "wide", marks=PAIRS),
        pytest.param(1024, 64, BFLOAT, "wide", "library", marks=PAIRS),
        pytest.param(4096, 32, BFLOAT, "wide", "library", marks=PAIRS),
    ],
)
@pytest.mark.parametrize("form", [form for form in FORMS.values() if form.given], ids=lambda form: form.name)
def test_what_is_given_takes_the_faster_way(form, rows, features, dtype, chosen, other):
    inputs = tensors(form, dtype, seed=111, rows=rows, features=(features,) * 4)
    found = []
    try:
        for route in ("", chosen, other):
            torch.ops.fastbp_native.set_debug(False, route)
            y = call(form, *inputs, activation=bind("gelu"), backend="native")
            found.append([y, *grads(y, flatten(*inputs), like(y, 112))])
    finally:
        torch.ops.fastbp_native.set_debug(False, "")
    by_itself, same, different = found
    assert all(map(torch.equal, by_itself, same))
    assert not all(map(torch.equal, by_itself, different))


@pytest.mark.parametrize("route", ["narrow", "wide", "library"])
@pytest.mark.parametrize("features", [(1536, 96), (96, 1536)])
def test_a_long_sum_is_no_less_accurate_than_pytorchs(route, features, seeded):
    """One chain of 1,536 products has three times the error of PyTorch's sums of parts."""
    layer = fastbp.LinearAct(*features, activation="identity", backend="native")
    plain = torch.nn.Linear(*features)
    plain.load_state_dict(layer.state_dict())
    x, dy = torch.randn(192, features[0], requires_grad=True), torch.randn(192, features[1])
    exact = results(x.detach().double().requires_grad_(), copy.deepcopy(plain).double(), dy.double())
    try:
        torch.ops.fastbp_native.set_debug(False, route)
        found = results(x, layer, dy)
    finally:
        torch.ops.fastbp_native.set_debug(False, "")
    for ours, own, true in zip(found, results(x, plain, dy), exact, strict=True):
        assert (ours - true).norm() <= 2 * (own - true).norm()
