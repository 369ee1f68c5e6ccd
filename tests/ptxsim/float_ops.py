"""Arithmetic of integers and floats by one opcode, and the transcendental instructions (ISA, "Floating Point")."""

from __future__ import annotations

import numpy as np

from .dtypes import NAME, NUMPY
from .expressions import Expressions


class FloatOps(Expressions):
    @staticmethod
    def direction(i) -> str | None:
        """A rounding other than to the nearest."""
        return next((m for m in i.mods if m in ("rz", "rm", "rp")), None)

    def _binary(self, i, sign):
        kind = self.kind(i)
        if self.is_float(kind):
            mode = self.direction(i)
            if mode is None:
                return self.floating(i, kind, f"({{0}} {sign} {{1}})", *i.args[1:3])
            call = {"+": "add4({0}, {1}, ", "-": "add4({0}, -{1}, ", "*": "mul4({0}, {1}, "}[sign]
            return self.floating(i, kind, f"{call}{mode!r})", *i.args[1:3])
        t = np.dtype(f"u{NUMPY[kind].itemsize}")
        have = self.storage[i.args[0].number]
        t = have if have.itemsize == t.itemsize and have.kind in "ui" else t
        return [(i.args[0], f"{self.read(i.args[1], t)} {sign} {self.read(i.args[2], t)}", t)]

    def op_add(self, i):
        return self._binary(i, "+")

    def op_sub(self, i):
        return self._binary(i, "-")

    def op_mul(self, i):
        kind = self.kind(i)
        if self.is_float(kind):
            return self._binary(i, "*")
        t = NUMPY[kind]
        a, b = self.read(i.args[1], t), self.read(i.args[2], t)
        if "lo" in i.mods:
            return [(i.args[0], f"{a} * {b}", t)]
        if "hi" in i.mods:
            return [(i.args[0], f"mul_hi({a}, {b})", t)]
        wide = np.dtype(f"{t.kind}{2 * t.itemsize}")
        return [(i.args[0], f"{a}.astype({NAME[wide]}) * {b}.astype({NAME[wide]})", wide)]

    def op_mad(self, i):
        kind = self.kind(i)
        if self.is_float(kind):
            return self.op_fma(i)
        t = NUMPY[kind]
        a, b = self.read(i.args[1], t), self.read(i.args[2], t)
        if "lo" in i.mods:
            return [(i.args[0], f"{a} * {b} + {self.read(i.args[3], t)}", t)]
        if "hi" in i.mods:
            return [(i.args[0], f"mul_hi({a}, {b}) + {self.read(i.args[3], t)}", t)]
        wide = np.dtype(f"{t.kind}{2 * t.itemsize}")
        c = self.read(i.args[3], wide)
        return [(i.args[0], f"{a}.astype({NAME[wide]}) * {b}.astype({NAME[wide]}) + {c}", wide)]

    def op_fma(self, i):
        kind = self.kind(i)
        mode = self.direction(i)
        function = "fma8({0}, {1}, {2})" if kind == "f64" else "fma4({0}, {1}, {2})"
        if kind in ("f16", "f16x2", "bf16", "bf16x2"):
            function = "fma_half({0}, {1}, {2})"  # rounded to odd in double, then once to the half format
        if mode is not None:
            function = f"fma4_directed({{0}}, {{1}}, {{2}}, {mode!r})"
        return self.floating(i, kind, function, *i.args[1:4])

    def op_div(self, i):
        kind = self.kind(i)
        if self.is_float(kind):
            return self.floating(i, kind, "({0} / {1})", *i.args[1:3])
        t = NUMPY[kind]
        return [(i.args[0], f"div_int({self.read(i.args[1], t)}, {self.read(i.args[2], t)})", t)]

    def op_rem(self, i):
        t = NUMPY[self.kind(i)]
        return [(i.args[0], f"rem_int({self.read(i.args[1], t)}, {self.read(i.args[2], t)})", t)]

    def _extreme(self, i, name):
        kind = self.kind(i)
        args = i.args[1:]
        if self.is_float(kind):
            function = f"np.{name}imum" if "NaN" in i.mods else f"np.f{name}"
            formula = f"{function}({{0}}, {{1}})" if len(args) == 2 else f"{function}({function}({{0}}, {{1}}), {{2}})"
            return self.floating(i, kind, formula, *args)
        t = NUMPY[kind]
        if kind.endswith("x2"):
            both = (f"{self.read(arg, t)}.view({kind[0].replace('s', 'i')}2)" for arg in args)
            return [(i.args[0], f"np.{name}imum({', '.join(both)}).view({NAME[t]})", t)]
        return [(i.args[0], f"np.{name}imum({self.read(args[0], t)}, {self.read(args[1], t)})", t)]

    def op_min(self, i):
        return self._extreme(i, "min")

    def op_max(self, i):
        return self._extreme(i, "max")

    def op_abs(self, i):
        kind = self.kind(i)
        if self.is_float(kind):
            return self.floating(i, kind, "np.abs({0})", i.args[1])
        t = NUMPY[kind]
        return [(i.args[0], f"np.abs({self.read(i.args[1], t)})", t)]

    def op_neg(self, i):
        kind = self.kind(i)
        if self.is_float(kind):
            return self.floating(i, kind, "(-{0})", i.args[1])
        t = NUMPY[kind]
        return [(i.args[0], f"-{self.read(i.args[1], t)}", t)]

    def op_copysign(self, i):
        return self.floating(i, self.kind(i), "np.copysign({1}, {0})", *i.args[1:3])

    def op_ex2(self, i):
        return self.floating(i, self.kind(i), "np.exp2({0})", i.args[1])

    def op_lg2(self, i):
        return self.floating(i, self.kind(i), "np.log2({0})", i.args[1])

    def op_rcp(self, i):
        one = "np.float64(1)" if self.kind(i) == "f64" else "np.float32(1)"
        return self.floating(i, self.kind(i), f"({one} / {{0}})", i.args[1])

    def op_sqrt(self, i):
        return self.floating(i, self.kind(i), "np.sqrt({0})", i.args[1])

    def op_rsqrt(self, i):
        one = "np.float64(1)" if self.kind(i) == "f64" else "np.float32(1)"
        return self.floating(i, self.kind(i), f"({one} / np.sqrt({{0}}))", i.args[1])

    def op_tanh(self, i):
        return self.floating(i, self.kind(i), "np.tanh({0})", i.args[1])

    def op_sin(self, i):
        return self.floating(i, self.kind(i), "np.sin({0})", i.args[1])

    def op_cos(self, i):
        return self.floating(i, self.kind(i), "np.cos({0})", i.args[1])

    def op_testp(self, i):
        x = self.read(i.args[1], NUMPY[self.kind(i)])
        test = {
            "finite": "np.isfinite({0})", "infinite": "np.isinf({0})", "notanumber": "np.isnan({0})",
            "number": "~np.isnan({0})",
        }[i.mods[0]]  # fmt: skip
        return [(i.args[0], test.format(x), np.dtype(bool))]
