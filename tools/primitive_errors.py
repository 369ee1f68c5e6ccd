"""Errors of the CPU kernels' primitives: ``python tools/primitive_errors.py`` prints the table of docs/numerics.md.

Compiles ``csrc/cpu/math.h`` for a capability, runs each primitive on random and on even points of its range, and
compares with 40 digits: in units in the last place for float and double, relative for Coarse, the shorter polynomials
from which results of 16 bits are made.
"""

from __future__ import annotations

import ctypes
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mpmath import mp

ROOT = Path(__file__).resolve().parents[1]
mp.dps = 40

# Where each is looked at: for float and Coarse, and for double.
RANGES: dict[str, tuple[Callable[[Any], Any], tuple[float, float], tuple[float, float]]] = {
    "exp": (mp.exp, (-86.0, 88.0), (-700.0, 709.0)),
    "expm1": (mp.expm1, (-20.0, 88.0), (-40.0, 709.0)),
    "tanh": (mp.tanh, (-12.0, 12.0), (-22.0, 22.0)),
    "sigmoid": (lambda x: 1 / (1 + mp.exp(-x)), (-80.0, 30.0), (-700.0, 40.0)),
    "erf": (mp.erf, (-7.0, 7.0), (-7.0, 7.0)),
    "log1p": (mp.log1p, (0.0, 1e8), (0.0, 1e16)),
}
# From a table where there is AVX-512, but for double; elsewhere PyTorch's formulas by way of the erf and exp above.
LOOKED_UP = {"normal_cdf": (mp.ncdf, (-5.0, 7.0), (-5.0, 7.0)), "normal_pdf": (mp.npdf, (-5.0, 5.0), (-5.0, 5.0))}
TYPES = {"float": (np.float32, "float"), "double": (np.float64, "double"), "Coarse": (np.float32, "cpu::Coarse")}


def library(capability: str, folder: Path) -> ctypes.CDLL:
    """The primitives as functions of arrays, for one capability."""
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="tables")
    source = f'#include "{ROOT}/csrc/cpu/math.h"\nusing namespace fastbp;\n'
    for kind, (_, tag) in TYPES.items():
        for name in RANGES | LOOKED_UP:
            number = "double" if kind == "double" else "float"
            source += (
                f'extern "C" void {name}_{kind}(int64_t n, const {number}* x, {number}* y) {{ using V = '
                f"cpu::{capability}::Vec<{tag}>; for (int64_t i = 0; i < n; i += V::size) "
                f"prim::{name}(V::load(x + i)).store(y + i); }}\n"
            )
    path = folder / f"primitives_{capability}"
    path.with_suffix(".cpp").write_text(source)
    flags = [f for f in build["FLAGS"] if f not in ("-c", "-fvisibility=hidden")]
    own = [*build["CAPABILITIES"][capability].split(), f"-DFASTBP_CAPABILITY={capability}", "-O3", "-shared"]
    command = [*build["compiler"](), *flags, *build["QUIET"], *own, f"{path}.cpp", "-o", f"{path}.so"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(f"{path}.so")


def points(kind: str, limits: tuple[float, float], count: int = 4096) -> np.ndarray:
    """Even and logarithmic points, so that the small ones are looked at too."""
    generator = np.random.default_rng(0)
    low, high = limits
    even = generator.uniform(low, high, count // 2)
    small = np.where(generator.random(count // 2) < 0.5, low, high) * 10.0 ** -generator.uniform(0, 7, count // 2)
    return np.concatenate([even, small]).astype(TYPES[kind][0])


def error(functions: ctypes.CDLL, name: str, kind: str) -> float:
    """The largest error: in units in the last place, or for Coarse relative."""
    exact, narrow, wide = (RANGES | LOOKED_UP)[name]
    x = points(kind, wide if kind == "double" else narrow)
    y = np.empty_like(x)
    pointer = ctypes.c_void_p
    getattr(functions, f"{name}_{kind}")(ctypes.c_int64(len(x)), x.ctypes.data_as(pointer), y.ctypes.data_as(pointer))
    worst = 0.0
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        truth = exact(mp.mpf(a))
        unit = np.spacing(x.dtype.type(abs(float(truth)))) if kind != "Coarse" else abs(float(truth))
        if unit > np.finfo(x.dtype).tiny * (1 if kind == "Coarse" else 0):
            worst = max(worst, float(abs(mp.mpf(b) - truth) / float(unit)))
    return worst


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        build = runpy.run_path(str(ROOT / "setup.py"), run_name="tables")
        capability = sys.argv[1] if len(sys.argv) > 1 else next(iter(build["CAPABILITIES"]))
        functions = library(capability, Path(folder))
        print(f"| {capability} | float, ulp | double, ulp | for 16-bit results, relative |\n|---|---|---|---|")
        for name in RANGES:
            ulp = [f"{error(functions, name, kind):.2f}" for kind in ("float", "double")]
            print(f"| {name} | {' | '.join(ulp)} | {error(functions, name, 'Coarse'):.1e} |")
        for name in LOOKED_UP if capability.startswith("avx512") else ():
            found = [error(functions, name, kind) for kind in ("float", "Coarse")]
            print(f"| {name} | {found[0]:.2f} | | {found[1]:.1e} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
