"""Runs of instructions that touch registers only, translated into Python functions over the 32 lanes of a warp.

A warp's registers are a list of arrays of 32 numbers. Arrays are never changed in place: an instruction binds a new
one, so a copy is a reference. A register of 32 bits is kept as float, int or unsigned by what most instructions take it
for, and seen as another type where another is asked for.
"""

from __future__ import annotations

from .conversions import Conversions
from .faults import Unsupported
from .float_ops import FloatOps
from .integer_ops import IntegerOps
from .ir import Instr
from .moves import Moves


class Translator(Moves, IntegerOps, FloatOps, Conversions):
    """Instructions of one kernel into Python."""

    def statements(self, instr: Instr, masked: bool) -> list[str]:
        """The Python of an instruction of arithmetic, under the mask m or for all lanes."""
        guard = self.guard(instr)
        mask = guard if not masked else (f"(m & {guard})" if guard else "m")
        lines = []
        for reg, expr, dtype in self.results(instr):
            lines += self.assign(reg, expr, dtype, mask)
        if mask and guard and len(lines) > 1:  # the guard may be one of the results
            lines = [f"g = {mask}", *[line.replace(f"where({mask},", "where(g,", 1) for line in lines]]
        if len(lines) > 1:  # a source may be one of the results
            lines = _parallel(lines)
        return lines

    def results(self, instr: Instr) -> list[tuple]:
        """(register, expression, type) of each result."""
        method = getattr(self, f"op_{instr.op}", None)
        if method is None:
            raise Unsupported(instr.name)
        return method(instr)


def _parallel(lines: list[str]) -> list[str]:
    """All right sides are evaluated before the first is assigned."""
    assigned = [line for line in lines if line.startswith("R[")]
    others = [line for line in lines if not line.startswith("R[")]
    lefts, rights = zip(*(line.split(" = ", 1) for line in assigned), strict=True)
    return [*others, f"{', '.join(lefts)} = {', '.join(rights)}"]
