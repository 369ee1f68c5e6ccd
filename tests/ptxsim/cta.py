"""CTAs and clusters, and the barriers that belong to them."""

from __future__ import annotations

from .dtypes import LANES
from .memory import SharedMemory
from .races import Races
from .warp import Warp


class Mbarrier:
    """An mbarrier object: its phase, pending count and tx-count (ISA, "mbarrier")."""

    __slots__ = ("clocks", "expected", "line", "pending", "phase", "shown", "tx")

    def __init__(self, count: int, line: int, clocks=None):
        self.clocks = clocks
        self.expected = self.pending = count
        self.tx = self.phase = 0
        self.shown = False
        self.line = line

    def check(self) -> None:
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.pending = self.expected
            if self.clocks:
                Races.phase(self.clocks, self.phase)


class NamedBarrier:
    """One of the 16 barriers of a CTA (ISA, "bar"). Without a count it is for all warps that have not ended."""

    __slots__ = ("arrived", "clocks", "count", "cta", "generation", "instr")

    def __init__(self, cta: CTA):
        self.cta, self.count, self.arrived, self.generation, self.instr = cta, None, 0, 0, None
        self.clocks = cta.cluster.races.new() if cta.cluster.races else None

    def complete(self) -> bool:
        need = self.count if self.count is not None else LANES * sum(1 for w in self.cta.warps if w.groups)
        if not self.arrived or self.arrived < need:
            return False
        self.arrived = 0
        self.generation += 1
        if self.clocks:
            Races.phase(self.clocks)
        return True


class CTA:
    def __init__(self, sim, cluster: Cluster, rank: int, index: tuple[int, int, int]):
        self.sim, self.cluster, self.rank, self.index = sim, cluster, rank, index
        self.shared = SharedMemory(sim.shared_bytes)
        self.mbarriers: dict[int, Mbarrier] = {}
        self.barriers: dict[int, NamedBarrier] = {}
        self.warps = [Warp(self, i) for i in range(-(-sim.threads // LANES))]
        self.running = len(self.warps)
        # What setmaxnreg moves: a multiprocessor's registers, of which each warp has the same at first.
        most = 65536 // (LANES * len(self.warps)) // 8 * 8
        each = min(255, sim.program.kernel.directives.get("maxnreg", (most,))[0], most) // 8 * 8
        for warp in self.warps:
            warp.registers = each
        self.registers = 65536 - LANES * each * len(self.warps)


class Cluster:
    def __init__(self, sim, ctas: list[tuple[int, int, int]]):
        self.sim = sim
        self.number, sim.clusters = sim.clusters, sim.clusters + 1
        self.arrived, self.phase = 0, 1
        self.races = Races(sim, self, -(-sim.threads // LANES)) if sim.schedule.races else None
        self.clocks = self.races.new() if self.races else None
        self.ctas: list[CTA] = []
        for rank, index in enumerate(ctas):
            self.ctas.append(CTA(sim, self, rank, index))
        self.running = sum(len(b.warps) for b in self.ctas)

    def barrier_check(self) -> None:
        if self.arrived and self.arrived >= sum(int(w.live.sum()) for b in self.ctas for w in b.warps):
            self.arrived = 0
            self.phase += 1
            if self.races:
                Races.phase(self.clocks)
