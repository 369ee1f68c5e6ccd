"""The Triton kernels of the compressed policies executed from their PTX: kernels, dtypes and sizes by pairs."""

import pytest
from support import each

pytest.importorskip("triton")

from emulated.triton_compressed import Case, run

CASES = [
    Case("compress", "sm_80", 9, 513, policy="fp8", activation="silu"),
    Case("compress", "sm_90", 5, 37, policy="output_bits", dtype="float16"),
    Case("compress", "sm_80", 33, 256, policy="output_lsb", activation="mish", dtype="float32"),
    Case("gated_compress", "sm_90", 12, 264, policy="fp8", activation="gelu_tanh", dtype="float16"),
    Case("chain_rule", "sm_90", 9, 513, policy="fp8", dtype="float32"),
    Case("chain_rule", "sm_80", 12, 264, policy="output_bits", activation="silu"),
    Case("chain_rule", "sm_90", 70, 72, policy="output_lsb", dtype="float16"),
    Case("gated_chain_rule", "sm_80", 5, 37, policy="fp8", activation="silu", dtype="float16"),
    Case("forward", "sm_80", 150, 136, 72, -1, "gelu", "bfloat16", "fp8", 1),
    Case("forward", "sm_90", 150, 136, 328, -2, "silu", "float16", "output_bits"),
    Case("gated_forward", "sm_90", 65, 264, 448, -1, "silu", "bfloat16", "fp8"),
    Case("dgrad", "sm_90", 150, 136, 72, -1, "gelu", "bfloat16", "fp8", 1),
    Case("dgrad", "sm_80", 130, 77, 41, -1, "mish", "float16", "output_lsb"),
    Case("gated_dgrad", "sm_80", 150, 136, 104, -1, "silu", "bfloat16", "fp8"),
]


@each("case", CASES)
def test_compressed(child, case):
    verdict = child(run, case, seed=CASES.index(case))
    assert not verdict.fault, verdict.text
