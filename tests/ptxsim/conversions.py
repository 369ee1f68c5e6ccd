"""cvt as expressions (ISA, "cvt")."""

from __future__ import annotations

import numpy as np

from .dtypes import NAME, NUMPY, f4, u2, u4
from .expressions import Expressions


class Conversions(Expressions):
    def op_cvt(self, i):
        d, a, *more = i.args
        kinds = [m for m in i.mods if m in NUMPY or m.startswith("e4m3") or m.startswith("e5m2")]
        to, source = kinds[-2], kinds[-1]
        if to == "e4m3x2" and source == "f32":
            high, low = self.read(a, f4), self.read(more[0], f4)
            return [(d, f"to_e4m3({low}) | (to_e4m3({high}) << np.uint16(8))", u2)]
        if source == "e4m3x2" and to == "f16x2":
            x = self.read(a, u2)
            return [(d, f"pack_f16x2(E4M3[{x} & np.uint16(255)], E4M3[{x} >> np.uint16(8)])", u4)]
        if to in ("bf16x2", "f16x2") and source == "f32":
            pack = "pack_bf16x2" if to == "bf16x2" else "pack_f16x2"
            high, low = self.read(a, f4), self.read(more[0], f4)
            return [(d, f"{pack}({low}, {high})", u4)]
        rounding = next((m for m in i.mods if m in ("rzi", "rni", "rmi", "rpi")), None)
        if self.is_float(source):
            x = self.real(a, source)
            if self.is_float(to):
                if rounding:
                    function = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}[rounding]
                    x = f"np.{function}({x})"
                if "sat" in i.mods:
                    x = f"np.clip(np.nan_to_num({x}, nan=0.0), 0, 1)"
                if "ftz" in i.mods:
                    x = f"ftz({x})"
                direction = next((m for m in i.mods if m in ("rz", "rm", "rp")), None)
                if direction:
                    return [(d, f"directed4({x}, {direction!r})", f4)]
                if to == "bf16":
                    return [(d, f"to_bf16({x}.astype(f4))", u2)]
                t = NUMPY[to]
                return [(d, f"({x}).astype({NAME[t]})", t)]
            t = NUMPY[to]
            if "ftz" in i.mods:
                x = f"ftz({x})"
            of_nan = 1 << (8 * t.itemsize - 1) if source == "f64" or t.itemsize == 8 else 0
            return [(d, f"float_to_int({x}, {NAME[t]}, {rounding!r}, {of_nan})", t)]
        t = NUMPY[source]
        x = self.read(a, t)
        if to == "bf16":
            return [(d, f"to_bf16({x}.astype(f4))", u2)]
        into = NUMPY[to]
        if "sat" in i.mods:
            info = np.iinfo(into)
            return [(d, f"np.clip({x}.astype(i8), {info.min}, {info.max}).astype({NAME[into]})", into)]
        return [(d, f"{x}.astype({NAME[into]})", into)]
