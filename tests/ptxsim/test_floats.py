"""Floating-point instructions and conversions against exact fractions and against torch."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from ptxsim import Device

from .small_kernels import LOAD, kernel, random_words, run

PAIRS = "mov.b32 %f1, %r10; mov.b32 %f2, %r11; mov.b32 %f3, %r12; {} mov.b32 %r20, %f4;"


def floats(words: np.ndarray) -> np.ndarray:
    return words.astype(np.uint32).view(np.float32)


def telling(seed: int, rows: int = 256) -> np.ndarray:
    """Words of floats: of all sizes, of one size (where sums round), subnormal, infinite, NaN, halfway cases."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 32, (rows, 3), dtype=np.uint64).astype(np.uint32)
    near = rng.standard_normal((rows, 3)).astype(np.float32).view(np.uint32)
    short = near & np.uint32(0xFFFFF000)  # few bits: products and sums that lie half way
    tiny = rng.integers(0, 1 << 25, (rows, 3), dtype=np.uint64).astype(np.uint32)
    edge = rng.choice(np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x7F7FFFFF], np.uint32), (rows, 3))
    return np.choose(rng.integers(0, 8, (rows, 3)), [bits, near, near, near, short, short, tiny, edge])


def rounded(exact: Fraction, mode: str) -> float:
    """An exact number as float32."""
    with np.errstate(over="ignore"):
        return _rounded(exact, mode)


def _rounded(exact: Fraction, mode: str) -> float:
    near = np.float32(float(exact)) if abs(exact) < 2**200 else np.float32(math.inf * (1 if exact > 0 else -1))
    candidates = [near, *(np.nextafter(near, np.float32(x)) for x in (-np.inf, np.inf))]
    largest = Fraction(2**128)  # stands for infinity, as its half way to the largest number does
    value = {float(c): Fraction(float(c)) if np.isfinite(c) else largest * (1 if c > 0 else -1) for c in candidates}
    if mode == "rn":
        best = min(abs(v - exact) for v in value.values())
        ties = [c for c in candidates if abs(value[float(c)] - exact) == best]
        return float(next((c for c in ties if not int(c.view(np.uint32)) & 1), ties[0]))
    finite = {f: v for f, v in value.items() if np.isfinite(f)}
    below = max((f for f, v in finite.items() if v <= exact), default=-math.inf)
    above = min((f for f, v in finite.items() if v >= exact), default=math.inf)
    return {"rm": below, "rp": above, "rz": below if exact >= 0 else above}[mode]


OPERATIONS = {
    "add": ("%f1, %f2", lambda a, b, c: a + b),
    "mul": ("%f1, %f2", lambda a, b, c: a * b),
    "fma": ("%f1, %f2, %f3", lambda a, b, c: a * b + c),
}


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_rounding(operation, mode):
    args, exact = OPERATIONS[operation]
    words = telling(len(operation + mode))
    found = floats(run(PAIRS.format(f"{operation}.{mode}.f32 %f4, {args};"), words, threads=len(words)))
    compared = 0
    for row, got in zip(floats(words), found, strict=True):
        used = row[: args.count("%")]
        if not np.isfinite(used).all():
            with np.errstate(invalid="ignore", over="ignore"):
                wanted = exact(*row.astype(np.float64))
            assert np.isnan(got) == np.isnan(wanted) and (np.isnan(got) or got == wanted)
            continue
        value = exact(*(Fraction(float(x)) if np.isfinite(x) else Fraction(0) for x in row))
        if value:
            compared += 1
            assert float(got) == rounded(value, mode), (row, got)
    assert compared > 150


