"""The ops of an activation alone: one pass over contiguous numbers."""

import pytest
import torch
import torch.nn.functional as F
from exchanged import GELU, PASSES, numbers, value_and_gradient
from support import assert_as_good_as_eager, each, stock
from torch.testing import assert_close

from fastbp.activations import ROWS
from fastbp.backends import native
from fastbp.problem import DTYPES, configure

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}"),
]


ops = torch.ops.fastbp_native


def settings_of(activation):
    return native.library.codes(
        configure("linear_act", activation.name, activation.params, "preact", "native"), torch.float64, False
    )


@each("dtype", DTYPES)
@each("activation", PASSES)
@pytest.mark.parametrize("route", ["library"], indirect=True)  # for the NaN in what nobody wrote
def test_a_pass_is_as_good_as_eager(activation, dtype, route):
    z = numbers(dtype)
    dy = torch.linspace(-2, 2, z.numel()).to(dtype).view_as(z)
    mine = [ops.activate(z, *settings_of(activation)), ops.activate_backward(dy, z, *settings_of(activation))]
    f = stock(activation)
    if dtype is torch.float64:  # of which there is no more exact one
        return assert_close(mine, value_and_gradient(f, z), rtol=1e-12, atol=1e-13)
    assert_as_good_as_eager(mine, value_and_gradient(f, z), value_and_gradient(f, z.double()), spare_units=2)
    return None


@each("shape", [(0,), (1,), (8192,), (8193,), (3, 0, 5), (2, 3, 5461)])
def test_a_pass_of_any_shape(shape):
    z = numbers(torch.float64, *shape)
    assert_close(ops.activate(z, *settings_of(GELU)), F.gelu(z), rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(F.gelu(z := z.requires_grad_()), z, torch.ones_like(z))
    assert_close(ops.activate_backward(torch.ones_like(z), z.detach(), *settings_of(GELU)), expected)


REFUSED = {
    "z by columns": (lambda z: (z.mT, z.mT), "must be contiguous"),
    "dy by columns": (lambda z: (torch.ones(6, 6).mT, torch.ones(6, 6)), "must be contiguous"),
    "another shape": (lambda z: (z.view(-1), z), "must have one shape"),
    "another dtype": (lambda z: (z.double(), z), "must have the dtype of the other tensors"),
    "integers": (lambda z: (z.int(), z.int()), "must be float64, float32, bfloat16 or float16"),
    "no dimension": (lambda z: (z.sum(), z.sum()), "must have a dimension"),
}


@each("case", REFUSED)
def test_what_a_pass_cannot_serve_is_refused(case):
    make, words = REFUSED[case]
    with pytest.raises(RuntimeError, match=words):
        ops.activate_backward(*make(torch.ones(6, 5)), *settings_of(GELU))


@each("settings", [32 * len(ROWS), -32, 1, 2, 32768])
def test_what_is_no_activation_is_refused(settings):
    with pytest.raises(RuntimeError, match=r"no such call|does not have|has no linear|has one linear"):
        ops.activate(torch.ones(3), settings, [])
