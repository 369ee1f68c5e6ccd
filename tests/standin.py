"""The C++ around the CUDA kernels, built with the host in the GPU's place (cuda_standin.cpp)."""

import cxx
import pytest
import torch

SOURCES = [
    "csrc/cuda/calls.cpp",
    "csrc/cuda/layers.cpp",
    "csrc/cuda/route.cpp",
    "csrc/cpu/call.cpp",
    "csrc/cpu/checks.cpp",
    "tests/cuda_shims.cpp",
]

VIEWS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "outer gap": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


def build():
    """The library; skips where something is missing for it."""
    try:
        return cxx.library("standin.so", [cxx.Source(cxx.ROOT / path) for path in ["tests/cuda_standin.cpp", *SOURCES]])
    except cxx.Unable as reason:
        pytest.skip(str(reason))


def fall_through(namespace):
    """Ops beneath autograd, which has nothing to do with them; returns what ends it."""
    beneath = torch.library.Library(namespace, "IMPL", "Autograd")
    for op in ("forward", "backward"):
        beneath.impl(op, torch.library.fallthrough_kernel)
    return beneath


def take_calls(ops, monkeypatch):
    """Calls of backend native go to these ops; fresh memory holds NaN."""
    from fastbp.backends import native

    monkeypatch.setattr(native, "_forward", ops.forward.default._op)
    monkeypatch.setattr(native, "_backward", ops.backward.default._op)
    monkeypatch.setattr(native, "ABSENT", ops.absent())
    ops.set_debug(True)
