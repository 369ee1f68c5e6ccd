"""Each fault put into a CUDA kernel on purpose is caught, as what it is; those that change nothing are equivalent."""

from dataclasses import replace

import pytest
from ptxsim import Schedule

from emulated import cuda_hopper, mutants_cuda, ptx
from emulated.cuda_hopper import Case
from emulated.jobs import judged
from emulated.mutants_cuda import MUTANTS

pytestmark = pytest.mark.skipif(bool(ptx.UNAVAILABLE), reason=ptx.UNAVAILABLE)
SEEDS = 12  # at most: the first that catches a mutant is enough
CAUGHT = [mutant for mutant in MUTANTS if not mutant.equivalent]
EQUIVALENT = [mutant for mutant in MUTANTS if mutant.equivalent]


@pytest.mark.parametrize("mutant", CAUGHT, ids=str)
def test_caught(mutant):
    verdict = next((found for seed in range(SEEDS) if (found := mutant.run(seed)).fault), None)
    assert verdict is not None, f"nothing in {SEEDS} schedules"
    assert verdict.fault in mutant.kinds, verdict


@pytest.mark.parametrize("mutant", EQUIVALENT, ids=str)
def test_equivalent(mutant):
    """It is another program, and right: its numbers are those of the one that it was made of."""
    assert all(text != ptx.source(name) for name, text in mutant.replaced)
    verdict = mutant.run(0)
    assert not verdict.fault, verdict


def test_names():
    assert len({(mutant.file, mutant.name) for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("k", [256, 320])
def test_order_of_the_consumers(k):
    """Four tiles on one cluster, with copies that land at once and in order.

    Without the order barriers a consumer looks two phases early as soon as the ring is gone through: at K = 256 this
    schedule gives right numbers, and the wait that depends on it is reported; at 320, which is more steps than stages,
    numbers are wrong or nobody goes on.
    """
    case = Case("forward", 512, 256, k)
    schedule = replace(Schedule.of(0), eager=1.0, lazy="")
    assert not judged(cuda_hopper.execute, case, schedule, ("gelu",)).fault
    without = judged(cuda_hopper.execute, case, schedule, ("gelu",), mutants_cuda.no_order())
    assert without.fault in {256: {"phase"}, 320: mutants_cuda.LOST}[k], without
