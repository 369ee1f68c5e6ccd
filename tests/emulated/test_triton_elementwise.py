"""The Triton elementwise kernels executed from their PTX: kernels, families, dtypes, sizes and traits, by pairs."""

import pytest
from support import each

pytest.importorskip("triton")

from emulated.triton_elementwise import Case, run

CASES = [
    Case("activation", "sm_80", 9, 513, "relu", dtype="float16", overwrite=True),
    Case("activation", "sm_90", 1, 2730, "gelu", dtype="float32"),
    Case("activation", "sm_80", 5, 37, "softplus", (2.0, 20.0), "bfloat16", skew=1),
    Case("activation", "sm_90", 3, 264, "mish", dtype="float64"),
    Case("gated_activation", "sm_80", 9, 513, "silu", overwrite=True),
    Case("gated_activation", "sm_90", 17, 72, "gelu_tanh", dtype="float32", skew=1),
    Case("chain_rule", "sm_80", 33, 256, "gelu", transposed=True),
    Case("chain_rule", "sm_90", 41, 72, "silu", dtype="float16", overwrite=True),
    Case("chain_rule", "sm_80", 9, 513, "tanh", dtype="float32", policy="output", skew=1),
    Case("chain_rule", "sm_90", 130, 77, "softplus", (2.0, 20.0), "float64"),
    Case("chain_rule", "sm_90", 1, 1, "gelu_tanh", less=True),
    Case("gated_chain_rule", "sm_80", 33, 264, "silu", dtype="float16", overwrite=True),
    Case("gated_chain_rule", "sm_90", 9, 130, "gelu", transposed=True, skew=1),
    Case("gated_chain_rule", "sm_90", 17, 37, "mish", dtype="float32", less=True),
    Case("gated_chain_rule", "sm_80", 5, 72, "gelu", dtype="float64", overwrite=True),
    Case("column_sum", "sm_80", 33, 77, dtype="float16"),
    Case("column_sum", "sm_90", 70, 200, dtype="float64"),
]


@each("case", CASES)
def test_elementwise(child, case):
    verdict = child(run, case, seed=CASES.index(case))
    assert not verdict.fault, verdict.text
