"""What tools/render.py writes computes in C++ and in Triton what fastbp/formulas.py says.

Run as a script, this file is the process in which the Triton tests do their work, for whether triton interprets or
compiles is settled by the environment when it is imported.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastbp import formulas
from fastbp.activations import ROWS, TABLE, Activation

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # no package: a tool is run by its path
import render  # noqa: E402

INF, NAN = float("inf"), float("nan")
CORNERS = (0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, -6.0, 20.0, -20.0, 1e30, -1e30, INF, -INF, NAN)
N = 512  # points a case
# Where the results of a form stand among those of a row.
ROW_OF = {form: i for i, form in enumerate((*render.FORMS, *render.FOR_16_BITS.values()))}
CTYPES = {torch.float32: "float", torch.float64: "double"}
PRIMITIVES = [name for name in formulas.PRIMITIVES if name != "select"]  # which every row with a kink proves
NUMBERS = {"maximum": (0.1,), "minimum": (0.1,)}  # what some primitives take after x; not a float32
# What is rounded on the way and larger than the result: 1 + erf cancels, and e^(-x²/2) takes x²/2 as it is rounded.
TERMS = {
    **dict.fromkeys(("normal_cdf", "tanh_cdf", "tanh_pdf"), lambda x, y: 0.5),
    "normal_pdf": lambda x, y: (x * x * y).nan_to_num(nan=0.0),
}
needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")
each_dtype = pytest.mark.parametrize("dtype", CTYPES, ids=str)
each_row = pytest.mark.parametrize("name", ROWS)
each_primitive = pytest.mark.parametrize("name", PRIMITIVES)


def params_of(row: Activation) -> list[tuple[float, ...]]:
    """The defaults, and others: with 1 for alpha or beta, a formula without it would pass."""
    defaults = tuple(default for _, default in row.params)
    return list(dict.fromkeys([defaults, tuple(1.25 * default or -0.5 for default in defaults)]))


def points(params: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """N pairs (dy, z): every corner with every special dy, and random ones.  z stands for y as well."""
    corners = torch.cartesian_prod(torch.tensor([1.0, -0.5, 0.0, INF, NAN]), torch.tensor([*CORNERS, *params]))
    dy, z = torch.cat([corners, torch.randn(N - len(corners), 2, generator=torch.Generator().manual_seed(0)) * 4]).T
    return dy.to(dtype).contiguous(), z.to(dtype).contiguous()


def evaluated(row: Activation, params: tuple[float, ...], dy: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Every form of a row, in the order of ``render.FORMS``; the sides come by turns."""
    right = sides(dy)
    arguments = {
        "value": (z,), "grad": (dy, z), "grad_from_output": (dy, z),
        "grad_from_side": (dy, z, right), "grad_from_side_16": (dy, z, right),
    }  # fmt: skip
    return {form: getattr(row, form)(*args, *params) for form, args in arguments.items() if getattr(row, form)}


def sides(dy: Tensor) -> Tensor:
    return torch.arange(len(dy), dtype=dy.dtype) % 2


