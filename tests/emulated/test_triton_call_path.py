"""Whole calls of the Triton kernels as a GPU gets them: Triton compiles and launches, and the emulator runs the PTX.

What is specialised, the order of arguments, strides, descriptors, grids and shared memory are those of a user's call.
"""

import re

import cxx
import pytest
from support import each

from emulated.triton_driver import FAULTS, run_apart
from fastbp.backends import triton

pytestmark = pytest.mark.skipif(triton.unavailable is not None, reason=f"triton: {triton.unavailable}")

BY_TMA = dict(block_m=64, block_n=64, block_k=32, warps=4, stages=2, tma=True)
PERSISTENT = BY_TMA | dict(parts=2, persistent=True, group_m=2)
BY_POINTERS = dict(block_m=64, block_n=32, block_k=32, warps=4, stages=3)


def call(family, route, tile, *case, kernels="", fault="", **options):
    """A line of the table below; see `triton_driver.main`."""
    return dict(family=family, route=route, tile=tile, case=list(case), options=options, fault=fault), kernels


def run(calls):
    """Each call with what became of it."""
    try:
        return list(zip(calls, run_apart([given for given, _ in calls]), strict=True))
    except cxx.Unable as reason:
        pytest.skip(str(reason))


CALLS = {
    "library": [
        call("sm_90", "library", None, "linear_act", "gelu", "preact", "bfloat16", (3, 7), (19, 23), x="gapped",
             kernels="activation chain_rule column_sum"),
        call("sm_90", "library", None, "linear_act", "tanh", "output", "float32", (37,), (20, 24), dy="expanded",
             kernels="activation chain_rule column_sum"),
        call("sm_90", "library", None, "mlp", "gelu", "output_bits", "bfloat16", (37,), (19, 40, 17, 11),
             kernels="compress compress chain_rule column_sum chain_rule column_sum"),
        call("sm_80", "library", None, "act_linear", "gelu", "preact", "bfloat16", (37,), (0, 23, 17, 11), x="gapped",
             kernels="activation chain_rule"),
        call("sm_90", "library", None, "gated_linear_act", "gelu", "preact", "bfloat16", (37,), (19, 300),
             dy="expanded", kernels="activation gated_chain_rule column_sum column_sum"),
        call("sm_90", "library", None, "gated_mlp", "gelu", "fp8", "bfloat16", (37,), (19, 72, 17),
             kernels="compress gated_chain_rule column_sum column_sum"),
        call("sm_80", "library", None, "gated_act_linear", "tanh", "preact", "float32", (5, 4), (0, 24, 11),
             x="shifted", kernels="activation gated_chain_rule"),
    ],
    "by TMA": [
        call("sm_90", "fused", BY_TMA, "linear_act", "gelu", "preact", "bfloat16", (75,), (72, 104), x="gapped",
             kernels="forward chain_rule column_sum"),
        call("sm_90", "fused", PERSISTENT, "mlp", "tanh", "output", "bfloat16", (150,), (40, 72, 136, 24),
             kernels="forward forward dgrad column_sum dgrad column_sum"),
        call("sm_90", "fused", BY_TMA, "mlp", "gelu", "output_bits", "bfloat16", (75,), (40, 72, 104, 24), dy="gapped",
             kernels="forward forward dgrad column_sum dgrad column_sum"),
        call("sm_90", "fused", BY_TMA, "act_linear", "gelu", "preact", "bfloat16", (2, 35), (0, 72, 40, 24),
             bias=False, kernels="activation dgrad"),
        call("sm_90", "fused", BY_TMA, "gated_linear_act", "gelu", "preact", "bfloat16", (75,), (72, 104), bias=False,
             kernels="gated_forward gated_chain_rule"),
        call("sm_90", "fused", PERSISTENT, "gated_mlp", "gelu", "preact", "bfloat16", (150,), (136, 72, 40),
             x="gapped", kernels="gated_forward gated_dgrad column_sum column_sum"),
        call("sm_90", "fused", BY_TMA, "gated_mlp", "tanh", "fp8", "bfloat16", (75,), (40, 72, 24),
             kernels="gated_forward gated_dgrad column_sum column_sum"),
    ],
    "by pointers": [  # and what Triton makes of a size or a stride that is 1
        call("sm_80", "fused", BY_POINTERS, "mlp", "gelu", "recompute", "bfloat16", (75,), (19, 45, 33, 11),
             kernels="forward forward forward dgrad column_sum dgrad column_sum"),
        call("sm_80", "fused", BY_POINTERS, "mlp", "gelu", "preact", "bfloat16", (1,), (16, 32, 1, 8),
             kernels="forward forward dgrad column_sum dgrad column_sum"),
        call("sm_80", "fused", BY_POINTERS, "gated_mlp", "gelu", "preact", "bfloat16", (75,), (19, 45, 11), x="gapped",
             kernels="gated_forward gated_dgrad column_sum column_sum"),
        call("sm_80", "fused", BY_POINTERS, "gated_act_linear", "gelu", "fp8", "bfloat16", (75,), (0, 72, 40),
             kernels="compress gated_dgrad"),
        call("sm_90", "fused", BY_TMA, "linear_act", "gelu", "preact", "float16", (75,), (72, 104), x="shifted",
             dy="expanded", kernels="forward chain_rule column_sum"),
    ],
}  # fmt: skip


@each("group", CALLS)
def test_calls(group):
    for (given, kernels), became in run(CALLS[group]):
        assert "error" not in became, f"{given}\n{became['error']}"
        assert " ".join(name.removesuffix("_kernel") for name, *_ in became["launches"]) == kernels


def test_faults_put_in_are_seen():
    """A grid, a size, strides or tensors of a launch that are wrong: each fails, and says what it is."""
    gated = "gated_mlp", "gelu", "preact", "bfloat16", (75,), (19, 45, 11)
    plain = "linear_act", "gelu", "preact", "bfloat16", (75,), (72, 104)
    faults = [
        ("sm_80", "library", None, *gated, "short grid", "NaN or inf|RMS error"),
        ("sm_80", "library", None, *gated, "gate for up", "RMS error"),
        ("sm_80", "fused", BY_POINTERS, *gated, "strides of x", "RMS error"),
        ("sm_90", "fused", BY_TMA, *plain, "rows for columns", "NaN or inf|RMS error|out of bounds"),
    ]
    assert {fault for *_, fault, _ in faults} == FAULTS.keys() - {""}
    for (given, _), became in run([call(*case, fault=fault) for *case, fault, _ in faults]):
        seen = next(seen for *_, fault, seen in faults if fault == given["fault"])
        assert re.search(seen, became.get("error", "")), f"{given['fault']}: {became}"
