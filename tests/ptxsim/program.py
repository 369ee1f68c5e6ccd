"""A kernel made ready to run: steps by program counter, translated when they are met first."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .coverage import Coverage
from .effects import Effects
from .faults import Fault, Unsupported
from .ir import Instr, Kernel, Not, registers_of
from .registers import POISON, bits_of
from .syntax import check
from .translator import Translator


class Step:
    __slots__ = ("count", "first", "full", "instr", "kind", "masked", "next", "registers")


class Program:
    """A kernel made ready to run: steps by program counter, translated when they are met first."""

    def __init__(self, kernel: Kernel, symbols: dict[str, int]):
        self.kernel, self.symbols = kernel, symbols
        self.translator = Translator(kernel, symbols)
        self.effects = Effects(self)
        self.steps: list[Step | None] = [None] * (len(kernel.instrs) + 1)
        self.met: Counter = Counter()  # steps by program counter
        self.poison = [POISON["pred"] if r.type == "pred" else POISON[bits_of(r.type)] for r in kernel.registers]
        self.poison = [
            p if r.type == "pred" else p.view(self.translator.storage[r.number])
            for p, r in zip(self.poison, kernel.registers, strict=True)
        ]

    def coverage(self) -> Coverage:
        """Of all launches of this program so far."""
        met = np.zeros(len(self.kernel.instrs), bool)
        for pc, times in self.met.items():
            if times and pc < len(met):
                met[pc : max(self.steps[pc].next, pc + 1)] = True
        return Coverage(self.kernel, met)

    def pure(self, pc: int):
        """The Python of an instruction of arithmetic, or None."""
        instr = self.kernel.instrs[pc]
        if Effects.has(instr.op) or instr.op in ("bra", "ret", "exit", "brx"):
            return None
        check(instr)
        return self.translator.statements(instr, False)

    def build(self, pc: int) -> Step:
        instrs, step = self.kernel.instrs, Step()
        step.first = pc
        if pc >= len(instrs):
            step.kind, step.count, step.instr = "exit", 0, None
            step.next, step.registers = pc, frozenset()
            self.steps[pc] = step
            return step
        instr = step.instr = instrs[pc]
        step.count, step.next, step.masked = 1, pc + 1, None
        try:
            check(instr)
            if instr.op == "bra":
                step.kind = "bra"
                step.full = None
                if instr.guard is not None:
                    negated = isinstance(instr.guard, Not)
                    step.full = ((instr.guard.of if negated else instr.guard).number, negated)
            elif instr.op in ("ret", "exit"):
                step.kind = "exit"
                step.full = self.effects.guard(instr)
            elif instr.op == "brx":
                step.kind, step.full = "effect", self.effects.brx(instr)
            elif Effects.has(instr.op):
                step.kind = "effect"
                step.full = self.effects.make(instr)
            else:
                step.kind = "arithmetic"
                end, lines = pc, []
                while end < len(instrs) and (end == pc or end not in self.kernel.leaders) and end - pc < 400:
                    try:
                        found = self.pure(end)
                        if found is None:
                            break
                    except Unsupported:
                        if end == pc:
                            raise
                        break  # a fault where it is met, if it is
                    lines += found
                    end += 1
                step.next, step.count = end, end - pc
                step.full, step.masked = self._function(pc, lines), None
        except Unsupported as reason:
            raise Fault("unsupported", f"{instr} ({reason})") from None
        except Exception as reason:  # operands of another number or kind than the form has
            raise Fault("unsupported", f"{instr} (operands that are not understood: {reason!r})") from reason
        step.registers = frozenset().union(*(self._touched(instrs[at]) for at in range(pc, max(step.next, pc + 1))))
        self.steps[pc] = step
        return step

    @staticmethod
    def _touched(instr: Instr) -> set[int]:
        """Registers that an instruction reads or writes; of wgmma those that are not its own affair."""
        return set() if instr.op == "wgmma" else {reg.number for reg in registers_of([instr.guard, *instr.args])}

    def touching(self, step: Step, registers: set[int]) -> Instr:
        instrs = self.kernel.instrs[step.first : max(step.next, step.first + 1)]
        return next(instr for instr in instrs if self._touched(instr) & registers)

    def _function(self, start: int, lines: list[str]):
        text = "\n ".join(["def run(R, w, m):", *(lines or ["pass"])])
        names = self.translator.names
        exec(compile(text, f"<{self.kernel.name[:40]}:{self.kernel.instrs[start].line}>", "exec"), names)
        return names["run"]

    def masked(self, step: Step):
        if step.masked is None:
            instrs = self.kernel.instrs[step.first : step.next]
            lines = [line for instr in instrs for line in self.translator.statements(instr, True)]
            step.masked = self._function(step.first, lines)
        return step.masked
