"""mov, cvta, selections and comparisons as expressions (ISA, "Data Movement", "Comparison and Selection")."""

from __future__ import annotations

import numpy as np

from .dtypes import LOCAL_WINDOW, NUMPY, PARAM_WINDOW, SHARED_WINDOW, f4, u2, u4, u8
from .expressions import Expressions
from .faults import Unsupported
from .ir import Imm, Pair, Reg, Vector

COMPARE = {
    "eq": "{a} == {b}", "ne": "{a} != {b}", "lt": "{a} < {b}", "le": "{a} <= {b}",
    "gt": "{a} > {b}", "ge": "{a} >= {b}",
    "lo": "{a} < {b}", "ls": "{a} <= {b}", "hi": "{a} > {b}", "hs": "{a} >= {b}",
    "equ": "~(({a} < {b}) | ({a} > {b}))", "neu": "{a} != {b}", "ltu": "~({a} >= {b})", "leu": "~({a} > {b})",
    "gtu": "~({a} <= {b})", "geu": "~({a} < {b})", "num": "~(np.isnan({a}) | np.isnan({b}))",
    "nan": "np.isnan({a}) | np.isnan({b})",
}  # fmt: skip
COMPARE_FLOAT = COMPARE | {"ne": "({a} < {b}) | ({a} > {b})"}


class Moves(Expressions):
    def op_mov(self, i):
        d, a = i.args
        kind = self.kind(i)
        if kind == "pred":
            return [(d, self.read(a, np.dtype(bool)), np.dtype(bool))]
        t = NUMPY[kind]
        if isinstance(a, Vector) and isinstance(d, Reg):
            parts = a.parts
            if t.itemsize == 8 and len(parts) == 2:
                return [(d, f"join8({self.read(parts[0], u4)}, {self.read(parts[1], u4)})", u8)]
            if t.itemsize == 4 and len(parts) == 2:
                return [(d, f"pack2({self.read(parts[0], u2)}, {self.read(parts[1], u2)})", u4)]
            if t.itemsize == 8 and len(parts) == 4:
                low = f"pack2({self.read(parts[0], u2)}, {self.read(parts[1], u2)})"
                high = f"pack2({self.read(parts[2], u2)}, {self.read(parts[3], u2)})"
                return [(d, f"join8({low}, {high})", u8)]
            if t.itemsize == 2 and len(parts) == 2:
                return [
                    (
                        d,
                        f"({self.read(parts[0], u2)} & np.uint16(255)) | ({self.read(parts[1], u2)} << np.uint16(8))",
                        u2,
                    )
                ]
        if isinstance(d, Vector):
            parts = d.parts
            if t.itemsize == 8 and len(parts) == 2:
                x = self.read(a, u8)
                return [(parts[0], f"low4({x})", u4), (parts[1], f"high4({x})", u4)]
            if t.itemsize == 4 and len(parts) == 2:
                x = self.read(a, u4)
                return [(parts[0], f"low2({x})", u2), (parts[1], f"high2({x})", u2)]
            if t.itemsize == 8 and len(parts) == 4:
                x = self.read(a, u8)
                return [(p, f"({x} >> np.uint64({16 * n})).astype(u2)", u2) for n, p in enumerate(parts)]
            if t.itemsize == 2 and len(parts) == 2:
                x = self.read(a, u2)
                return [(p, f"({x} >> np.uint16({8 * n})) & np.uint16(255)", u2) for n, p in enumerate(parts)]
        if isinstance(a, Vector):
            raise Unsupported(i.name)
        have = self.storage[d.number]
        t = have if have.itemsize == t.itemsize and not (isinstance(a, Imm) and have.kind == "f") else t
        return [(d, self.read(a, t), t)]

    def op_cvta(self, i):
        d, a = i.args
        space = next((m for m in i.mods if m in ("global", "shared", "local", "param", "const")), "global")
        space = "shared" if any(m.startswith("shared") for m in i.mods) else space
        window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(space, 0)
        x = self.read(a, u8)
        if not window:
            return [(d, x, u8)]
        w = self.constant(window, u8)
        return [(d, f"{x} - {w}" if "to" in i.mods else f"{x} + {w}", u8)]

    def op_selp(self, i):
        d, a, b, p = i.args
        t = NUMPY[self.kind(i)]
        return [(d, f"where({self.read(p, np.dtype(bool))}, {self.read(a, t)}, {self.read(b, t)})", t)]

    def op_slct(self, i):
        d, a, b, c = i.args
        t, tc = NUMPY[i.mods[-2]], NUMPY[i.mods[-1]]
        return [(d, f"where({self.read(c, tc)} >= 0, {self.read(a, t)}, {self.read(b, t)})", t)]

    def op_setp(self, i):
        kind = self.kind(i)
        d, a, b, *c = i.args
        compare = i.mods[0]
        boolean = next((m for m in i.mods[1:] if m in ("and", "or", "xor")), None)
        p, q = (d.first, d.second) if isinstance(d, Pair) else (d, None)
        if kind in ("f16", "bf16"):
            x, y, table = self.real(a, kind), self.real(b, kind), COMPARE_FLOAT
        elif kind in ("f16x2", "bf16x2"):  # the first predicate is of the low halves, the second of the high ones
            if boolean or not isinstance(d, Pair):
                raise Unsupported(i.name)
            split = "halves" if kind == "f16x2" else "bhalves"
            x, y = (f"{split}({self.read(n, u4)})" for n in (a, b))
            pairs = zip((p, q), (0, 1), strict=True)
            return [(r, COMPARE_FLOAT[compare].format(a=f"{x}[{n}]", b=f"{y}[{n}]"), np.dtype(bool)) for r, n in pairs]
        else:
            t = NUMPY[kind]
            x, y = self.read(a, t), self.read(b, t)
            table = COMPARE_FLOAT if t.kind == "f" else COMPARE
            if "ftz" in i.mods:
                x, y = f"ftz({x})", f"ftz({y})"
        expr = f"({table[compare].format(a=x, b=y)})"
        other = f"~{expr}"
        if boolean:
            sign, with_ = {"and": "&", "or": "|", "xor": "^"}[boolean], self.read(c[0], np.dtype(bool))
            expr, other = f"{expr} {sign} {with_}", f"{other} {sign} {with_}"
        bool_ = np.dtype(bool)
        return [(p, expr, bool_)] + ([(q, other, bool_)] if q is not None else [])

    def op_set(self, i):
        compare, kind, source = i.mods[0], i.mods[-2], i.mods[-1]
        t = NUMPY[source]
        table = COMPARE_FLOAT if t.kind == "f" else COMPARE
        expr = table[compare].format(a=self.read(i.args[1], t), b=self.read(i.args[2], t))
        if kind == "f32":
            return [(i.args[0], f"({expr}).astype(f4)", f4)]
        return [(i.args[0], f"where({expr}, np.uint32(0xffffffff), np.uint32(0))", u4)]
