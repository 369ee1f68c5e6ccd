"""Integer, bit and logic instructions as expressions (ISA, "Integer Arithmetic", "Logic and Shift")."""

from __future__ import annotations

import numpy as np

from .dtypes import NUMPY, u4
from .expressions import Expressions
from .faults import Unsupported
from .ir import Imm


class IntegerOps(Expressions):
    def _logic(self, i, sign):
        kind = self.kind(i)
        t = np.dtype(bool) if kind == "pred" else NUMPY[kind]
        d, a, b = i.args
        return [(d, f"{self.read(a, t)} {sign} {self.read(b, t)}", t)]

    def op_and(self, i):
        return self._logic(i, "&")

    def op_or(self, i):
        return self._logic(i, "|")

    def op_xor(self, i):
        return self._logic(i, "^")

    def op_not(self, i):
        kind = self.kind(i)
        t = np.dtype(bool) if kind == "pred" else NUMPY[kind]
        return [(i.args[0], f"~{self.read(i.args[1], t)}", t)]

    def op_shl(self, i):
        t = NUMPY[self.kind(i)]
        d, a, s = i.args
        if isinstance(s, Imm) and 0 <= s.value < t.itemsize * 8:
            return [(d, f"{self.read(a, t)} << {self.constant(s.value, t)}", t)]
        return [(d, f"shl({self.read(a, t)}, {self.read(s, u4)})", t)]

    def op_shr(self, i):
        t = NUMPY[self.kind(i)]
        d, a, s = i.args
        if isinstance(s, Imm) and 0 <= s.value < t.itemsize * 8:
            return [(d, f"{self.read(a, t)} >> {self.constant(s.value, t)}", t)]
        return [(d, f"shr({self.read(a, t)}, {self.read(s, u4)})", t)]

    def op_shf(self, i):
        d, a, b, c = i.args
        return [
            (
                d,
                f"shf({self.read(a, u4)}, {self.read(b, u4)}, {self.read(c, u4)}, {'l' in i.mods}, {'wrap' in i.mods})",
                u4,
            )
        ]

    def op_bfi(self, i):
        t = NUMPY[self.kind(i)]
        d, a, b, p, n = i.args
        if isinstance(p, Imm) and isinstance(n, Imm) and p.value + n.value <= t.itemsize * 8 and n.value > 0:
            mask = ((1 << n.value) - 1) << p.value
            moved = f"({self.read(a, t)} << {self.constant(p.value, t)})" if p.value else self.read(a, t)
            return [(d, f"({self.read(b, t)} & {self.constant(~mask, t)}) | ({moved} & {self.constant(mask, t)})", t)]
        return [(d, f"bfi({self.read(a, t)}, {self.read(b, t)}, {self.read(p, u4)}, {self.read(n, u4)})", t)]

    def op_bfe(self, i):
        t = NUMPY[self.kind(i)]
        d, a, p, n = i.args
        if isinstance(p, Imm) and isinstance(n, Imm) and t.kind == "u" and p.value + n.value <= t.itemsize * 8:
            return [
                (d, f"({self.read(a, t)} >> {self.constant(p.value, t)}) & {self.constant((1 << n.value) - 1, t)}", t)
            ]
        return [(d, f"bfe({self.read(a, t)}, {self.read(p, u4)}, {self.read(n, u4)})", t)]

    def op_prmt(self, i):
        if i.mods != ("b32",):
            raise Unsupported(i.name)
        d, a, b, c = i.args
        return [(d, f"prmt({self.read(a, u4)}, {self.read(b, u4)}, {self.read(c, u4)})", u4)]

    def op_lop3(self, i):
        d, a, b, c, table = i.args
        return [(d, f"lop3({self.read(a, u4)}, {self.read(b, u4)}, {self.read(c, u4)}, {table.value})", u4)]

    def op_popc(self, i):
        return [(i.args[0], f"popc({self.read(i.args[1], NUMPY[self.kind(i)])})", u4)]

    def op_clz(self, i):
        return [(i.args[0], f"clz({self.read(i.args[1], NUMPY[self.kind(i)])})", u4)]

    def op_brev(self, i):
        t = NUMPY[self.kind(i)]
        return [(i.args[0], f"brev({self.read(i.args[1], t)})", t)]

    def op_bfind(self, i):
        return [(i.args[0], f"bfind({self.read(i.args[1], NUMPY[self.kind(i)])})", u4)]
