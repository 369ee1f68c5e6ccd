"""The elementwise kernels of csrc/cuda, from their PTX, in every dtype, aligned and gathered."""

import pytest

from emulated import cuda_elementwise, ptx
from emulated.cuda_elementwise import Case

pytestmark = pytest.mark.skipif(bool(ptx.UNAVAILABLE), reason=ptx.UNAVAILABLE)
ACTIVATIONS = ("relu", "gelu", "softplus")
CASES = [  # kernel, m, n, dtype, activation
    Case("value", 33, 256, "bfloat16", "gelu", gated=True),
    Case("value", 9, 513, "float16", "softplus", "sm_90a", results="over"),
    Case("value", 70, 264, "float32", "relu", gated=True, skew=1, results="over"),
    Case("value", 5, 37, "float64", "gelu", results="over"),
    Case("chain_rule", 70, 264, "bfloat16", "gelu"),
    Case("chain_rule", 9, 513, "bfloat16", "softplus", results="over"),
    Case("chain_rule", 33, 256, "bfloat16", "relu", policy="output", transposed=True),
    Case("chain_rule", 66, 40, "float16", "softplus", "sm_90a", policy="output", results="over"),
    Case("chain_rule", 33, 256, "float16", "gelu", "sm_90a", skew=1, results="grad"),
    Case("chain_rule", 70, 264, "float32", "softplus"),
    Case("chain_rule", 5, 37, "float32", "gelu", transposed=True),
    Case("chain_rule", 3, 6, "float64", "gelu"),
    Case("chain_rule", 5, 37, "float64", "relu", policy="output", transposed=True),
    Case("gated_chain_rule", 70, 264, "bfloat16", "gelu"),
    Case("gated_chain_rule", 9, 513, "bfloat16", "softplus", results="grad"),
    Case("gated_chain_rule", 33, 256, "float16", "relu", "sm_90a", results="over"),
    Case("gated_chain_rule", 5, 37, "float32", "gelu", transposed=True, results="over"),
    Case("gated_chain_rule", 18, 5, "float64", "relu", skew=1),
    Case("chain_rule", 1, 1, "bfloat16", "gelu", results="over"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case):
    assert not (found := cuda_elementwise.run(case, ACTIVATIONS, len(str(case)))).fault, found
