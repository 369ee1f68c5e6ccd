"""Whole calls of the Triton kernels as a GPU gets them: Triton compiles and launches, and the emulator runs the PTX.

What is specialised, the order of arguments, strides, descriptors, grids and shared memory are those of a user's call.
"""

import re

import cxx
import pytest

from emulated.triton_driver import run_apart


def call(family, route, tile, *case, fault="", **options):
    return dict(family=family, route=route, tile=tile, case=list(case), options=options, fault=fault)


def test_x():
    out = run_apart([call("sm_90", "library", None, "linear_act", "gelu", "preact", "bfloat16", (37,), (19, 23))])
    print(out)
    print(out[0].get("error"))
    assert 0
