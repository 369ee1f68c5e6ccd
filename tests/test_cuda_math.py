"""The device functions of csrc/cuda, compiled for the host: activations, sums, and where the numbers of a product lie.

No GPU is needed; CUDA's headers are, which nvcc knows where to find.
"""

import ctypes
import runpy
import subprocess
from pathlib import Path

import pytest
import torch
from bits import every_side_and_sign, whole
from support import ACTIVATIONS, each, places

from fastbp import side_formulas
from fastbp.activations import TABLE
from fastbp.compression import DTYPES as COMPRESSED
from fastbp.compression import (
    decode_bits,
    decode_fp8,
    decode_lsb,
    encode_bits,
    encode_fp8,
    encode_lsb,
    floor,
)
from fastbp.problem import DTYPES

ROOT = Path(__file__).parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="tables")
NAMES = [row.name for row in TABLE]
VALUE, GRAD, GRAD_FROM_OUTPUT, GATED_VALUE, GATED_GRAD = range(5)
COUNT = 8192
INF, NAN = float("inf"), float("nan")
SPECIAL = (0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, -6.0, 20.0, -20.0, 65504.0, -65504.0, 2e38, -2e38, INF, -INF, NAN)
# What the arithmetic may be off before it is rounded, relative to the terms, which are of the size of dy (1 + |z|).
ALLOWED = {torch.float64: 2**-49, torch.float32: 2**-20, torch.bfloat16: 2**-18, torch.float16: 2**-18}
each_dtype = each("dtype", DTYPES)
each_activation = each("activation", ACTIVATIONS)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    try:
        cxx, (nvcc, _) = SETUP["compiler"](), SETUP["nvcc"]()
        include, _ = SETUP["toolkit_folders"](nvcc)
    except SETUP["Unable"] as reason:
        pytest.skip(str(reason))
    to = tmp_path_factory.mktemp("cuda") / "host.so"
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    folders = [f"-I{ROOT / 'csrc'}", "-isystem", include]
    subprocess.run([*cxx, *flags, *folders, str(ROOT / "tests" / "cuda_host.cpp"), "-o", str(to)], check=True)
    return ctypes.CDLL(str(to))


