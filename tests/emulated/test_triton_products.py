"""The Triton products executed from their PTX: kinds, families, tiles, activations, dtypes and edges, by pairs."""

import pytest
from support import each

pytest.importorskip("triton")

from emulated.triton_products import Case, run

SOFTPLUS = dict(activation="softplus", params=(2.0, 20.0))
# By the number of a tile in configs.tiles: on sm_90 those of TMA come first, then those by pointers.
CASES = [
    Case("forward", "sm_80", 0, 130, 77, 41, "relu", dtype="float16"),
    Case("forward", "sm_80", 1, 65, 129, 200, "silu", programs=1, transposed=True, bias=False),
    Case("forward", "sm_80", 2, 1, 1, 1, "gelu", programs=1, keep=False),
    Case("forward", "sm_90", 0, 150, 264, 72, "gelu_tanh", programs=1),
    Case("forward", "sm_90", 1, 130, 264, 200, dtype="float16", programs=1, keep=False, **SOFTPLUS),
    Case("forward", "sm_90", 2, 37, 24, 8, "gelu", programs=4, bias=False),
    Case("forward", "sm_90", 3, 40, 77, 65, "mish", programs=2),  # by pointers on Hopper: wgmma from cp.async
    Case("gated_forward", "sm_80", 1, 66, 70, 100, "silu", dtype="float16", programs=2),
    Case("gated_forward", "sm_90", 0, 300, 136, 72, "gelu", programs=1, bias=False),
    Case("gated_forward", "sm_90", 1, 1, 72, 200, "relu", programs=2),
    Case("dgrad", "sm_80", 0, 130, 130, 40, "silu", dtype="float16", overwrite=True),
    Case("dgrad", "sm_80", 2, 70, 65, 65, keep=False, **SOFTPLUS),
    Case("dgrad", "sm_90", 0, 260, 256, 72, "gelu", programs=1, overwrite=True),
    Case("dgrad", "sm_90", 2, 130, 136, 200, "gelu_tanh", dtype="float16", programs=2),
    Case("gated_dgrad", "sm_80", 1, 66, 77, 41, "gelu", overwrite=True),
    Case("gated_dgrad", "sm_90", 0, 150, 264, 72, "silu", dtype="float16", programs=1, overwrite=True),
    Case("gated_dgrad", "sm_90", 1, 37, 72, 200, "mish", programs=2, keep=False),
]


@each("case", CASES)
def test_products(child, case):
    verdict = child(run, case, seed=CASES.index(case))
    assert not verdict.fault, verdict.text