def check_row(row: Activation, params: tuple[float, ...], dtype: torch.dtype, got: Tensor) -> None:
    """NaN and inf where torch has them in this dtype; the rest within rounding of the formula in float64.

    The terms of a formula are of the size of dy (1 + |z|) and may cancel, so their rounding is relative to that; beyond
    |z| = 20 nothing cancels any more.
    """
    dy, z = points(params, dtype)
    same_dtype, exact = evaluated(row, params, dy, z), evaluated(row, params, dy.double(), z.double())
    for form, expected in same_dtype.items():
        result = got[ROW_OF[form]]
        if result.isnan().all():
            assert form in render.FOR_16_BITS.values(), form  # which Triton has in a file of its own
            continue
        finite = expected.isfinite()
        torch.testing.assert_close(result[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
        terms = (1 if form == "value" else dy.abs()) * (1 + z.abs().clamp(max=20))
        if "side" in form:
            terms = 64 * terms  # the coefficients of the polynomials, which alternate
            finite &= (z >= row.lowest) & ((sides(dy) > 0) | (z < 0))  # no other outputs lie on these sides
        allowed = 8 * torch.finfo(dtype).eps * (exact[form].abs() + terms.nan_to_num(nan=0, posinf=0))
        wrong = finite & ~((result.double() - exact[form]).abs() <= allowed)
        worst = list(zip(dy[wrong].tolist(), z[wrong].tolist(), result[wrong].tolist(), strict=True))[:3]
        assert not worst, f"{row.name} {form}{params}: (dy, z, result) = {worst}"


def primitive_points(dtype: torch.dtype) -> Tensor:
    """The corners, and ±10ᵏ for k from -30 to 1.9: e^80 is within float32."""
    size = torch.logspace(-30, 1.9, (N - len(CORNERS)) // 2, dtype=torch.float64)
    x = torch.cat([size, -size, torch.tensor(CORNERS, dtype=torch.float64)])
    return torch.nn.functional.pad(x, (0, N - len(x))).to(dtype)


def check_primitive(name: str, dtype: torch.dtype, got: Tensor) -> None:
    """As torch, to a few units in the last place of the result itself, however small that is, or of its terms."""
    x = primitive_points(dtype).double()
    expected = getattr(formulas, name)(x, *NUMBERS.get(name, ()))
    info = torch.finfo(dtype)
    allowed = (
        4 * info.eps * (expected.abs() + TERMS[name](x, expected) if name in TERMS else expected.abs()) + info.tiny
    )
    special = ~expected.to(dtype).isfinite()
    torch.testing.assert_close(got[special], expected.to(dtype)[special], rtol=0, atol=0, equal_nan=True)
    wrong = ~special & ~((got.double() - expected).abs() <= allowed)
    assert not wrong.any(), (
        f"{name}: (x, result) = {list(zip(x[wrong].tolist(), got[wrong].tolist(), strict=True))[:3]}"
    )


DRIVER = """
#include <cstddef>
#include <utility>

#include "activations.h"

using namespace fastbp;

template <class Row, class T, std::size_t... I>
void run(const T* dy, const T* z, [[maybe_unused]] const T* p, T* out, std::size_t n, std::index_sequence<I...>) {
  for (std::size_t i = 0; i < n; ++i) {
    out[i] = Row::value(z[i], p[I]...);
    out[n + i] = Row::grad(dy[i], z[i], p[I]...);
    if constexpr (Row::has_grad_from_output) out[2 * n + i] = Row::grad_from_output(dy[i], z[i], p[I]...);
    if constexpr (Row::has_grad_from_side) {
      out[3 * n + i] = Row::grad_from_side(dy[i], z[i], T(i % 2));
      out[4 * n + i] = Row::grad_from_side_16(dy[i], z[i], T(i % 2));
    }
  }
}

#define ROW_OF(T, NAME) \\
  extern "C" void NAME##_##T(const T* dy, const T* z, const T* p, T* out, std::size_t n) { \\
    run<act::NAME>(dy, z, p, out, n, std::make_index_sequence<act::NAME::num_params>{}); \\
  }
#define ROW(NAME) ROW_OF(float, NAME) ROW_OF(double, NAME)
FASTBP_FOR_EACH_ACTIVATION(ROW)

#define PRIMITIVE_OF(T, NAME, ...) \\
  extern "C" void prim_##NAME##_##T(const T* x, T* out, std::size_t n) { \\
    for (std::size_t i = 0; i < n; ++i) out[i] = prim::NAME<T>(x[i] __VA_OPT__(, ) __VA_ARGS__); \\
  }
#define PRIMITIVE(...) PRIMITIVE_OF(float, __VA_ARGS__) PRIMITIVE_OF(double, __VA_ARGS__)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("cxx")
    primitives = [f"PRIMITIVE({', '.join(map(str, (name, *NUMBERS.get(name, ()))))})\n" for name in PRIMITIVES]
    (folder / "driver.cpp").write_text(DRIVER + "".join(primitives))
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, "driver.cpp", "-o", "driver.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "driver.so"))


def call(function, *tensors: Tensor) -> None:
    function(*(ctypes.c_void_p(t.data_ptr()) for t in tensors), ctypes.c_size_t(N))


@each_dtype
@each_row
def test_cxx_row(library, name, dtype):
    for params in params_of(ROWS[name]):
        got = torch.full((len(ROW_OF), N), NAN, dtype=dtype)
        call(library[f"{name}_{CTYPES[dtype]}"], *points(params, dtype), torch.tensor(params, dtype=dtype), got)
        check_row(ROWS[name], params, dtype, got)


@each_dtype
@each_primitive
def test_cxx_primitive(library, name, dtype):
    got = torch.full((N,), NAN, dtype=dtype)
    call(library[f"prim_{name}_{CTYPES[dtype]}"], primitive_points(dtype), got)
    check_primitive(name, dtype, got)


if triton is not None:

    @triton.jit
    def row_kernel(
        dy,
        z,
        out,
        params,
        VALUE: tl.constexpr,
        GRAD: tl.constexpr,
        GRAD_FROM_OUTPUT: tl.constexpr,
        GRAD_FROM_SIDE: tl.constexpr,
        N: tl.constexpr,
    ):
        i = tl.arange(0, N)
        dy_i, z_i = tl.load(dy + i), tl.load(z + i)
        value, grad = VALUE(z_i, *params), GRAD(dy_i, z_i, *params)
        tl.static_assert(value.dtype == z_i.dtype and grad.dtype == z_i.dtype)  # a literal may have promoted them
        tl.store(out + i, value)
        tl.store(out + N + i, grad)
        if GRAD_FROM_OUTPUT is not None:
            grad = GRAD_FROM_OUTPUT(dy_i, z_i, *params)
            tl.static_assert(grad.dtype == z_i.dtype)
            tl.store(out + 2 * N + i, grad)
        if GRAD_FROM_SIDE is not None:
            grad = GRAD_FROM_SIDE(dy_i, z_i, (i % 2).to(z_i.dtype))
            tl.static_assert(grad.dtype == z_i.dtype)
            tl.store(out + 3 * N + i, grad)

    @triton.jit
    def primitive_kernel(x, out, numbers, FUNCTION: tl.constexpr, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, FUNCTION(tl.load(x + i), *numbers))


def kernels_of(name: str) -> list[object]:
    from fastbp.backends.triton import _activations

    return [getattr(_activations, f"{name}_{form}", None) for form in render.FORMS]


def interpret(path: str) -> None:
    """Every row and primitive by the interpreter, the results to the file."""
    from fastbp.backends.triton import primitives

    results = {}
    for dtype in CTYPES:
        for row in TABLE:
            for params in params_of(row):
                got = results[f"{row.name} {params} {dtype}"] = torch.full((len(ROW_OF), N), NAN, dtype=dtype)
                row_kernel[(1,)](*points(params, dtype), got, params, *kernels_of(row.name), N)
        for name in PRIMITIVES:
            got = results[f"{name} {dtype}"] = torch.full((N,), NAN, dtype=dtype)
            primitive_kernel[(1,)](primitive_points(dtype), got, NUMBERS.get(name, ()), getattr(primitives, name), N)
    torch.save(results, path)


def compile_ahead() -> None:
    """Every row for sm_90, and one that uses most primitives for its neighbours; none of these GPUs need be here."""
    for capability, names in ((90, ROWS), (80, ("softplus",)), (100, ("softplus",))):
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        for name, ty in product(names, ("fp32", "fp64")):
            constants = dict(
                zip(("VALUE", "GRAD", "GRAD_FROM_OUTPUT", "GRAD_FROM_SIDE", "N"), (*kernels_of(name), N), strict=True)
            )
            signature: dict[str, object] = dict.fromkeys(("dy", "z", "out"), f"*{ty}")
            signature |= {"params": (ty,) * len(ROWS[name].params), **dict.fromkeys(constants, "constexpr")}
            source = triton.compiler.ASTSource(row_kernel, signature=signature, constexprs=constants)
            assert triton.compile(source, target=target).asm["cubin"], (name, ty, capability)


def run_as_script(interpret: str, folder: Path, *arguments: str) -> None:
    environ = dict(os.environ, TRITON_INTERPRET=interpret, TRITON_CACHE_DIR=str(folder), PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, __file__, *arguments], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    run_as_script("1", folder, "interpret", str(folder / "results.pt"))
    return torch.load(folder / "results.pt")


@needs_triton
@each_dtype
@each_row
def test_triton_row(interpreted, name, dtype):
    for params in params_of(ROWS[name]):
        check_row(ROWS[name], params, dtype, interpreted[f"{name} {params} {dtype}"])


@needs_triton
@each_dtype
@each_primitive
def test_triton_primitive(interpreted, name, dtype):
    check_primitive(name, dtype, interpreted[f"{name} {dtype}"])


@needs_triton
def test_triton_compiles(tmp_path):
    run_as_script("0", tmp_path, "compile_ahead")


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        interpret(sys.argv[2])
    else:
        compile_ahead()
