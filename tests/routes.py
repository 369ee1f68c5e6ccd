"""The ways in which the C++ kernels compute a call, from the library's own list."""

import pytest
import torch
from support import DTYPES

from fastbp.backends import native

ROUTES = torch.ops.fastbp_native.routes().split() if native.unavailable is None else []
ROWS = {"row": 1}  # what a way asks for; with other rows, another way would serve and be tested twice

# Every way with every dtype that it serves, and NaN in all memory that nobody wrote (conftest.py).
each_route = pytest.mark.parametrize(
    ("route", "dtype"),
    [(r, d) for r in ROUTES for d in DTYPES if r != "narrow_pairs" or d == torch.bfloat16],
    indirect=["route"],
    ids=str,
)
