"""Order of all accesses to global memory within a launch, by the vector clocks of races.py.

CTAs of different clusters are never ordered within a launch. Inside of a cluster an access must come after those of
other warps that it conflicts with: by barriers, by mbarriers, by waits for groups. A grain (the smallest access of the
kernel) remembers its last write, the last two agents that read it, and whether several clusters read it. Atomics may
meet atomics. The state is one launch's: launches are ordered.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .faults import Fault
from .ir import SIZES, Kernel
from .memory import BASE

# A word: an atomic's flag, which agent of which cluster, its clock, and the instruction (index + 1).
ATOMIC, AGENT_SHIFT, CLOCK_SHIFT = np.uint64(1 << 63), np.uint64(39), np.uint64(18)
AGENT_MASK, CLOCK_MASK, INSTR_MASK = np.uint64((1 << 24) - 1), np.uint64((1 << 21) - 1), np.uint64((1 << 18) - 1)


def smallest_global_access(kernel: Kernel, maps) -> int:
    """Bytes of the smallest access that may be to global memory, at most 16."""
    sizes = [16, *(found.item for found in maps)]
    for instr in kernel.instrs:
        elsewhere = any(mod.split("::")[0] in ("shared", "param", "local", "const") for mod in instr.mods)
        if instr.op in ("ld", "ldu", "st", "atom", "red") and not elsewhere:
            sizes.append(SIZES.get(instr.mods[-1], 1))
        elif instr.op == "cp":
            sizes.append(4)
    return min(sizes)


class GlobalRaces:
    def __init__(self, sim, grain: int):
        self.sim, self.grain = sim, grain
        cells = len(sim.memory) // grain + 1
        self.write, self.reads = np.zeros(cells, np.uint64), [np.zeros(cells, np.uint64) for _ in range(2)]
        self.several = np.zeros(cells, bool)  # clusters read it

    def word(self, w, instr, agent: int, clock: int, atomic: bool = False):
        """What a grain remembers of an access."""
        races = w.cta.cluster.races
        which = w.cta.cluster.number * races.size + agent
        if which > AGENT_MASK or clock > CLOCK_MASK or instr.index >= INSTR_MASK:
            raise Fault("unsupported", f"{w.where(instr)}: a launch too large for the check of races in global memory")
        word = np.uint64(which) << AGENT_SHIFT | np.uint64(clock) << CLOCK_SHIFT | np.uint64(instr.index + 1)
        return word | ATOMIC if atomic else word

    def cells(self, at: np.ndarray, size: int) -> np.ndarray:
        """Grains of accesses of so many bytes at offsets in the arena."""
        at, n = at // self.grain, max(1, size // self.grain)
        return at if n == 1 else (at[:, None] + np.arange(n)).ravel()

    def ordinary(self, w, instr, at, size: int, writes: bool, atomic: bool) -> None:
        races = w.cta.cluster.races
        i = races.id(w)
        where = self.cells(at, size)
        get, put = (lambda array: array[where]), (lambda array, value: array.__setitem__(where, value))
        self.access(w, instr, get, put, self.word(w, instr, i, races.clock[i, i], atomic), writes)

    def copy(self, w, instr, at, size: int, agent: int, clock: int) -> None:
        """A cp.async reads."""
        where = self.cells(at, size)
        get, put = (lambda array: array[where]), (lambda array, value: array.__setitem__(where, value))
        self.access(w, instr, get, put, self.word(w, instr, agent, clock), False)

    def box(self, w, instr, found, coordinates, agent: int, clock: int, writes: bool) -> None:
        """A tensor copy: what of its box lies in the tensor."""
        start, shape, strides = found.inside(coordinates)
        if 0 in shape:
            return
        first = (start - BASE) // self.grain
        shape = (*shape[:-1], shape[-1] // self.grain)

        def view(array):
            steps = [s // self.grain * array.itemsize for s in strides]
            return as_strided(array[first:], shape, (*steps, array.itemsize))

        def put(array, value):
            view(array)[...] = value

        self.access(w, instr, view, put, self.word(w, instr, agent, clock), writes)

    def access(self, w, instr, get, put, word, writes: bool) -> None:
        races, mine = w.cta.cluster.races, (word >> AGENT_SHIFT) & AGENT_MASK
        last, atomic = get(self.write), bool(word & ATOMIC)
        if last.any():
            self._check(w, instr, last, mine, atomic, "writes" if writes else "reads", "wrote")
        reads = [get(cells) for cells in self.reads]
        if writes:
            for cells in reads:
                if cells.any():
                    self._check(w, instr, cells, mine, False, "writes", "read")
            if get(self.several).any():
                self._report(w, instr, "writes", "another cluster read")
            put(self.write, word)
            return
        agents = (reads[0] >> AGENT_SHIFT) & AGENT_MASK
        other = (agents != mine) & (reads[0] != 0)
        if other.any():
            put(self.reads[1], np.where(other, reads[0], reads[1]))
            size = np.uint64(races.size)
            apart = other & (agents // size != mine // size)
            if apart.any():
                put(self.several, get(self.several) | apart)
        put(self.reads[0], word)

    def _check(self, w, instr, cells, mine, atomic, does: str, did: str) -> None:
        races = w.cta.cluster.races
        agents, clocks = (cells >> AGENT_SHIFT) & AGENT_MASK, (cells >> CLOCK_SHIFT) & CLOCK_MASK
        other = (cells != 0) & (agents != mine)
        if atomic:
            other &= (cells & ATOMIC) == 0
        if not other.any():
            return
        size = np.uint64(races.size)
        here = agents // size == mine // size
        known = races.clock[races.id(w)][np.where(here, agents % size, 0).astype(np.int64)]
        bad = other & ~(here & (clocks.astype(np.int64) <= known))
        if bad.any():
            line = self.sim.program.kernel.instrs[int(cells[bad].ravel()[0] & INSTR_MASK) - 1].line
            who = "another warp" if (here & bad).any() else "another cluster"
            self._report(w, instr, does, f"{who} {did} at line {line}, without an order between the two")

    def _report(self, w, instr, does: str, what: str) -> None:
        self.sim.report("global race", w, instr, f"{does} global memory that {what}")
