"""Fit the polynomials behind the kernels' exp, tanh, erf, log1p and Φ: ``python tools/fit_polynomials.py``.

Writes ``csrc/cpu/polynomials.h``, coefficients of the highest power first, for float, double and Coarse (float for
results of 16 bits), and the normal distribution in pieces; ``fastbp/backends/triton/_polynomials.py``, what the Triton
primitives need of the same; and ``csrc/cuda/normal_logit.h``, what those of CUDA need. Each polynomial is a weighted
least-squares fit at Chebyshev's nodes, in 60 digits, near enough to the best one there is; the degrees are the least
that leave the error of the fit under a quarter of a rounding unit.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mpmath import mp

ROOT = Path(__file__).resolve().parents[1]
Function = Callable[[Any], Any]
mp.dps = 60


@dataclass(frozen=True)
class Polynomial:
    """One row: a function, where it is fitted, and how an error in it reaches the result, relative to the result."""

    name: str
    meaning: str
    function: Function
    interval: tuple[Any, Any]
    reach: Function


def expm1_tail(r: Any) -> Any:
    return (mp.expm1(r) - r) / r**2 if r else mp.mpf(1) / 2


def erf_tail(s: Any) -> Any:
    x = mp.sqrt(s)
    return mp.erf(x) / x - 1 if s else 2 / mp.sqrt(mp.pi) - 1


def erfc_ratio(t: Any) -> Any:
    return -mp.log(mp.erfc(t)) / t if t else 2 / mp.sqrt(mp.pi)


def tanh_tail(s: Any) -> Any:
    x = mp.sqrt(s)
    return mp.tanh(x) / x - 1 if s else mp.mpf(0)


def atanh_tail(w: Any) -> Any:
    s = mp.sqrt(w)
    return (2 * mp.atanh(s) - 2 * s) / s**3 if w else mp.mpf(2) / 3


def rows(kind: str) -> list[Polynomial]:
    """The polynomials of a type; ``kind`` decides where erf has become 1."""
    end = 6 if kind == "double" else 4
    half, w = mp.log(2) / 2 * mp.mpf("1.01"), (mp.sqrt(2) - 1) ** 4 * mp.mpf("1.01")
    if kind == "Coarse":
        erf = [
            Polynomial(
                "kErfc", f"−log(erfc(t)) / t, 0 ≤ t ≤ {end}", erfc_ratio, (mp.mpf(0), mp.mpf(end)),
                lambda t: mp.erfc(t) * t / mp.erf(t) if t else mp.sqrt(mp.pi) / 2,
            ),
        ]  # fmt: skip
    else:
        erf = [
            Polynomial("kErf", "erf(√s) / √s − 1, 0 ≤ s ≤ 1", erf_tail, (mp.mpf(0), mp.mpf(1)), lambda s: 1),
            Polynomial(
                "kErfc", f"−log(erfc(1 + t)), 1 ≤ 1 + t ≤ {end}", lambda t: -mp.log(mp.erfc(1 + t)),
                (mp.mpf(0), mp.mpf(end - 1)), lambda t: mp.erfc(1 + t),
            ),
        ]  # fmt: skip
    return [
        Polynomial("kExpm1", "(eʳ − 1 − r) / r², |r| ≤ ln 2 / 2", expm1_tail, (-half, half), lambda r: r),
        *erf,
        Polynomial("kTanh", "tanh(√s) / √s − 1, √s ≤ 0.6", tanh_tail, (mp.mpf(0), mp.mpf("0.36")), lambda s: 1),
        Polynomial("kLog", "(2 atanh(√w) − 2 √w) / √w³, √w ≤ (√2 − 1)²", atanh_tail, (mp.mpf(0), w), lambda w: w),
    ]


def fit(row: Polynomial, degree: int) -> list[Any]:
    """Coefficients, highest power first, by weighted least squares at Chebyshev's nodes."""
    count = 3 * degree + 8
    a, b = row.interval
    nodes = [(a + b) / 2 + (b - a) / 2 * mp.cos(mp.pi * (2 * i + 1) / (2 * count)) for i in range(count)]
    weights = [abs(row.reach(x)) + mp.mpf(10) ** -9 for x in nodes]
    matrix = mp.matrix([[w * x**p for p in range(degree, -1, -1)] for x, w in zip(nodes, weights, strict=True)])
    values = mp.matrix([w * row.function(x) for x, w in zip(nodes, weights, strict=True)])
    return list(mp.qr_solve(matrix, values)[0])


PIECES, WIDTH = 32, mp.mpf(7) / 32  # a width of few bits: its multiples are exact
PIECE_DEGREES = {"float": 6, "Coarse": 4}


