"""A warp: groups of lanes, each with a program counter; groups at the same instruction become one."""

from __future__ import annotations

from collections import deque

import numpy as np

from .dtypes import LANES
from .ir import Instr
from .special_registers import special_register

FULL = np.ones(LANES, bool)


class Group:
    __slots__ = ("lacks", "mask", "pc", "state", "wait")

    def __init__(self, pc, mask):
        self.pc, self.mask, self.wait, self.state = pc, mask, None, None
        self.lacks = False  # it waits for other lanes of its warp


class Warp:
    def __init__(self, cta, number: int):
        self.cta, self.number, self.sim = cta, number, cta.sim
        self.program = cta.sim.program
        self.R = list(self.program.poison)
        threads = cta.sim.threads
        self.live = np.arange(LANES) + number * LANES < threads
        self.partial = not self.live.all()  # some lanes have ended, or never were
        self.groups = [Group(0, None if self.live.all() else self.live.copy())]
        self._special: dict[str, np.ndarray] = {}
        # wgmma: operations in order of issue, groups that are committed, and accumulators under way
        self.queue: deque = deque()
        self.open: list = []
        self.committed: deque = deque()
        self.chains: dict = {}
        self.in_flight: set[int] = set()  # registers of accumulators and of A, until their wait
        self.fenced: dict = {}
        # cp.async: the same; bulk copies: groups by lane
        self.copies: list = []
        self.copy_groups: deque = deque()
        self.bulk_open: dict[int, list] = {}
        self.bulk_groups: dict[int, deque] = {}
        self.cluster_phase = np.zeros(LANES, np.int64)
        self.barriers_to_show: list = []
        size = sum(v.size + v.align for v in self.program.kernel.local.values())
        self.local = np.full((LANES, -(-size // 16) * 16), 0xFF, np.uint8) if size else None

    def bulk_stores(self) -> list[dict]:
        groups = [*self.bulk_open.values(), *(group for queue in self.bulk_groups.values() for group in queue)]
        return [operation for group in groups for operation in group]

    def special(self, name: str) -> np.ndarray:
        found = self._special.get(name)
        if found is None:
            found = self._special[name] = special_register(self, name)
            found.flags.writeable = False
        return found

    def where(self, instr: Instr | None) -> str:
        index = ",".join(map(str, self.cta.index[: 2 if self.sim.grid[1] > 1 else 1]))
        return f"CTA {index} warp {self.number}" + (f", {instr}" if instr else "")

    # --- which lanes
    def covers(self, group: Group, lanes: np.ndarray | None = None) -> bool:
        """Whether all lanes (of those named) that still run are in the group."""
        if group.mask is None:
            return True
        need = self.live if lanes is None else self.live & lanes
        return not (need & ~group.mask).any()

    def merge(self) -> None:
        groups = self.groups
        if len(groups) < 2:
            return
        by_pc: dict[int, Group] = {}
        out = []
        for g in groups:
            other = by_pc.get(g.pc)
            if other is None:
                by_pc[g.pc] = g
                out.append(g)
            else:
                other.mask = other.mask | g.mask
                other.wait, other.state, other.lacks = None, None, False
        if len(out) != len(groups):
            for g in out:
                if g.mask is not None and g.mask.all():
                    g.mask = None
            self.groups = out

    def ready(self) -> Group | None:
        groups = self.groups
        if len(groups) == 1:
            g = groups[0]
            if g.wait is None or g.wait():
                return g
            return None
        best = None
        can = [g for g in groups if g.wait is None or g.wait()]
        if not can:
            return None
        if self.sim.schedule.groups == "random" and len(can) > 1:
            return self.sim.rng.choice(can)
        for g in can:
            if best is None or g.pc < best.pc:
                best = g
        return best

    def run(self, budget: int) -> None:
        """Until so many visible instructions are done, or nothing here can go on."""
        program, R, sim = self.program, self.R, self.sim
        steps, met, limit = program.steps, program.met, sim.schedule.limit
        while budget > 0:
            g = self.ready()
            if g is None:
                return
            g.wait, g.lacks = None, False
            step = steps[g.pc]
            if step is None:
                step = program.build(g.pc)
            met[step.first] += 1
            sim.executed += step.count
            kind = step.kind
            if self.in_flight and not self.in_flight.isdisjoint(step.registers):
                text = "touches registers of wgmma operations that nobody has waited for"
                sim.report("wgmma", self, program.touching(step, self.in_flight), text)
            if kind == "arithmetic":
                if g.mask is None:
                    step.full(R, self, None)
                else:
                    program.masked(step)(R, self, g.mask)
                g.pc = step.next
            elif kind == "bra":
                if sim.executed > limit:  # a loop that nobody else can see
                    sim.livelock()
                if step.full is None:
                    g.pc = step.instr.target
                else:
                    self._branch(g, step)
            elif kind == "effect":
                budget -= 1
                done = step.full(self, g)
                if done is True:
                    g.pc, g.state = step.next, None
                elif done is not False:
                    g.pc, g.state = done, None  # a jump through a table
                else:
                    sim.executed -= 1
                    met[step.first] -= 1
                    if len(self.groups) == 1:
                        return
            else:
                mask = None if step.instr is None else self.program.effects.active(self, g, step.full)
                if step.instr is not None and mask is False:
                    g.pc = step.next
                else:
                    self._exit(g, mask)
                    if not self.groups:
                        return
            if len(self.groups) > 1:
                self.merge()

    def _branch(self, g: Group, step) -> None:
        number, negated = step.full
        p = self.R[number]
        if negated:
            p = ~p
        if g.mask is not None:
            p = p & g.mask
            if p.any():
                rest = g.mask & ~p
                if rest.any():
                    self.groups.append(Group(step.instr.target, p))
                    g.mask = rest
                    g.pc = step.next
                else:
                    g.pc = step.instr.target
            else:
                g.pc = step.next
        elif p.all():
            g.pc = step.instr.target
        elif p.any():
            self.groups.append(Group(step.instr.target, p))
            g.mask = ~p
            g.pc = step.next
        else:
            g.pc = step.next

    def _exit(self, g: Group, mask) -> None:
        going = (g.mask if g.mask is not None else FULL) if mask is None or mask is True else mask
        self.live = self.live & ~going
        self.partial = True
        rest = (g.mask if g.mask is not None else FULL) & ~going
        if rest.any():
            g.mask = rest
            g.pc += 1
        else:
            self.groups.remove(g)
        if not self.groups:
            self.sim.warp_done(self)
        self.cta.cluster.barrier_check()