def test_fma_of_halfway_sums():
    """A sum in double that lies half way between floats, but for a part that double has lost."""
    rows = [(1 + 2.0**-12, 1 + 2.0**-12, s * 2.0**-60) for s in (1, -1)] + [
        (1.0, 1 + 2.0**-23, 2.0**-24 * (1 + 2.0**-20))
    ]
    rows += [(2.0**-70, 2.0**-70, 1.5 * 2.0**-149), (-(2.0**-90), 2.0**-80, 2.5 * 2.0**-149)]
    words = np.zeros((32, 3), np.uint32)
    words[: len(rows)] = np.array(rows, np.float32).view(np.uint32)
    found = floats(run(PAIRS.format("fma.rn.f32 %f4, %f1, %f2, %f3;"), words))
    for row, got in zip(np.array(rows, np.float32), found[: len(rows)], strict=True):
        assert float(got) == rounded(Fraction(float(row[0])) * Fraction(float(row[1])) + Fraction(float(row[2])), "rn")


def test_fma_of_doubles():
    rng = np.random.default_rng(5)
    a = rng.standard_normal((96, 3)) * 2.0 ** rng.integers(-30, 30, (96, 3))
    a[::3, 2] = -(a[::3, 0] * a[::3, 1])  # what is left of a sum that cancels
    a[1, :] = 1e200, 1e200, -1e300
    a[2, :] = 1e-200, 1e-200, 5e-324
    a[4, :] = 1 + 2.0**-30, 1 + 2.0**-23, 2.0**-120
    body = LOAD.format(step=24, out=8) + "ld.global.f64 %fd1, [%rd4]; ld.global.f64 %fd2, [%rd4+8];"
    body += "ld.global.f64 %fd3, [%rd4+16]; fma.rn.f64 %fd4, %fd1, %fd2, %fd3; st.global.f64 [%rd6], %fd4;"
    device = Device(1 << 16)
    out = device.empty(96, np.float64)
    device.launch(kernel(body), 1, 96, [device.put(a), out])
    for row, got in zip(a.tolist(), device.get(out).tolist(), strict=True):
        exact = Fraction(row[0]) * Fraction(row[1]) + Fraction(row[2])
        assert got == (float(exact) if abs(exact) < 2**1023 else math.inf * (1 if exact > 0 else -1))


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("operation", ["add", "mul", "fma"])
def test_halves(kind, operation):
    """Packed halves against exact fractions, rounded by torch."""
    words = telling(7)
    args = "%r10, %r11, %r12" if operation == "fma" else "%r10, %r11"
    found = run(f"{operation}.rn.{kind}x2 %r20, {args};", words, threads=len(words))
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    as_half = lambda x: torch.from_numpy(x.view(np.int16).copy()).view(dtype)  # noqa: E731
    x = as_half(words).double().view(-1, 3, 2)
    wanted = {"add": x[:, 0] + x[:, 1], "mul": x[:, 0] * x[:, 1], "fma": x[:, 0] * x[:, 1] + x[:, 2]}[operation]
    got, compared = as_half(found).double().view(-1, 2), 0
    for value, near, parts in zip(got.flatten(), wanted.flatten(), x.transpose(1, 2).reshape(-1, 3), strict=True):
        if not torch.isfinite(parts[: args.count("%")]).all() or not torch.isfinite(value):
            assert torch.isnan(value) == torch.isnan(near)
            continue
        compared += 1
        a, b, c = (Fraction(float(p)) if math.isfinite(p) else Fraction(0) for p in parts)
        exact = {"add": a + b, "mul": a * b, "fma": a * b + c}[operation]
        bits = torch.tensor([float(value)], dtype=dtype).view(torch.int16)
        for step in (-1, 1):  # neither neighbour is nearer
            other = (bits + step).view(dtype).double().item()
            if math.isfinite(other):
                assert abs(Fraction(float(value)) - exact) <= abs(Fraction(other) - exact)
    assert compared > 150


