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
    (257, 72, 72, 2),  # one row over
    (300, 72, 320, 2),  # the steps of a tile are the ring's stages
    (130, 136, 328, 2),  # odd edges everywhere, a partial step
    (256, 384, 448, 4),  # three tiles for two clusters
    (512, 128, 200, 6),  # fewer tiles than clusters
    (200, 256, 768, 2),  # the ring more than twice a tile
]  # fmt: skip


def cases(kind):
    """Every activation with every policy in bfloat16, and every policy once in float16; the rest goes round.

    dgrad from y is a kernel of its own, so it has two shapes more to itself, for the loader's loop is unrolled.
    """
    gated = kind.startswith("gated")
    kept = {name: ref.policies_of(ref.activation_of(name), gated) for name in ACTIVATIONS}
    settings = [(name, policy, "bfloat16") for name in ACTIVATIONS for policy in kept[name]]
    once = {policy: name for name in ACTIVATIONS for policy in kept[name]}
    settings += [(name, policy, "float16") for policy, name in once.items()]
    for i, (activation, policy, dtype) in enumerate(settings):
        marked = policy == "output_lsb"  # with numbers far to the left in every place of a pack
        wide = [shape for shape in SHAPES if not marked or shape[1] > 16]
        m, n, k, processors = wide[(i + 3 * ptx.KINDS.index(kind)) % len(wide)]
        options = {"bias": i % 3 != 1 or marked, "keep": i % 4 != 2, "h": i % 4 != 2, "sums": i % 5 != 3}
        over = i % 4 == 1 and policy != "fp8"
        yield Case(kind, m, n, k, dtype, activation, policy, processors, over=over, **options)
    if kind == "dgrad":
        yield from (Case(kind, 128, 136, k, activation="softplus", policy="output") for k in (320, 448))


def unmet(kernel):
    """The instructions that no launch has met, less jumps: those of a wait that never was in vain, and the one of an
    activation that is none of the table."""
    return [f"{instr.line}: {instr.text}" for instr in kernel.coverage().missed() if instr.op != "bra"]


@pytest.mark.parametrize("kind", ptx.KINDS)
def test_every_case_and_every_instruction(kind):
    """All in one test, which then knows that no instruction of a kernel for bfloat16 was left out."""
    kernels = {}
    for seed, case in enumerate(cases(kind)):
        verdict = cuda_hopper.run(case, ACTIVATIONS, seed)
        assert not verdict.fault, verdict
        if case.dtype == "bfloat16":
            kernels |= {kernel.name: kernel for kernel in verdict.kernels}
    assert len(kernels) == (3 if kind == "dgrad" else 1)
    assert not {name: found for name, kernel in kernels.items() if (found := unmet(kernel))}


@pytest.mark.parametrize("kind", ["dgrad", "gated_dgrad"])
@pytest.mark.parametrize(("special", "activation"), [(math.inf, "gelu"), (math.nan, "hardtanh")])
def test_rows_beyond_the_last_one_do_not_reach_the_bias_gradient(kind, special, activation):
    """TMA fills them with 0, and 0 · inf of W is NaN; dz itself is +inf, or 0 where hardtanh is flat."""
    case = Case(kind, 130, 136, 72, activation=activation, special=special)
    assert not cuda_hopper.run(case, (activation,), 0).fault
