"""The CPU kernels' own exp, tanh, erf and their kin, as exact as docs/numerics.md says."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest

import fastbp
from fastbp.backends import native

ROOT = Path(fastbp.__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import primitive_errors  # noqa: E402

CAPABILITIES = runpy.run_path(str(ROOT / "setup.py"), run_name="tables")["CAPABILITIES"]
LIMITS = {"exp": 2.0, "tanh": 2.0, "erf": 2.0, "expm1": 2.0, "log1p": 2.0, "sigmoid": 3.0}  # units in the last place
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