CONVERSIONS = {
    "cvt.rn.bf16.f32 %h1, %f1; cvt.u32.u16 %r20, %h1;": lambda x: x.bfloat16().view(torch.int16),
    "cvt.rn.f16.f32 %h1, %f1; cvt.u32.u16 %r20, %h1;": lambda x: x.half().view(torch.int16),
    "cvt.rn.bf16x2.f32 %r20, %f2, %f1; and.b32 %r20, %r20, 65535;": lambda x: x.bfloat16().view(torch.int16),
    "cvt.rn.f16x2.f32 %r20, %f2, %f1; and.b32 %r20, %r20, 65535;": lambda x: x.half().view(torch.int16),
    "cvt.rn.satfinite.e4m3x2.f32 %h1, %f2, %f1; cvt.u32.u16 %r20, %h1; and.b32 %r20, %r20, 255;": lambda x: (
        torch.where(x.isnan(), x, x.clamp(-448, 448)).to(torch.float8_e4m3fn).view(torch.uint8)
    ),
}


@pytest.mark.parametrize("operations", CONVERSIONS)
def test_to_fewer_bits(operations):
    words = telling(11, 512)
    words[:100, 0] = (np.random.default_rng(3).standard_normal(100) * 100).astype(np.float32).view(np.uint32)
    x = floats(words)[:, 0].copy()
    body = "mov.b32 %f1, %r10; mov.b32 %f2, %r11; " + operations
    found = run(body, words, threads=len(words)).astype(np.int64)
    wanted = CONVERSIONS[operations](torch.from_numpy(x)).numpy().astype(np.int64) & 0xFFFF
    nan = np.isnan(x)
    assert (found[~nan] == wanted[~nan]).all()
    largest = {True: 0x7F, False: 0x7C00 if "f16" in operations and "bf16" not in operations else 0x7F80}[
        "e4m3" in operations
    ]
    assert ((found[nan] & 0x7FFF) >= largest).all()


def test_from_fewer_bits():
    codes = np.zeros((256, 3), np.uint32)
    codes[:, 0] = np.arange(256) | np.arange(256)[::-1] << 8
    found = run("cvt.u16.u32 %h1, %r10; cvt.rn.f16x2.e4m3x2 %r20, %h1;", codes, threads=256)
    low = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).half()
    pairs = torch.stack([low, low.flip(0)], 1).view(torch.int16).numpy().view(np.uint32).reshape(-1)
    nan = np.array([127, 255, 0, 128])
    assert (np.delete(found, nan) == np.delete(pairs, nan)).all()
    every = np.arange(1 << 16, dtype=np.uint32)[::64]
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        words = np.stack([every, every, every], 1)
        body = f"cvt.u16.u32 %h1, %r10; cvt.f32.{kind} %f4, %h1; mov.b32 %r20, %f4;"
        got = floats(run(body, words, threads=len(words)))
        wanted = torch.from_numpy(every.astype(np.uint16).view(np.int16)).view(dtype).float().numpy()
        assert np.array_equal(got, wanted, equal_nan=True)


