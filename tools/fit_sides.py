"""Fit the slope of an activation as a function of its output: ``python tools/fit_sides.py``.

Writes ``fastbp/side_formulas.py``, for the activations that fall to one minimum (z*, y*) and rise from it. With the
side of the minimum known, y gives the slope back. Right of it the slope is analytic in s = √(y − y*), since
y − y* = f''(z*)/2 (z − z*)² + …; left of it slope / y is analytic in t = √log(y* / y), which grows like |z| or √|z|
where y goes to 0, so that the tail keeps its relative accuracy. Each is a weighted least-squares fit at Chebyshev's
nodes, in 40 digits: of degrees that suit results of 16 bits, and of degrees that suit float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fit_polynomials import Polynomial, fit, formatted, upper_tail
from mpmath import mp

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "fastbp" / "side_formulas.py"
mp.dps = 40

Function = Callable[[Any], Any]


def logistic(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


def tanh_argument(z: Any) -> Any:
    return mp.sqrt(2 / mp.pi) * (z + mp.mpf("0.044715") * z**3)


# Value and a guess at the place of the minimum.
ACTIVATIONS: dict[str, tuple[Function, float]] = {
    "silu": (lambda z: z * logistic(z), -1.28),
    "gelu": (lambda z: z * upper_tail(-z), -0.75),
    "gelu_tanh": (lambda z: z * logistic(2 * tanh_argument(z)), -0.75),
    "quick_gelu": (lambda z: z * logistic(mp.mpf("1.702") * z), -0.75),
    "mish": (lambda z: z * mp.tanh(mp.log1p(mp.exp(z))), -1.19),
}


@dataclass(frozen=True)
class Grade:
    """How good the polynomials are: their degrees, where the slope counts as 1, the least |y| told from 0, and the
    slope below which, left of the minimum, the error is relative to this and no longer to the slope.
    """

    suffix: str
    right: int
    left: int
    near_one: Any
    least: Any
    relative_from: Any


GRADES = (
    Grade("", 22, 14, near_one=mp.mpf("5e-7"), least=mp.mpf("1e-16"), relative_from=mp.mpf("1e-6")),
    Grade("_16", 12, 8, near_one=mp.mpf("1e-4"), least=mp.mpf("1e-9"), relative_from=mp.mpf("1e-4")),
)


def slope(value: Function, z: Any) -> Any:
    return mp.diff(value, z)


def solve(function: Function, low: Any, high: Any) -> Any:
    """A zero of a function that changes its sign between the two."""
    return mp.findroot(function, (low, high), solver="anderson", tol=mp.mpf(10) ** -30, maxsteps=200)


def one_from(value: Function, near: Any) -> Any:
    """The z from which on |slope − 1| stays below ``near``."""
    z = mp.mpf(40)
    while abs(slope(value, z) - 1) < near:
        z -= mp.mpf("0.5")
    return solve(lambda at: slope(value, at) - 1 - near, z, z + mp.mpf("0.5"))


class Fit:
    """The two polynomials of an activation in a grade, and how far they are off."""

    def __init__(self, name: str, grade: Grade) -> None:
        self.name, self.grade = name, grade
        value, guess = ACTIVATIONS[name]
        self.at = at = mp.findroot(lambda z: slope(value, z), guess)
        self.lowest = lowest = value(at)
        end = one_from(value, grade.near_one)
        self.one_above = value(end)
        s_end, t_end = mp.sqrt(self.one_above - lowest), mp.sqrt(mp.log(lowest / -grade.least))
        self.s_scale, self.t_scale = 2 / s_end, 2 / t_end

        def right_at(u: Any) -> Any:  # u in [−1, 1], of s
            s = (u + 1) / self.s_scale
            return slope(value, solve(lambda z: value(z) - lowest - s * s, at, end + 1)) if s else mp.mpf(0)

        def left_at(v: Any) -> tuple[Any, Any]:
            t = (v + 1) / self.t_scale
            y = lowest * mp.exp(-t * t)
            return y, slope(value, solve(lambda z: mp.log(value(z) / y), mp.mpf(-200), at)) if t else mp.mpf(0)

        def ratio(v: Any) -> Any:
            y, d = left_at(v)
            return d / y

        def weight(v: Any) -> Any:
            y, d = left_at(v)
            return y / (abs(d) + grade.relative_from)

        interval = (mp.mpf(-1), mp.mpf(1))
        self.right = fit(Polynomial("right", "", right_at, interval, lambda u: 1), grade.right)
        self.left = fit(Polynomial("left", "", ratio, interval, weight), grade.left)
        points = [mp.mpf(i) / 40 for i in range(-40, 41)]
        self.right_error = max(abs(mp.polyval(self.right, u) - right_at(u)) for u in points)
        self.left_error = mp.mpf(0)
        for v in points:
            y, d = left_at(v)
            self.left_error = max(self.left_error, abs(mp.polyval(self.left, v) * y - d))

    def text(self) -> str:
        """The formula, in the language of formulas.py."""
        high = mp.mpf(float(mp.nstr(self.lowest, 6)))
        lines = [f"    gap = maximum((y - {number(high)}) - {number(self.lowest - high)}, 0.0)"]
        lines += [f"    u = sqrt(gap) * {number(self.s_scale)} - 1.0"]
        lines += horner("p", "u", self.right)
        lines += [f"    right_slope = select(y > {number(self.one_above)}, y * 0.0 + 1.0, p)"]
        lines += ["    fallen = log1p(gap / -minimum(y, -1e-37))"]
        lines += [f"    v = minimum(sqrt(fallen) * {number(self.t_scale)} - 1.0, 1.0)"]
        lines += horner("q", "v", self.left)
        lines += ["    return dy * select(right > 0.0, right_slope, y * q)"]
        off = f"right {mp.nstr(self.right_error, 2)}, left {mp.nstr(self.left_error, 2)}"
        head = f"def {self.name}_grad_from_side{self.grade.suffix}(dy: Tensor, y: Tensor, right: Tensor) -> Tensor:\n"
        print(f"{self.name}{self.grade.suffix}: degrees {self.grade.right}, {self.grade.left}; off by {off}")
        return f"{head}    # the slope is off by at most: {off}\n" + "\n".join(lines) + "\n"


def number(x: Any) -> str:
    return str(mp.nstr(x, 10, min_fixed=0, max_fixed=0))


def horner(name: str, variable: str, coefficients: list[Any]) -> list[str]:
    """Statements that end in ``name``, six powers each."""
    text, lines, part = number(coefficients[0]), [], 0
    for i, c in enumerate(coefficients[1:], start=1):
        text = f"({text}) * {variable} + {number(c)}" if " " in text else f"{text} * {variable} + {number(c)}"
        if i % 6 == 0 and i < len(coefficients) - 1:
            lines.append(f"    {name}{part} = {text}")
            text, part = f"{name}{part}", part + 1
    return [*lines, f"    {name} = {text}"]


HEAD = '''"""Generated by tools/fit_sides.py; do not edit.

