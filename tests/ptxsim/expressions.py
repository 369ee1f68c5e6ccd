"""Operands as Python expressions over a warp's registers R, and results as assignments under a mask."""

from __future__ import annotations

import numpy as np

from . import floats, integers
from .dtypes import LANES, NAME, NUMPY, f2, f8, u2, u4
from .faults import Unsupported
from .ir import Address, Imm, Instr, Kernel, Not, Reg, Special, Symbol
from .registers import storages

HELPERS = {k: v for module in (integers, floats) for k, v in vars(module).items() if callable(v)}
HELPERS |= {name: dtype for dtype, name in NAME.items()}
HELPERS |= {"np": np, "where": np.where, "E4M3": floats.E4M3}


class Expressions:
    """Of one kernel."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int]):
        self.kernel, self.symbols = kernel, symbols
        self.storage = storages(kernel)
        self.constants: dict[tuple, str] = {}
        self.names = dict(HELPERS)
        self.values = 0

    # operands
    def constant(self, value, dtype: np.dtype) -> str:
        key = (repr(value), dtype)
        if key not in self.constants:
            name = self.constants[key] = f"K{len(self.constants)}"
            if dtype.kind in "ui":
                value = int(value) & ((1 << 8 * dtype.itemsize) - 1)
                array = np.full(LANES, value, f"u{dtype.itemsize}").view(dtype)
            elif dtype.kind == "b":
                array = np.full(LANES, bool(value))
            else:
                array = np.full(LANES, value, dtype)
            array.flags.writeable = False
            self.names[name] = array
        return self.constants[key]

    def immediate(self, imm: Imm, dtype: np.dtype):
        if imm.bits and dtype.kind in "fui":  # the bits of a float
            source = np.array([imm.value], f"u{imm.bits // 8}").view(f"f{imm.bits // 8}")
            return float(source.astype(dtype)[0]) if dtype.kind == "f" else imm.value
        return imm.value

    def read(self, arg, dtype: np.dtype) -> str:
        if isinstance(arg, Reg):
            have = self.storage[arg.number]
            if have == dtype:
                return f"R[{arg.number}]"
            if dtype.kind == "b" or have.kind == "b":
                raise Unsupported(f"a predicate as a number: {arg}")
            if have.itemsize == dtype.itemsize:
                return f"R[{arg.number}].view({NAME[dtype]})"
            if have.itemsize > dtype.itemsize:  # the low bits
                return f"R[{arg.number}].view(u{have.itemsize}).astype(u{dtype.itemsize}).view({NAME[dtype]})"
            raise Unsupported(f"{arg.name} is narrower than {dtype}")
        if isinstance(arg, Imm):
            value = self.immediate(arg, dtype)
            if dtype.kind == "f" and arg.bits is None and isinstance(value, int) and dtype != f8:
                raise Unsupported("an integer as a float")
            return self.constant(value, dtype)
        if isinstance(arg, Special):
            return (
                f"w.special({arg.name!r}).view({NAME[dtype]})"
                if dtype.itemsize == 4
                else f"w.special({arg.name!r}).astype({NAME[dtype]})"
            )
        if isinstance(arg, Symbol):
            return self.constant(self.symbols[arg.name], dtype)
        if isinstance(arg, Address):
            return self.constant(self.symbols[arg.base.name] + arg.offset, dtype)
        if isinstance(arg, Not):
            return f"(~{self.read(arg.of, np.dtype(bool))})"
        raise Unsupported(f"operand {arg}")

    def guard(self, instr: Instr) -> str | None:
        if instr.guard is None:
            return None
        if isinstance(instr.guard, Not):
            return f"~R[{instr.guard.of.number}]"
        return f"R[{instr.guard.number}]"

    def assign(self, reg, expr: str, dtype: np.dtype, mask: str | None) -> list[str]:
        if reg is None:
            return []
        have = self.storage[reg.number]
        if have != dtype:
            if have.itemsize == dtype.itemsize:
                expr = f"({expr}).view({NAME[have]})"
            elif have.itemsize > dtype.itemsize:  # sign or zero extended
                wide = np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{have.itemsize}")
                if dtype.kind == "f":
                    expr = f"({expr}).view(u{dtype.itemsize})"
                expr = f"({expr}).astype({NAME[wide]}).view({NAME[have]})"
            else:
                raise Unsupported(f"{reg.name} is narrower than {dtype}")
        if mask:
            return [f"R[{reg.number}] = where({mask}, {expr}, R[{reg.number}])"]
        return [f"R[{reg.number}] = {expr}"]

    def kind(self, instr: Instr) -> str:
        kinds = [mod for mod in instr.mods if mod in NUMPY or mod == "pred"]
        if not kinds:
            raise Unsupported(instr.name)
        return kinds[-1]

    def is_float(self, kind: str) -> bool:
        return kind.startswith(("f", "bf"))

    def real(self, arg, kind: str) -> str:
        """A number as float32, of half types too."""
        if kind == "f16":
            return f"{self.read(arg, f2)}.astype(f4)"
        if kind == "bf16":
            return f"from_bf16({self.read(arg, u2)})"
        x = self.read(arg, NUMPY[kind])
        return x

    def floating(self, i, kind: str, formula: str, *args) -> list[tuple]:
        """A formula of real arguments {0}, {1}, ... in the precision of the instruction."""
        d = i.args[0]
        if kind in ("f16", "bf16"):
            expr = formula.format(*(self.real(a, kind) for a in args))
            return [(d, f"to_bf16({expr})", u2) if kind == "bf16" else (d, f"({expr}).astype(f2)", f2)]
        if kind in ("f16x2", "bf16x2"):
            split, pack = ("halves", "pack_f16x2") if kind == "f16x2" else ("bhalves", "pack_bf16x2")
            both = [formula.format(*(f"{split}({self.read(a, u4)})[{n}]" for a in args)) for n in (0, 1)]
            return [(d, f"{pack}({both[0]}, {both[1]})", u4)]
        t = NUMPY[kind]
        reals = [self.read(a, t) for a in args]
        flush = "ftz" in i.mods and kind == "f32"
        if flush:
            reals = [f"ftz({x})" for x in reals]
        expr = formula.format(*reals)
        if flush:
            expr = f"ftz({expr})"
        if "sat" in i.mods:
            expr = f"np.clip(np.nan_to_num({expr}, nan=0.0), 0, 1)"
        if "relu" in i.mods:
            expr = f"np.fmax({expr}, np.float32(0))"
        return [(d, expr, t)]
