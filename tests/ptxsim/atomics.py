"""Atomics, and instructions on addresses (ISA, "atom", "red", "mapa", "isspacep")."""

from __future__ import annotations

import numpy as np

from .dtypes import LANES, LOCAL_WINDOW, NUMPY, PARAM_WINDOW, SHARED_WINDOW, i8, u4, u8
from .ir import Address
from .memory import BASE
from .operands import BLOCK_MASK, FULL, RANK_SHIFT, Operands


class Atomics(Operands):
    def make_atom(self, instr):
        op = next(m for m in instr.mods if m in ("add", "exch", "cas", "max", "min", "and", "or", "xor", "inc", "dec"))
        dtype = NUMPY[instr.mods[-1]]
        returns = instr.op == "atom"
        args = instr.args if returns else [None, *instr.args]
        put = self.writer(args[0], dtype)
        address = self.address(args[1])
        operands = [self.reader(a, dtype) for a in args[2:]]
        space = self.space(instr)

        def atomic(w, g, m):
            at = address(w)
            where, at = self.resolve(w, instr, at, m) if space == "generic" else (space, at)
            if where == "global":
                at = self.check_global(w, instr, at, m, dtype.itemsize, True, atomic=True)
                view = w.sim.memory.bytes.view(dtype)
            else:
                shared, at = self.check_shared(w, instr, at, m, dtype.itemsize, True, atomic=True)
                view = shared.bytes[: len(shared.bytes) // 8 * 8].view(dtype)
            at = at >> (dtype.itemsize.bit_length() - 1)
            values = [o(w) for o in operands]
            old = np.zeros(LANES, dtype)
            lanes = np.flatnonzero(FULL if m is None else m).tolist()
            w.sim.rng.shuffle(lanes)
            for lane in lanes:
                i = at[lane]
                old[lane] = view[i]
                x = values[0][lane]
                if op == "add":
                    view[i] = view[i] + x
                elif op == "exch":
                    view[i] = x
                elif op == "cas":
                    if view[i] == x:
                        view[i] = values[1][lane]
                elif op in ("max", "min"):
                    view[i] = max(view[i], x) if op == "max" else min(view[i], x)
                elif op in ("and", "or", "xor"):
                    view[i] = {"and": view[i] & x, "or": view[i] | x, "xor": view[i] ^ x}[op]
                else:
                    self.fault("unsupported", w, instr, op)
            put(w, old, m)
            return True

        return atomic

    make_red = make_atom

    def make_mapa(self, instr):
        d, a, b = instr.args
        wide = instr.mods[-1] == "u64"
        dtype = u8 if wide else u4
        put = self.writer(d, dtype)
        address, rank = (self.address(a) if isinstance(a, Address) else self.reader(a)), self.reader(b, i8)

        def mapa(w, g, m):
            at = address(w)
            window = SHARED_WINDOW if int(at[self.first(m)]) >= SHARED_WINDOW else 0
            at = ((at - window) & BLOCK_MASK) | ((rank(w) + 1) << RANK_SHIFT)
            put(w, (at + window).astype(dtype), m)
            return True

        return mapa

    def make_isspacep(self, instr):
        p, a = instr.args
        put, address = self.writer(p, np.dtype(bool)), self.reader(a)
        space = instr.mods[0].split("::")[0]
        low = {"global": BASE, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}[space]
        high = {"global": 1 << 60, "shared": LOCAL_WINDOW, "local": PARAM_WINDOW, "param": BASE}[space]

        def isspacep(w, g, m):
            at = address(w)
            put(w, (at >= low) & (at < high), m)
            return True

        return isspacep
