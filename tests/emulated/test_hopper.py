"""The four products of csrc/cuda/hopper*, from their PTX: numbers, order of accesses, every instruction met."""

import math

import pytest
from emulated import cuda_hopper, ptx
from emulated import reference as ref
from emulated.cuda_hopper import Case

pytestmark = pytest.mark.skipif(bool(ptx.UNAVAILABLE), reason=ptx.UNAVAILABLE)

# One of each class of code: a selection, a polynomial, tanh, a sigmoid, parameters.
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "softplus")
#           m    n    k  processors
SHAPES = [
    (256, 128, 64, 2),  # one tile
    (1, 8, 8, 2),  # least
    (128, 128, 256, 2),  # the second block of a cluster has no rows
    (257, 136, 72, 2),  # one row and eight columns over
    (300, 136, 320, 2),  # the steps of a tile are the ring's stages
    (130, 264, 328, 2),  # odd edges everywhere, a partial step
    (256, 384, 448, 4),  # three tiles for two clusters
    (512, 128, 200, 6),  # fewer tiles than clusters
    (200, 256, 768, 2),  # the ring more than twice a tile
]  # fmt: skip


def cases(kind):
    """Every activation with every policy in bfloat16, and every policy in float16; each shape with some of them."""
    gated = kind.startswith("gated")
    settings = [(a, p) for a in ACTIVATIONS for p in ref.policies_of(ref.activation_of(a), gated)]
    dtypes = [(*s, "bfloat16") for s in settings] + [
        (next(a for a, kept in reversed(settings) if kept == p), p, "float16") for p in dict(settings[::-1] + settings).values()
    ]
    for i, (activation, policy, dtype) in enumerate(dtypes):
        m, n, k, processors = SHAPES[(i + 2 * ptx.KINDS.index(kind)) % len(SHAPES)]
        yield Case(
            kind, m, n, k, dtype, activation, policy, processors,
            bias=i % 3 != 1, keep=i % 4 != 2, h=i % 4 != 2, sums=i % 5 != 3, over=i % 4 == 1 and policy != "fp8",
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["dgrad", "gated_dgrad"])
@pytest.mark.parametrize(("special", "activation"), [(math.inf, "gelu"), (math.nan, "hardtanh")])
def test_rows_beyond_the_last_one_do_not_reach_the_bias_gradient(kind, special, activation):
    """TMA fills them with 0, and 0 · inf of W is NaN; dz itself is +inf, or 0 where hardtanh is flat."""
    case = Case(kind, 130, 136, 72, activation=activation, special=special)
    verdict = cuda_hopper.run(case, (activation,), 0)
    assert not verdict.fault, verdict.text
