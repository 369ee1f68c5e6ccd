"""Faults put into the PTX of the Triton kernels are seen: what says that the other tests can fail."""

import pytest
from support import each

pytest.importorskip("triton")

from emulated import mutants_triton
from emulated.mutants_triton import MUTANTS


@each("mutant", MUTANTS)
def test_each_mutant_is_seen(child, mutant):
    verdict = child(mutants_triton.first_fault, MUTANTS.index(mutant))
    assert verdict.fault, verdict.text