def upper_tail(t: Any) -> Any:
    """1 − Φ(t)."""
    return mp.erfc(t / mp.sqrt(2)) / 2


def piece(degree: int, middle: Any, low: Any, high: Any) -> list[Any]:
    """1 − Φ(t) for low ≤ t ≤ high in powers of t − middle; it and its derivative, −φ, each relative to itself."""
    nodes = [(low + high) / 2 + (high - low) / 2 * mp.cos(mp.pi * (2 * i + 1) / 40) for i in range(20)]
    powers = range(degree, -1, -1)
    values = [[(t - middle) ** p / upper_tail(t) for p in powers] for t in nodes]
    slopes = [[-p * (t - middle) ** max(p - 1, 0) / mp.npdf(t) / 4 for p in powers] for t in nodes]
    ones = mp.matrix([1] * len(nodes) + [mp.mpf(1) / 4] * len(nodes))
    return list(mp.qr_solve(mp.matrix(values + slopes), ones)[0])


def normal_table(kind: str, degree: int) -> str:
    """1 − Φ(t), t ≥ 0, in pieces around the multiples of WIDTH, the last of which is 0: a row for each power."""
    pieces, cdf, pdf = [], mp.mpf(0), mp.mpf(0)
    for j in range(PIECES - 1):
        middle = j * WIDTH
        low, high = max(middle - WIDTH / 2, mp.mpf(0)), middle + WIDTH / 2
        pieces.append(piece(degree, middle, low, high))
        for t in [low + (high - low) * i / 20 for i in range(21) if high < 5]:
            value, slope = mp.polyval(pieces[-1], t - middle, derivative=1)
            cdf, pdf = max(cdf, abs(value / upper_tail(t) - 1)), max(pdf, abs(-slope / mp.npdf(t) - 1))
    pieces.append([mp.mpf(0)] * (degree + 1))
    errors = f"relative error {mp.nstr(cdf, 2)}, of the derivative {mp.nstr(pdf, 2)} (t < 5)"
    print(f"{kind} kNormal: degree {degree}, {PIECES} pieces, {errors}")
    rows = [", ".join(mp.nstr(c, 9, min_fixed=0, max_fixed=0) + "f" for c in row) for row in zip(*pieces, strict=True)]
    return (
        f"// 1 − Φ(t) around multiples of kPiece; {errors}\n"
        f"static constexpr float kPiece = {mp.nstr(WIDTH, 9)}f;\n"
        f"static constexpr float kNormal[{degree + 1}][{PIECES}] = {{{{{'}, {'.join(rows)}}}}};\n"
    )


def error(row: Polynomial, coefficients: list[Any]) -> Any:
    a, b = row.interval
    points = [a + (b - a) * i / 200 for i in range(201)]
    return max(abs((mp.polyval(coefficients, x) - row.function(x)) * row.reach(x)) for x in points)


def find(row: Polynomial, unit: float) -> tuple[list[Any], Any]:
    for degree in range(1, 40):
        coefficients = fit(row, degree)
        found = error(row, coefficients)
        if found < unit / 4:
            return coefficients, found
    raise AssertionError(f"{row.name}: no polynomial is good enough")


def cxx_header() -> str:
    text = "// Generated by tools/fit_polynomials.py; do not edit. Coefficients, highest power first.\n#pragma once\n\n"
    text += "namespace fastbp::cpu::polynomials {\n\ntemplate <class S>\nstruct Of;\n"
    for kind, digits, unit in (("float", 9, 2.0**-24), ("double", 17, 2.0**-53), ("Coarse", 9, 2.0**-15)):
        text += f"\ntemplate <>\nstruct Of<{kind}> {{\n"
        number, suffix = ("double", "") if kind == "double" else ("float", "f")
        for row in rows(kind):
            coefficients, found = find(row, unit)
            numbers = ", ".join(mp.nstr(c, digits, min_fixed=0, max_fixed=0) + suffix for c in coefficients)
            text += f"// {row.meaning}; error of the fit, as it reaches the result, {mp.nstr(found / unit, 2)} units\n"
            text += f"static constexpr {number} {row.name}[] = {{{numbers}}};\n"
            print(f"{kind} {row.name}: degree {len(coefficients) - 1}, {mp.nstr(found / unit, 2)} units")
        text += (normal_table(kind, PIECE_DEGREES[kind]) if kind in PIECE_DEGREES else "") + "};\n"
    text += "\n}  // namespace fastbp::cpu::polynomials\n"
    command = [str(Path(sys.executable).parent / "clang-format"), "--style=file", "--assume-filename=polynomials.h"]
    return formatted(text, command)


LOGIT_DEGREE, LOGIT_END = 7, mp.mpf("5.5")  # beyond, what is added to y is below 1e-6