@pytest.mark.parametrize(
    ("mode", "function"), [("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)]
)
@pytest.mark.parametrize("to", ["s32", "u32"])
def test_to_integers(mode, function, to):
    words = telling(13)
    words[:32, 0] = (np.arange(32) / 2 - 8).astype(np.float32).view(np.uint32)
    found = run(f"mov.b32 %f1, %r10; cvt.{mode}.{to}.f32 %r20, %f1;", words, threads=len(words))
    low, high = (-(1 << 31), (1 << 31) - 1) if to == "s32" else (0, (1 << 32) - 1)
    for x, got in zip(floats(words)[:, 0].tolist(), found.tolist(), strict=True):
        wanted = 0 if math.isnan(x) else high if x == math.inf else low if x == -math.inf else function(x)
        assert got == max(low, min(high, wanted)) & 0xFFFFFFFF, x


def test_a_nan_of_64_bits_to_an_integer():
    """ISA, "cvt": the top bit alone where either type has 64 bits, else zero."""
    body = "mov.u32 %r13, 0x7fc00000; mov.b32 %f1, %r13; cvt.f64.f32 %fd1, %f1; cvt.rzi.s32.f64 %r20, %fd1;"
    assert (run(body, random_words(1)) == 0x80000000).all()
    body = "mov.u32 %r13, 0x7fc00000; mov.b32 %f1, %r13; cvt.rzi.s64.f32 %rd20, %f1; shr.u64 %rd20, %rd20, 32;"
    assert (run(body + "cvt.u32.u64 %r20, %rd20;", random_words(1)) == 0x80000000).all()


UNARY = {
    "ex2.approx.f32": np.exp2, "lg2.approx.f32": np.log2, "sqrt.rn.f32": np.sqrt, "tanh.approx.f32": np.tanh,
    "rcp.rn.f32": lambda x: 1 / x, "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x), "abs.f32": np.abs,
    "neg.f32": lambda x: -x, "sin.approx.f32": np.sin, "cos.approx.f32": np.cos, "cvt.rni.f32.f32": np.rint,
    "cvt.sat.f32.f32": lambda x: np.clip(x, 0, 1),
    "abs.ftz.f32": lambda x: np.where(np.abs(x) < 2.0**-126, 0, np.abs(x)),
}  # fmt: skip


@pytest.mark.parametrize("operation", UNARY)
def test_functions(operation):
    x = np.random.default_rng(1).standard_normal((32, 3)).astype(np.float32)
    x[::5] *= np.float32(1e-38)
    found = floats(run(PAIRS.format(f"{operation} %f4, %f1;"), x.view(np.uint32)))
    with np.errstate(all="ignore"):
        wanted = UNARY[operation](x[:, 0].astype(np.float64)).astype(np.float32)
    np.testing.assert_allclose(found, wanted, rtol=3e-7, atol=1e-44)


@pytest.mark.parametrize("nan", ["", ".NaN"])
def test_the_larger_of_a_number_and_a_nan(nan):
    words = telling(17)
    found = floats(run(PAIRS.format(f"max{nan}.f32 %f4, %f1, %f2;"), words, threads=len(words)))
    a, b = floats(words)[:, 0], floats(words)[:, 1]
    np.testing.assert_array_equal(found, np.maximum(a, b) if nan else np.fmax(a, b))


@pytest.mark.parametrize("compare", ["lt", "ge", "ne", "equ", "neu", "ltu", "geu", "num", "nan"])
def test_comparisons_with_nan(compare):
    words = telling(19)
    body = PAIRS.format(f"setp.{compare}.f32 %p1, %f1, %f2;").replace("mov.b32 %r20, %f4;", "selp.b32 %r20, 1, 0, %p1;")
    found = run(body, words, threads=len(words)).astype(bool)
    for a, b, got in zip(*floats(words)[:, :2].T.tolist(), found, strict=True):
        nan = math.isnan(a) or math.isnan(b)
        wanted = {"lt": a < b, "ge": a >= b, "ne": a != b and not nan, "equ": a == b or nan, "neu": a != b or nan,
                  "ltu": a < b or nan, "geu": a >= b or nan, "num": not nan, "nan": nan}[compare]  # fmt: skip
        assert got == wanted, (a, b)


@pytest.mark.parametrize("compare", ["eq", "le", "gt", "neu"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_comparisons_of_pairs(kind, compare):
    """A predicate for the low halves and one for the high ones."""
    words = random_words(7, 256)
    words[::5, 1] = words[::5, 0]  # some are equal
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    x, y = (torch.from_numpy(words[:, i].copy().view(np.int16)).view(dtype).float() for i in (0, 1))
    function = {"eq": torch.eq, "le": torch.le, "gt": torch.gt}.get(compare)
    wanted = function(x, y) if function else ~torch.eq(x, y)
    low, high = wanted.view(256, 2).unbind(1)
    body = f"setp.{compare}.{kind}x2 %p1|%p2, %r10, %r11; selp.u32 %r13, 1, 0, %p1; selp.u32 %r14, 2, 0, %p2; "
    found = run(body + "or.b32 %r20, %r13, %r14;", words, threads=256)
    assert np.array_equal(found, (low.int() + 2 * high.int()).numpy().astype(np.uint32))