def run(library, activation, form, *given):
    """What the functions make of tensors: a result, for GATED_GRAD two, and both sums for each place of a pack."""
    dtype, width = given[0].dtype, 16 // given[0].itemsize
    out, out2 = (torch.full_like(given[0], NAN) for _ in range(2))
    sums = torch.full((2, width), NAN, dtype=torch.float64)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*given, *given[:1] * (3 - len(given)), out, out2, sums)]
    params = [ctypes.c_double(p) for p in (*activation.params, 0.0, 0.0)[:2]]
    packs = ctypes.c_size_t(given[0].numel() // width)
    library.run(NAMES.index(activation.row.name), DTYPES.index(dtype), form, *pointers, packs, *params)
    return out, out2, sums


def points(dtype, params):
    """Pairs (dy, z): every special z with every special dy, a grid, random ones."""
    generator = torch.Generator().manual_seed(81)
    corners = torch.cartesian_prod(torch.tensor([1.0, -0.5, 0.0, INF, NAN]), torch.tensor([*SPECIAL, *params]))
    grid = torch.linspace(-12, 12, 2001)
    z = torch.cat([corners[:, 1], grid, torch.randn(COUNT - len(corners) - len(grid), generator=generator) * 3])
    dy = torch.cat([corners[:, 0], torch.randn(COUNT - len(corners), generator=generator)])
    return dy.to(dtype), z.to(dtype)


def assert_near(got, formula, terms, given):
    """Results against a formula in float64: half a unit of rounding, and ``ALLOWED`` of the terms.

    NaN and inf stand where the formula, computed as widely as the functions do and rounded, has them.
    """
    dtype = got.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = formula(*(t.to(wide) for t in given)).to(dtype)
    exact = formula(*(t.double() for t in given))
    elsewhere = places(got) != places(narrow)
    assert not elsewhere.any(), show(elsewhere, *given, got, narrow)
    unit = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
    wrong = narrow.isfinite() & ~((got.double() - exact).abs() <= 0.51 * unit + ALLOWED[dtype] * (exact.abs() + terms))
    assert not wrong.any(), show(wrong, *given, got, exact)


def show(where, *tensors):
    return list(zip(*(t[where].tolist() for t in tensors), strict=True))[:5]


def size(dy, z):
    """The size of the terms of dz, which may cancel; beyond |z| = 20 nothing does."""
    found = dy.double().abs() * (1 + z.double().abs().clamp(max=20))
    return found.nan_to_num(nan=0.0, posinf=0.0)


@each_dtype
@each_activation
def test_every_activation(library, activation, dtype):
    """Value, gradient, gradient from the output; of a finite dy, as inf · Φ(-20) depends on where Φ underflows."""
    row, params = activation
    dy, z = points(dtype, params)
    assert_near(run(library, activation, VALUE, z)[0], lambda z: row.value(z, *params), size(torch.ones(()), z), [z])
    fine = dy.isfinite()
    dy, z = dy[fine], z[fine]
    dy, z = (t[: t.numel() // 8 * 8].contiguous() for t in (dy, z))
    assert_near(run(library, activation, GRAD, dy, z)[0], lambda d, z: row.grad(d, z, *params), size(dy, z), [dy, z])
    if row.grad_from_output is not None:
        got = run(library, activation, GRAD_FROM_OUTPUT, dy, z)[0]
        assert_near(got, lambda d, y: row.grad_from_output(d, y, *params), size(dy, z), [dy, z])


@each_dtype
@each_activation
def test_gated(library, activation, dtype):
    """y = f(g) · u, dg = dh · u · f'(g) with the product rounded, du = dh · f(g)."""
    row, params = activation
    dh, g = points(dtype, params)
    u = torch.randn(COUNT, generator=torch.Generator().manual_seed(82)).to(dtype)
    keep = dh.isfinite() & g.isfinite()
    dh, g, u = (t[keep][: keep.sum() // 8 * 8].contiguous() for t in (dh, g, u))
    terms = size(u, g)
    assert_near(run(library, activation, GATED_VALUE, g, u)[0], lambda g, u: row.value(g, *params) * u, terms, [g, u])
    dg, du, _ = run(library, activation, GATED_GRAD, dh, g, u)
    product = (dh * u).double()  # rounded, as eager PyTorch keeps it
    assert_near(dg, lambda p, g: row.grad(p, g, *params), size(product, g), [product.to(dtype), g])
    assert_near(du, lambda d, g: d * row.value(g, *params), size(dh, g), [dh, g])


@each_dtype
@each("activation", ACTIVATIONS[::5])
def test_sums(library, activation, dtype):
    """Of what dz is before it is rounded, for each place of a pack: with every rounding the error would be a unit."""
    row, params = activation
    generator = torch.Generator().manual_seed(83)
    dy, g, u = (torch.randn(COUNT, generator=generator).to(dtype) for _ in range(3))
    width = 16 // dy.itemsize

    def near(got, dz):
        exact = dz.view(-1, width).sum(0)
        bound = dz.abs().view(-1, width).sum(0) * (2**-17 if dtype != torch.float64 else 2**-45)
        assert ((got - exact).abs() <= bound).all(), (got, exact)

    near(run(library, activation, GRAD, dy, g)[2][0], row.grad(dy.double(), g.double(), *params))
    *_, sums = run(library, activation, GATED_GRAD, dy, g, u)
    near(sums[0], row.grad((dy * u).double(), g.double(), *params))
    near(sums[1], dy.double() * row.value(g.double(), *params))


def numbers(dtype):
    """All numbers of 16 bits; of float32 as many at random, dense at 0 and at ties of e4m3; ``SPECIAL`` first."""
    if dtype.itemsize == 2:
        found = torch.arange(2**16).to(torch.uint16).view(dtype)
    else:
        generator = torch.Generator().manual_seed(85)
        size = torch.exp2(torch.rand(2**16, generator=generator) * 250 - 125)
        wide = torch.randn(2**16, generator=generator) * torch.where(torch.arange(2**16) % 4 > 0, 3.0, size)
        found = torch.cat([wide, torch.arange(2**12).mul(2**20 - 1).int().view(torch.float32)])
    return torch.cat([torch.tensor((*SPECIAL, 1e-40, 65520.0)).to(dtype), found])


def side(library, row, forward, in_codes, a, b, codes):
    """y, f(z) in float32; or dz, and its sums for each place of a pack."""
    out, wide_y = torch.full_like(a, NAN), torch.full(a.shape, NAN)
    sums = torch.full((16 // a.itemsize,), NAN, dtype=torch.float64)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, codes, out, wide_y, sums)]
    flags = [ctypes.c_bool(flag) for flag in (forward, in_codes)]
    packs = ctypes.c_size_t(a.numel() * a.itemsize // 16)
    library.side(NAMES.index(row.name), DTYPES.index(a.dtype), *flags, *pointers, packs)
    return out, wide_y, sums


SIDES = [row for row in TABLE if row.grad_from_side is not None]
each_compressed = each("dtype", COMPRESSED)


@each_compressed
@each("row", SIDES)
def test_the_side_and_the_next_bits(library, row, dtype):
    """The same bytes as compression.py has from the same f(z), and the slope that it reads from them."""
    z = numbers(dtype)
    z = z[~row.value(z.float()).isnan()]
    z = z[: z.numel() // 8 * 8]
    codes = torch.full((z.numel() // 2,), 0xAA, dtype=torch.uint8)
    y, wide_y, _ = side(library, row, True, True, z, z, codes)
    fine = ~wide_y.isnan()  # z of -inf, for which the two may differ
    assert fine.sum() > fine.numel() - 8
    assert torch.equal(whole(y)[fine], whole(wide_y.to(dtype))[fine])
    expected = encode_bits(z[None], wide_y[None], y[None], row.minimum_at)[0]
    assert torch.equal(codes[fine.view(-1, 2).all(1)], expected[fine.view(-1, 2).all(1)])
    marked, *_ = side(library, row, True, False, z, z, codes)
    assert torch.equal(whole(marked)[fine], whole(encode_lsb(z, y, row.minimum_at))[fine])

    dy = torch.randn(z.shape, generator=torch.Generator().manual_seed(86)).to(dtype)
    sixteen = getattr(side_formulas, f"{row.grad_from_side.__name__}_16")
    formula = row.grad_from_side if dtype == torch.float32 else sixteen
    kept = {
        True: (y, decode_bits(y[None], codes[None], floor(row.lowest, dtype, "output_bits"))),
        False: (marked, decode_lsb(marked[None], floor(row.lowest, dtype, "output_lsb"))),
    }
    for in_codes, (read, (from_y, right)) in kept.items():
        assert {0.0, 1.0} == set(right.unique().tolist())
        dz, _, sums = side(library, row, False, in_codes, dy, read, codes)
        exact = formula(dy.float(), from_y[0], right[0])
        unit = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)
        wrong = fine & ~((dz.float() - exact).abs() <= 0.51 * unit + 2**-14 * dy.abs().float())
        wrong &= exact.isfinite()
        assert not wrong.any(), show(wrong, dy, read, from_y[0], right[0], dz, exact)
        assert torch.equal(places(dz)[fine], places(exact.to(dtype))[fine])
        few = slice(8 * 1000, 8 * 1000 + 800)  # of numbers of one size; the sums before dz is rounded
        _, _, sums = side(library, row, False, in_codes, dy[few], read[few], codes[few.start // 2 : few.stop // 2])
        by_place = exact[few].double().view(-1, sums.numel())
        bound = 2**-15 * dy[few].double().abs().view(-1, sums.numel()).sum(0)
        assert ((sums - by_place.sum(0)).abs() <= bound).all() and by_place.abs().sum() > 1


@each_compressed
def test_marks_of_every_side_and_sign(library, dtype):
    """Of y that f should not give, too: where the side and the sign disagree."""
    z, y = every_side_and_sign(dtype)
    right, marks = (z >= -0.75).to(torch.uint8), torch.full_like(y, 5.0)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (right, y, marks)]
    library.mark(DTYPES.index(dtype), *pointers, ctypes.c_size_t(y.numel()))
    assert torch.equal(whole(marks), whole(encode_lsb(z, y, -0.75)))


@each_compressed
def test_e4m3(library, dtype):
    """Codes and scales of blocks of every kind, bit by bit, and the numbers that come back."""
    z = numbers(dtype)
    generator = torch.Generator().manual_seed(87)
    shuffled = z[torch.randperm(z.numel(), generator=generator)]  # large and small share a scale
    steps = torch.arange(0, 449 * 8) / 8  # at 448 the scale is 1: all of e4m3 and what lies between
    ties = torch.stack([steps, -steps / 2**9, steps / 2**7, torch.full_like(steps, 448.0)], 1).flatten().to(dtype)
    tiny = torch.full((64,), 1e-40).to(dtype)
    z = torch.cat([z, shuffled, ties, tiny, torch.full((64,), NAN, dtype=dtype), torch.zeros(64, dtype=dtype)])
    z = z[: z.numel() // 32 * 32]
    codes, back = torch.full((z.numel(),), 0xAA, dtype=torch.uint8), torch.full_like(z, 5.0)
    scales = torch.full((z.numel() // 32,), 0xAA, dtype=torch.uint8)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (z, codes, scales, back)]
    library.e4m3(DTYPES.index(dtype), *pointers, ctypes.c_size_t(scales.numel()))
    expected, expected_scales = encode_fp8(z)
    assert torch.equal(scales, expected_scales)
    nan = (expected & 127) == 127
    assert nan.any() and torch.equal(codes[nan] & 127, expected[nan] & 127)
    assert torch.equal(codes[~nan], expected[~nan]), show(codes != expected, z, codes, expected)
    decoded = decode_fp8(expected, expected_scales, dtype)
    assert torch.equal(whole(back)[~nan], whole(decoded)[~nan]) and back[nan].isnan().all()
    assert len(codes.unique()) > 250


@each("parts", [16, 8])
@each("by_steps", [False, True])
def test_a_tile_of_a_product(library, by_steps, parts):
    """From the operands in swizzled shared memory, by the descriptors, the registers and stmatrix, to rows of packs."""
    generator = torch.Generator().manual_seed(84)
    a = torch.randint(-9, 10, (128, 64), dtype=torch.int16, generator=generator)
    b = torch.randint(-9, 10, (128, 64), dtype=torch.int16, generator=generator)
    given = b.T.contiguous() if by_steps else b
    out = torch.zeros(128, 128, dtype=torch.int16)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, given)]
    library.product.restype = ctypes.c_bool
    once = library.product(*pointers, ctypes.c_bool(by_steps), parts, ctypes.c_void_p(out.data_ptr()))
    assert once and torch.equal(out.int(), a.int() @ b.int().T)


@each("row_pairs", [1, 3, 4, 5, 9])
@each("columns", [1, 2, 7])
def test_every_tile_is_worked_on_once(library, row_pairs, columns):
    """The blocks of a cluster have neighbouring rows of the same columns, of which they share B."""
    found = torch.full((row_pairs * columns, 2, 2), -1, dtype=torch.int32)
    library.tiles(row_pairs, columns, ctypes.c_void_p(found.data_ptr()))
    assert (found[:, 0, 0] % 2 == 0).all() and torch.equal(found[:, 1], found[:, 0] + torch.tensor([1, 0]))
    seen = {tuple(place) for place in found.view(-1, 2).tolist()}
    assert seen == {(row, column) for row in range(2 * row_pairs) for column in range(columns)}