def binary_logit(s: Any) -> Any:
    """log2((1 − Φ(x)) / Φ(x)) / x with s = x²."""
    x = mp.sqrt(s)
    return mp.log(upper_tail(x) / (1 - upper_tail(x)), 2) / x if s else -4 * mp.npdf(0) / mp.log(2)


@lru_cache(maxsize=1)
def normal_logit() -> tuple[str, list[Any]]:
    """Φ for 16 bits by its logit, fitted more closely where Φ(−|x|) is larger: what it is, and its coefficients."""
    logit = Polynomial(
        "normal_logit", "log2((1 − Φ(√s)) / Φ(√s)) / √s", binary_logit, (mp.mpf(0), LOGIT_END**2),
        lambda s: mp.sqrt(s) * upper_tail(mp.sqrt(s)) ** mp.mpf("0.125"),
    )  # fmt: skip
    coefficients = fit(logit, LOGIT_DEGREE)
    points = [LOGIT_END * i / 300 for i in range(1, 301)]
    errors = [x * (mp.polyval(coefficients, x**2) - binary_logit(x**2)) * mp.log(2) for x in points]
    bounds = ", ".join(
        f"{mp.nstr(max(abs(e) for x, e in zip(points, errors, strict=True) if x <= end), 2)} up to {mp.nstr(end, 2)}"
        for end in (2, 4, LOGIT_END)
    )
    print(f"{logit.name}: degree {LOGIT_DEGREE}, relative error {bounds}")
    return f"{logit.meaning}; Φ(−√s) is off by, relative: {bounds}.", coefficients


def numbers(coefficients: list[Any]) -> list[str]:
    return [mp.nstr(c, 9, min_fixed=0, max_fixed=0) for c in coefficients]


def triton_module() -> str:
    """erf and tanh as in float on the CPU; Φ for 16 bits."""
    names = {"kErf": "erf_near", "kErfc": "erf_far", "kTanh": "tanh_near"}
    constants = []
    for row in rows("float"):
        if row.name in names:
            coefficients, found = find(row, 2.0**-24)
            meaning = row.meaning.replace("+ t", "+ s")
            constants.append((names[row.name], f"{meaning}; off by {mp.nstr(found * 2**24, 2)} units.", coefficients))
    constants.append(("normal_logit", *normal_logit()))
    text = (
        '"""Generated by tools/fit_polynomials.py; do not edit."""\n\nimport triton\nimport triton.language as tl\n\n'
    )
    text += f"NORMAL_END_SQUARED = tl.constexpr({mp.nstr(LOGIT_END**2, 6)})\n"
    for name, meaning, coefficients in constants:
        first, *rest = numbers(coefficients)
        text += f'@triton.jit\ndef {name}(s):\n    """{meaning}"""\n    y = {first} * s + {rest[0]}\n'
        text += "".join(f"    y = y * s + {c}\n" for c in rest[1:]) + "    return y\n"
    return formatted(text, [sys.executable, "-m", "ruff", "format", "--stdin-filename", "_polynomials.py", "-"])


def cuda_header() -> str:
    """Φ for 16 bits."""
    meaning, coefficients = normal_logit()
    first, *rest = (c + "f" for c in numbers(coefficients))
    text = "// Generated by tools/fit_polynomials.py; do not edit.\n#pragma once\n\n"
    text += '#include "../primitives.h"\n\nnamespace fastbp::cuda {\n\n'
    text += f"constexpr float kNormalEndSquared = {mp.nstr(LOGIT_END**2, 6)}f;\n\n// {meaning}\n"
    text += f"HD float normal_logit(float s) {{\n  float y = {first} * s + {rest[0]};\n"
    text += "".join(f"  y = y * s + {c};\n" for c in rest[1:]) + "  return y;\n}\n\n}  // namespace fastbp::cuda\n"
    command = [str(Path(sys.executable).parent / "clang-format"), "--style=file", "--assume-filename=normal_logit.h"]
    return formatted(text, command)


def formatted(text: str, command: list[str]) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True, cwd=ROOT).stdout


TARGETS = {
    "csrc/cpu/polynomials.h": cxx_header,
    "csrc/cuda/normal_logit.h": cuda_header,
    "fastbp/backends/triton/_polynomials.py": triton_module,
}


def main() -> int:
    stale = False
    for target, render in TARGETS.items():
        path, text = ROOT / target, render()
        if path.is_file() and path.read_text() == text:
            continue
        if sys.argv[1:] == ["--check"]:  # write nothing; exit 1 and name what is stale
            print(f"fit_polynomials: {target} is stale; run `python tools/fit_polynomials.py`", file=sys.stderr)
            stale = True
        else:
            path.write_text(text)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
