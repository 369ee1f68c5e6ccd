"""Whole calls of csrc/cuda as a GPU gets them: the real host code launches the real kernels, which the emulator runs.

Arguments, grids, clusters, shared memory, tensor maps and strides are those of nvcc's objects; fake_cudart.cpp is what
stands for CUDA's runtime. Memory is poisoned, inputs cannot be written, and every access is held to its allocation.
"""

import cxx
import pytest
import torch
from cxx import Change
from emulated import cuda_runtime
from emulated.emulator import emulator
from standin import take_calls
from support import assert_accurate, each, tensors

from fastbp.activations import bind
from fastbp.backends import native
from fastbp.forms import FORMS, GATED_MLP, LINEAR_ACT, MLP

pytestmark = pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}")
GELU, TANH = bind("gelu"), bind("tanh")
BF16, F32 = torch.bfloat16, torch.float32
UNALIGNED = 16  # where dynamic shared memory begins, beyond the KiB that CUDA keeps: PTX promises no more


def gapped(tensor):
    """The same numbers, and between their rows NaN that nobody may use."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 8), float("nan"), dtype=tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor.detach()
    return wide[..., : tensor.shape[-1]].requires_grad_(tensor.requires_grad)


def expanded(dy):
    """One row's gradient for all rows, as of a sum."""
    return dy.reshape(-1, dy.shape[-1])[:1].expand(dy.numel() // dy.shape[-1], -1).view(dy.shape)


VIEWS = {"dense": lambda dy: dy, "gapped": gapped, "expanded": expanded}


@pytest.fixture
def calls(monkeypatch):
    """Runs whole calls by the library with these changes; returns what was launched."""

    def run(form, activation, save, dtype, route, rows, features, *, bias=True, x="dense", dy="dense", changes=()):
        try:
            ops = cuda_runtime.ops(*changes)
        except cxx.Unable as reason:
            pytest.skip(str(reason))
        with emulator().allocates(1024 + UNALIGNED) as launches:
            take_calls(ops, monkeypatch)
            ops.set_cuda_route(route)
            first, weights, biases = tensors(form, dtype, seed=91, rows=rows, features=features, bias=bias)
            first = VIEWS[x](first)
            emulator().protect(first, *weights, *biases)
            assert_accurate(form, activation, save, (first, weights, biases), backend="native", view=VIEWS[dy])
            return [*launches]

    return run


@each(
    ("form", "activation", "save", "dtype", "route", "rows", "features", "options"),
    [
        (FORMS["linear_act"], GELU, "preact", BF16, "library", (3, 7), (19, 23, 17, 11), dict(x="gapped")),
        (FORMS["linear_act"], TANH, "output", F32, "library", 37, (19, 23, 17, 11), dict(dy="expanded")),
    ],
)
def test_calls(calls, form, activation, save, dtype, route, rows, features, options):
    launches = calls(form, activation, save, dtype, route, rows, features, **options)
    print(launches)
