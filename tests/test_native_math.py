"""The CPU kernels' own exp, tanh, erf and their kin, as exact as docs/numerics.md says."""

import math
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

import fastbp
from fastbp import formulas
from fastbp.backends import native

ROOT = Path(fastbp.__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import primitive_errors  # noqa: E402

CAPABILITIES = runpy.run_path(str(ROOT / "setup.py"), run_name="tables")["CAPABILITIES"]
LIMITS = {"exp": 2.0, "tanh": 2.0, "erf": 2.0, "expm1": 2.0, "log1p": 2.0, "sigmoid": 3.0}  # units in the last place
# For float in units in the last place; for Coarse relative, where half a unit of bfloat16 is 2⁻⁹.
TABLE_LIMITS = {"normal_cdf": {"float": 2.0, "Coarse": 2.0**-14}, "normal_pdf": {"float": 10.0, "Coarse": 2.0**-11}}
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile them with")


@pytest.fixture(scope="module")
def functions(request, tmp_path_factory):
    names = list(CAPABILITIES)
    if native.unavailable or names.index(native.capability()) > names.index(request.param):
        pytest.skip(f"this CPU has no {request.param}, or the kernels are not built")
    return primitive_errors.library(request.param, tmp_path_factory.mktemp("primitives"))


@pytest.mark.parametrize("functions", CAPABILITIES, indirect=True)
@pytest.mark.parametrize("name", primitive_errors.RANGES)
@pytest.mark.parametrize("kind", primitive_errors.TYPES)
def test_errors(functions, name, kind):
    assert set(LIMITS) == set(primitive_errors.RANGES)
    found = primitive_errors.error(functions, name, kind)
    assert found <= (2.0**-13 / 4 if kind == "Coarse" else LIMITS[name])


@pytest.mark.parametrize("functions", [name for name in CAPABILITIES if "avx512" in name], indirect=True)
@pytest.mark.parametrize("name", primitive_errors.LOOKED_UP)
@pytest.mark.parametrize("kind", ["float", "Coarse"])
def test_errors_of_what_is_looked_up(functions, name, kind):
    assert primitive_errors.error(functions, name, kind) <= TABLE_LIMITS[name][kind]


SPECIAL = (math.inf, -math.inf, math.nan, 0.0, -0.0, 6.5, 6.6, 100.0, 3e38, 1e-38)


@pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_of_special_numbers(dtype):
    """inf, NaN and 0 where the formula has them, also beyond the end of the table and in its last piece."""
    z = torch.tensor([s * x for s in (1, -1) for x in SPECIAL] * 3, dtype=dtype).requires_grad_()
    nothing = [torch.zeros(1, 1), torch.zeros(len(z), 1)]
    y = fastbp.linear_act(*(t.to(dtype) for t in nothing), z, activation="gelu", backend="native").view(-1)
    (dz,) = torch.autograd.grad(y, z, torch.ones_like(y))
    exact = z.detach().double()
    expected = formulas.gelu(exact), formulas.gelu_grad(torch.ones_like(exact), exact)
    for found, true in zip((y, dz), expected, strict=True):
        torch.testing.assert_close(
            found, true.to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-8, equal_nan=True
        )
