"""Every number of a type of 16 bits through an activation of the Triton elementwise kernels, from their PTX."""

import pytest
from support import each

pytest.importorskip("triton")

from emulated.triton_sweeps import Sweep, run

SWEEPS = [
    Sweep("gelu", dtype="float16"),
    Sweep("gelu_tanh", what="grad"),
    Sweep("silu", what="grad"),
    Sweep("softsign"),  # 1 + |z| is above 2¹²⁶ for two z in a hundred
    Sweep("softsign", what="grad", family="sm_80"),
    Sweep("quick_gelu", what="grad"),  # 1.702 z overflows
    Sweep("celu", (1e38,)),
    Sweep("softplus", (2.0, 20.0), "float16", "grad_from_output"),
    Sweep("mish", what="grad"),
]


@each("sweep", SWEEPS)
def test_every_number(child, sweep):
    verdict = child(run, sweep, seed=1)
    assert not verdict.fault, verdict.text
