"""Which instructions of a kernel some launch has met."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .ir import Instr, Kernel


@dataclass(frozen=True)
class Coverage:
    """Of a kernel, over the launches so far; `a | b` is that of both."""

    kernel: Kernel
    met: np.ndarray  # bool, by instruction

    def __or__(self, other: Coverage) -> Coverage:
        if self.kernel.name != other.kernel.name or len(self.met) != len(other.met):
            raise ValueError(f"coverage of {self.kernel.name} and of {other.kernel.name} is not of one kernel")
        return Coverage(self.kernel, self.met | other.met)

    @property
    def share(self) -> float:
        return float(self.met.mean()) if len(self.met) else 1.0

    def missed(self) -> list[Instr]:
        """Instructions that no launch has met, in the order of the text."""
        return [instr for instr, met in zip(self.kernel.instrs, self.met, strict=True) if not met]

    def missed_lines(self) -> list[tuple[int, int]]:
        """The same as ranges of lines of the PTX, the first and the last."""
        gaps: list[tuple[int, int]] = []
        before = -2
        for index in np.flatnonzero(~self.met).tolist():
            line = self.kernel.instrs[index].line
            if index == before + 1:
                gaps[-1] = gaps[-1][0], line
            else:
                gaps.append((line, line))
            before = index
        return gaps

    def missed_sources(self) -> list[str]:
        """Lines of the source ("file:line", the innermost) of which no instruction was met."""
        met = {instr.source[0] for instr, met in zip(self.kernel.instrs, self.met, strict=True) if met and instr.source}
        missed = dict.fromkeys(instr.source[0] for instr in self.missed() if instr.source)
        return [source for source in missed if source not in met]
