"""The ways in which the C++ and the Triton kernels compute a call."""

import pytest
import torch
from support import DTYPES

from fastbp.backends import native

ROUTES = torch.ops.fastbp_native.routes().split() if native.unavailable is None else []
ROWS = {"row": 1}  # what a way asks for; with other rows, another way would serve and be tested twice


def each_route_of(dtypes):
    """Every way with every of these dtypes that it serves, and NaN in all memory that nobody wrote (conftest.py)."""
    found = [(r, d) for r in ROUTES for d in dtypes if r != "narrow_pairs" or d == torch.bfloat16]
    return pytest.mark.parametrize(("route", "dtype"), found, indirect=["route"], ids=str)


each_route = each_route_of(DTYPES)


TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where they are interpreted: conftest.py

# The ways of the Triton kernels; a tile is small, so that small matrices have several. Sixteen columns are the least
# that a product of Triton has.
TRITON_ROUTES = {
    "library": ("library", {}),
    "fused": ("fused", dict(block_m=16, block_n=32, block_k=16, warps=4, stages=2, tma=True)),
    "fused by pointers": ("fused", dict(block_m=32, block_n=16, block_k=32, warps=4, stages=2)),
    "fused in parts": ("fused", dict(block_m=32, block_n=64, block_k=16, warps=4, stages=2, parts=4, tma=True)),
    "fused, persistent": (
        "fused",
        dict(block_m=16, block_n=32, block_k=16, warps=4, stages=2, parts=2, tma=True, persistent=True, group_m=2),
    ),
}


def each_triton_route(*names, dtypes=DTYPES):
    """Every way, or these, with every dtype that it serves, and NaN in all memory that nobody wrote (conftest.py)."""
    found = [
        (name, dtype)
        for name, (route, _) in TRITON_ROUTES.items()
        for dtype in dtypes
        if (not names or name in names) and (route != "fused" or dtype.itemsize == 2)
    ]
    return pytest.mark.parametrize(("triton_route", "dtype"), found, indirect=["triton_route"], ids=str)
