"""One launch: the scheduler of warps, and what completes asynchronously."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from .cta import Cluster
from .dtypes import LANES
from .faults import Fault
from .global_races import GlobalRaces, smallest_global_access
from .ir import Instr
from .schedule import Schedule
from .warp import Warp


@dataclass
class Result:
    schedule: Schedule
    instructions: int
    asynchronous: int
    switches: int
    notes: list[str]
    seconds: float = 0.0


class Simulation:
    """One launch."""

    def __init__(self, device, program, grid, block_size, cluster_size, shared_bytes, dynamic, params, schedule, maps):
        self.device, self.program, self.grid, self.block_size = device, program, grid, block_size
        self.memory = device.memory
        self.cluster_size, self.shared_bytes, self.dynamic = cluster_size, shared_bytes, dynamic
        self.params = params
        self.schedule, self.rng = schedule, random.Random(f"run {schedule.seed}")
        self.threads = block_size[0] * block_size[1] * block_size[2]
        self.pending: list = []
        self.last: list = []  # what is done only when nobody can run
        self.executed = self.done_async = self.switches = 0
        self.reports: dict[tuple, str] = {}
        self.notes: dict[tuple, str] = {}
        self.clusters = 0  # that have begun
        self.elected = self.rng.randrange(LANES)
        self.warps: list[Warp] = []
        cells = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        assert len(cells) % cluster_size == 0
        self.waiting = [cells[i : i + cluster_size] for i in range(0, len(cells), cluster_size)]
        if schedule.resident:
            self.rng.shuffle(self.waiting)

        self.maps = maps  # tensor maps among the parameters, by offset
        grain = smallest_global_access(program.kernel, [*maps.values(), *device.maps.values()])
        self.global_races = GlobalRaces(self, grain) if schedule.races else None

    def report(self, kind: str, warp: Warp, instr: Instr | None, message: str, note: bool = False) -> None:
        """Once for each kind and instruction. A note is what the PTX ISA asks for and compilers do without."""
        key = kind, instr.index if instr else message
        found = self.notes if note and not self.schedule.strict else self.reports
        if key not in found:
            found[key] = f"{kind}: {warp.where(instr)}: {message}"

    def later(self, operation, kind: str = "copies") -> None:
        """An asynchronous operation, a callable: now or at some time."""
        if self.schedule.lazy == kind:
            if kind != "products":  # a wait asks for those; for copies nobody does
                self.last.append(operation)
            return
        if self.schedule.eager and self.rng.random() < self.schedule.eager:
            self.done_async += 1
            operation()
        else:
            self.pending.append(operation)

    def complete_one(self) -> bool:
        pending = self.pending
        if not pending:
            return False
        i = self.rng.randrange(len(pending))
        operation = pending[i]
        pending[i] = pending[-1]
        pending.pop()
        self.done_async += 1
        operation()
        return True

    def _complete_last(self) -> bool:
        self.pending, self.last = self.last, self.pending
        return self.complete_one()

    def warp_done(self, warp: Warp) -> None:
        if warp.committed or warp.open:
            last = (warp.open or warp.committed[-1] or [None])[-1]
            self.report("wgmma", warp, last and last.instr, "ended with wgmma-groups that nobody waited for")
        if warp.copies or any(warp.copy_groups):
            self.report("exit", warp, None, "ended with cp.async operations that no cp.async.wait_group covers")
        for operation in warp.bulk_stores():
            if not operation["waited"]:
                text = "ended before the bulk-group had read shared memory: no cp.async.bulk.wait_group covers it"
                self.report("exit", warp, operation["instr"], text)
        self.warps.remove(warp)
        cluster, cta = warp.cta.cluster, warp.cta
        cta.running -= 1
        for barrier in cta.barriers.values():
            barrier.complete()
        if cta.running == 0 and cta.shared is not None:
            if cta.shared.flight.any():
                self.report("exit", warp, None, "the last of its CTA ended with a copy into shared memory under way")
            for at, bar in cta.mbarriers.items():
                if bar.tx:
                    text = f"the CTA ended with tx-count {bar.tx} at the mbarrier at {at:#x}, made at line {bar.line}"
                    self.report("exit", warp, None, text)
            for number, barrier in cta.barriers.items():
                if barrier.arrived:
                    text = (
                        f"the CTA ended when {barrier.arrived} threads had arrived at barrier {number}: nobody waited"
                    )
                    self.report("exit", warp, barrier.instr, text)
            cta.shared, cta.mbarriers = None, {}
        cluster.running -= 1
        if cluster.running == 0:
            self.active -= 1
            self._start()

    def _start(self) -> None:
        most = self.schedule.resident or 1 << 30
        while self.waiting and self.active < most:
            cluster = Cluster(self, self.waiting.pop(0))
            self.active += 1
            for cta in cluster.ctas:
                for warp in cta.warps:
                    warp.priority = self.rng.random()
                    self.warps.append(warp)

    def run(self) -> Result:
        try:
            return self._run()
        except Fault as fault:
            fault.reports = list(self.reports.values())
            raise

    def _run(self) -> Result:
        self.active = 0
        rng, schedule = self.rng, self.schedule
        with np.errstate(all="ignore"):
            self._start()
            while self.warps:
                warp = self._choose()
                if warp is None:
                    if self.complete_one() or self._complete_last():
                        continue
                    divided = any(all(g.lacks for g in w.groups) for w in self.warps if len(w.groups) > 1)
                    raise Fault("divergence" if divided else "deadlock", self._stuck())
                self.switches += 1
                warp.run(1 + int(rng.expovariate(1.0 / schedule.slice)) if schedule.slice > 1 else 1)
                if self.pending and schedule.rate and rng.random() < schedule.rate:
                    for _ in range(schedule.burst):
                        self.complete_one()
                if self.executed > schedule.limit:
                    self.livelock()
            while self.complete_one() or self._complete_last():
                pass
        if self.reports:
            kind, _, message = next(iter(self.reports.values())).partition(": ")
            raise Fault(kind, message)
        return Result(
            schedule,
            self.executed,
            self.done_async,
            self.switches,
            list(self.notes.values()),
        )

    def _choose(self) -> Warp | None:
        warps, rng = self.warps, self.rng
        if self.schedule.order == "priority":
            if rng.random() < 0.02:
                rng.choice(warps).priority = rng.random()
            best = None
            for w in warps:
                if (best is None or w.priority > best.priority) and w.ready() is not None:
                    best = w
            return best
        n = len(warps)
        start = rng.randrange(n)
        for _ in range(3):
            w = warps[rng.randrange(n)]
            if w.ready() is not None:
                return w
        for i in range(n):
            w = warps[(start + i) % n]
            if w.ready() is not None:
                return w
        return None

    def livelock(self) -> None:
        raise Fault("livelock", f"more than {self.schedule.limit} warp instructions: {self._stuck()}")

    def _stuck(self) -> str:
        places: dict[str, list[str]] = {}
        for w in self.warps:
            for g in w.groups:
                instr = self.program.kernel.instrs[g.pc] if g.pc < len(self.program.kernel.instrs) else None
                lanes = 32 if g.mask is None else int(g.mask.sum())
                key = (str(instr) if instr else "the end") + (
                    " (waits for the other lanes of its warp)" if g.lacks else ""
                )
                places.setdefault(key, []).append(
                    f"{w.cta.index[0]}.{w.number}" + (f"({lanes} lanes)" if lanes < 32 else "")
                )
        lines = [f"{key} <- {' '.join(who)}" for key, who in places.items()]
        for cta in {id(w.cta): w.cta for w in self.warps}.values():
            for at, bar in cta.mbarriers.items():
                if bar.tx or bar.pending != bar.expected:
                    lines.append(
                        f"CTA {cta.index[0]}: the mbarrier at {at:#x} is in phase {bar.phase}, "
                        f"pending count {bar.pending} of {bar.expected}, tx-count {bar.tx}"
                    )
        return "\n  ".join(lines)
