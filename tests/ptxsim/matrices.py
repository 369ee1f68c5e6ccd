"""Matrices that the lanes of a warp hold together (ISA, "ldmatrix", "stmatrix", "mma")."""

from __future__ import annotations

import numpy as np

from . import fragments
from .dtypes import LANES, f4, u4
from .faults import Unsupported
from .ir import Vector
from .operands import LANE, Operands


class Matrices(Operands):
    def make_stmatrix(self, instr):
        number, trans = int(next(m for m in instr.mods if m in ("x1", "x2", "x4"))[1]), "trans" in instr.mods
        address = self.shared_address(instr.args[0])
        source = instr.args[1]
        values = [self.reader(v, u4) for v in (source.parts if isinstance(source, Vector) else (source,))]

        def stmatrix(w, g, m):
            if not self.whole(w, g):
                return False
            used = 8 * number > LANE
            shared, at = self.check_shared(w, instr, address(w), None if number == 4 else used, 16, True, True)
            for i, value in enumerate(values):
                rows = at[8 * i : 8 * i + 8]
                matrix = value(w).view(np.uint16).reshape(8, 8)
                block = matrix.T if trans else matrix  # transposed: lane 4 c + t has rows 2 t, 2 t + 1 of column c
                shared.views[2][(rows[:, None] >> 1) + np.arange(8)] = block
            return True

        return stmatrix

    def make_ldmatrix(self, instr):
        number, trans = int(next(m for m in instr.mods if m in ("x1", "x2", "x4"))[1]), "trans" in instr.mods
        if "m8n8" not in instr.mods or "b16" not in instr.mods:
            raise Unsupported(instr.name)
        d = instr.args[0]
        writers = [self.writer(r, u4) for r in (d.parts if isinstance(d, Vector) else (d,))]
        address = self.shared_address(instr.args[1])

        def ldmatrix(w, g, m):
            if not self.whole(w, g):
                return False
            used = 8 * number > LANE
            shared, at = self.check_shared(w, instr, address(w), None if number == 4 else used, 16, False, True)
            for i, put in enumerate(writers):
                rows = at[8 * i : 8 * i + 8]
                block = shared.views[2][(rows[:, None] >> 1) + np.arange(8)]
                if trans:
                    block = block.T
                put(w, np.ascontiguousarray(block).view(u4).reshape(LANES), None)
            return True

        return ldmatrix

    def make_mma(self, instr):
        shape, kinds = next(m for m in instr.mods if m.startswith("m")), instr.mods[-4:]
        d, a, b, c = instr.args
        puts = [self.writer(r, f4) for r in d.parts]
        tf32 = kinds[1] == "tf32"
        a_of, b_of = [self.reader(r, u4) for r in a.parts], [self.reader(r, u4) for r in b.parts]
        c_of = [self.reader(r, f4) for r in c.parts]
        if not (kinds[0] == kinds[3] == "f32") or (shape, tf32) not in (("m16n8k16", False), ("m16n8k8", True)):
            raise Unsupported(instr.name)
        if not tf32 and kinds[1] not in ("bf16", "f16"):
            raise Unsupported(instr.name)
        rows, columns = fragments.accumulator_places(8)

        def mma(w, g, m):
            if not self.whole(w, g):
                return False
            if tf32:
                x, y = fragments.tf32_a([r(w) for r in a_of]), fragments.tf32_b([r(w) for r in b_of])
            else:
                x, y = (
                    fragments.fragment_a([r(w) for r in a_of], kinds[1]),
                    fragments.fragment_b([r(w) for r in b_of], kinds[2]),
                )
            out = (x @ y)[rows, columns]
            for put, value, before in zip(puts, out, c_of, strict=True):
                put(w, value + before(w), None)
            return True

        return mma
