"""What the compressed policies keep and read, by the Triton kernels executed from their PTX."""

import pytest
from support import each

pytest.importorskip("triton")

from emulated.triton_compressed import Case, run

CASES = [
    Case("compress", "sm_80", "output_bits", 9, 513),
    Case("compress", "sm_90", "output_lsb", 33, 256, "silu", "float16"),
    Case("compress", "sm_90", "fp8", 9, 77, dtype="float32"),
    Case("gated_compress", "sm_80", "fp8", 17, 264, "silu"),
    Case("chain_rule", "sm_90", "output_bits", 9, 77, "mish"),
    Case("chain_rule", "sm_80", "output_lsb", 33, 256, "gelu_tanh"),
    Case("chain_rule", "sm_90", "fp8", 9, 513, dtype="float16"),
    Case("forward", "sm_80", "output_bits", 70, 77, tile=2),
    Case("forward", "sm_90", "fp8", 130, 136, "silu", tile=2),
    Case("forward", "sm_90", "output_lsb", 130, 136, "quick_gelu", tile=1),
    Case("dgrad", "sm_90", "output_bits", 130, 136, tile=2),
    Case("dgrad", "sm_80", "fp8", 66, 72, "silu", tile=2),
]


@each("case", CASES)
def test_compressed(child, case):
    verdict = child(run, case, seed=CASES.index(case))
    assert not verdict.fault, verdict.text
