"""What the compressed policies keep and read, by the elementwise kernels of csrc/cuda, from their PTX."""

import pytest

from emulated import cuda_compressed, cuda_elementwise, ptx
from emulated.cuda_compressed import Case

pytestmark = pytest.mark.skipif(bool(ptx.UNAVAILABLE), reason=ptx.UNAVAILABLE)
ACTIVATIONS = ("gelu",)
# sm_80 makes e4m3 by integers, sm_90a by an instruction.
VALUES = [
    Case(m=9, n=513),
    Case(m=33, n=256, family="sm_90a", gated=True),
    Case(m=5, n=37, dtype="float16", family="sm_90a", results="over"),
    Case(m=12, n=264, dtype="float16", family="sm_90a", results="read", gated=True),
    Case(m=5, n=37, results="read"),
    Case(m=12, n=72, dtype="float32"),
    Case(m=9, n=513, policy="output_bits"),
    Case(m=33, n=256, dtype="float16", family="sm_90a", policy="output_bits", results="over"),
    Case(m=5, n=37, dtype="float32", policy="output_bits", skew=1),
    Case(m=9, n=264, policy="output_lsb", results="over"),
    Case(m=5, n=37, dtype="float16", family="sm_90a", policy="output_lsb"),
    Case(m=12, n=72, dtype="float32", policy="output_lsb"),
]
CHAIN_RULES = [
    cuda_elementwise.Case("chain_rule", 9, 513, policy="output_bits"),
    cuda_elementwise.Case("chain_rule", 33, 256, "float16", family="sm_90a", policy="output_bits"),
    cuda_elementwise.Case("chain_rule", 12, 72, "float32", policy="output_lsb"),
    cuda_elementwise.Case("chain_rule", 33, 256, policy="output_lsb", results="over"),
    cuda_elementwise.Case("chain_rule", 12, 264, policy="fp8"),
    cuda_elementwise.Case("chain_rule", 5, 37, "float16", family="sm_90a", policy="fp8", transposed=True),
    cuda_elementwise.Case("gated_chain_rule", 9, 513, policy="fp8"),
    cuda_elementwise.Case("gated_chain_rule", 33, 256, "float16", family="sm_90a", policy="fp8"),
    cuda_elementwise.Case("gated_chain_rule", 12, 72, "float32", policy="fp8", results="grad"),
]


@pytest.mark.parametrize("case", VALUES, ids=str)
def test_what_is_kept(case):
    assert not (found := cuda_compressed.run(case, ACTIVATIONS, len(str(case)))).fault, found


@pytest.mark.parametrize("case", CHAIN_RULES, ids=str)
def test_chain_rule(case):
    assert not (found := cuda_elementwise.run(case, ACTIVATIONS, len(str(case)))).fault, found