dz from dy, the output y and the side of the activation's minimum it lies on (``right`` above 0: z is not left of it):
the polynomials are what ``tools/fit_sides.py`` says. ``_16`` is for results of 16 bits. At y = inf the gradient is NaN,
as PyTorch's is.
"""

from torch import Tensor, log1p, sqrt
from torch import where as select

from fastbp.formulas import maximum, minimum

# Where the minimum is, the z that parts the sides, and how low it lies.
'''


def module() -> str:
    fits = [Fit(name, grade) for name in ACTIVATIONS for grade in GRADES]
    places = "".join(
        f"{f.name.upper()}_MINIMUM_AT, {f.name.upper()}_LOWEST = {mp.nstr(f.at, 17)}, {mp.nstr(f.lowest, 17)}\n"
        for f in fits
        if not f.grade.suffix
    )
    text = HEAD + places + "\n\n" + "\n\n".join(f.text() for f in fits)
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(TARGET), "-"]
    return formatted(text, command)


def main() -> int:
    text = module()
    if TARGET.is_file() and TARGET.read_text() == text:
        return 0
    if sys.argv[1:] == ["--check"]:  # write nothing; exit 1 and name what is stale
        print(f"fit_sides: {TARGET.relative_to(ROOT)} is stale; run `python tools/fit_sides.py`", file=sys.stderr)
        return 1
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
