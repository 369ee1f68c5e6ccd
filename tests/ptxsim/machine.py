"""Warps, blocks, clusters and the scheduler.

A warp is a few groups of lanes, each with a program counter; groups at the same instruction become one. A step is a run
of arithmetic, a branch, or one instruction that others can see. Between two of the latter the scheduler may take
another warp. What is asynchronous on a GPU (TMA, wgmma, cp.async) is put on a list and done at some later time: at the
latest when nobody can run, or when a wait asks for it.
"""

from __future__ import annotations

import random
import re
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from .alu import LANES, POISON, Translator, Unsupported, bits_of
from .effects import Effects
from .memory import SharedMemory
from .parse import Instr, Kernel, Not
from .races import Races

FULL = np.ones(LANES, bool)


class Fault(Exception):
    """What a kernel did wrong, and where."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.reports: list[str] = []  # what was reported before


@dataclass
class Schedule:
    """How a seed schedules."""

    seed: int = 0
    order: str = "random"  # or "priority": the most important warp that can run, priorities changing now and then
    slice: int = 4  # visible instructions at a time, on average
    eager: float = 0.0  # the chance that an asynchronous operation is done where it is issued
    rate: float = 0.2  # the chance, after each slice, that one of those under way is done
    burst: int = 1
    groups: str = "lowest"  # or "random": which lanes go on where they went apart
    lazy: str = ""  # "products" or "copies": these are done only when they must be
    spin: float = 0.02  # the chance that a wait in vain comes back instead of being suspended
    resident: int = 0  # clusters at a time, 0 for all
    strict: bool = False  # report what only the letter of the PTX ISA asks for, too
    races: bool = True  # check the order of all accesses to shared memory, and that warps share no global memory

    @staticmethod
    def of(seed: int) -> Schedule:
        rng = random.Random(f"schedule {seed}")
        rate = rng.choice([0.0, 0.0, 0.05, 0.3, 0.8])
        return Schedule(
            seed,
            order=rng.choice(["random", "random", "priority"]),
            slice=rng.choice([1, 3, 10, 40, 200]),
            eager=rng.choice([0.0, 0.0, 0.3, 1.0]),
            rate=rate,
            burst=rng.choice([1, 1, 4]),
            groups=rng.choice(["lowest", "lowest", "random"]),
            lazy=rng.choice(["", "", "products", "copies"]),
            spin=rng.choice([0.02, 0.02, 0.5]),
        )


class Group:
    __slots__ = ("pc", "mask", "wait", "state")

    def __init__(self, pc, mask):
        self.pc, self.mask, self.wait, self.state = pc, mask, None, None


class Step:
    __slots__ = ("kind", "full", "masked", "next", "count", "instr", "first")


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
            for p, r in zip(self.poison, kernel.registers)
        ]

    def coverage(self) -> tuple[float, list[tuple[int, int]]]:
        """The share of instructions that any launch so far has met, and the lines from and to of those it has not."""
        instrs = self.kernel.instrs
        seen = np.zeros(len(instrs), bool)
        for pc, times in self.met.items():
            if times and pc < len(instrs):
                seen[pc : max(self.steps[pc].next, pc + 1)] = True
        gaps: list[tuple[int, int]] = []
        for pc in np.flatnonzero(~seen):
            line = instrs[pc].line
            if pc and not seen[pc - 1] and gaps:
                gaps[-1] = gaps[-1][0], line
            else:
                gaps.append((line, line))
        return float(seen.mean()) if len(instrs) else 1.0, gaps

    def pure(self, pc: int):
        """The Python of an instruction of arithmetic, or None."""
        instr = self.kernel.instrs[pc]
        if instr.op in Effects.OPS or instr.op in ("bra", "ret", "exit", "brx"):
            return None
        return self.translator.statements(instr, False)

    def build(self, pc: int) -> Step:
        instrs, step = self.kernel.instrs, Step()
        step.first = pc
        if pc >= len(instrs):
            step.kind, step.count, step.instr = "exit", 0, None
            step.next = pc
            self.steps[pc] = step
            return step
        instr = step.instr = instrs[pc]
        step.count, step.next, step.masked = 1, pc + 1, None
        try:
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
                step.kind = "effect"
                step.full = self.effects.make_brx(instr)
            elif instr.op in Effects.OPS:
                step.kind = "effect"
                step.full = self.effects.make(instr)
            else:
                step.kind = "arithmetic"
                end = pc
                while end < len(instrs) and (end == pc or end not in self.kernel.leaders) and end - pc < 400:
                    lines = self.pure(end)
                    if lines is None:
                        break
                    end += 1
                step.next, step.count = end, end - pc
                step.full, step.masked = self._function(pc, end, False), None
        except Unsupported as reason:
            raise Fault("unsupported", f"line {instr.line}: {instr.text[:120]} ({reason})") from None
        self.steps[pc] = step
        return step

    def _function(self, start: int, end: int, masked: bool):
        lines = ["def run(R, w, m):"]
        for pc in range(start, end):
            lines += [f" {line}" for line in self.translator.statements(self.kernel.instrs[pc], masked) if line]
        if len(lines) == 1:
            lines.append(" pass")
        names = self.translator.names
        exec(compile("\n".join(lines), f"<{self.kernel.name[:40]}:{self.kernel.instrs[start].line}>", "exec"), names)
        return names["run"]

    def masked(self, step: Step):
        if step.masked is None:
            step.masked = self._function(step.first, step.next, True)
        return step.masked


class Warp:
    def __init__(self, block: Block, number: int):
        self.block, self.number, self.sim = block, number, block.sim
        memory = block.sim.memory
        self.uid, memory.warps = memory.warps, memory.warps + 1
        self.program = block.sim.program
        self.R = list(self.program.poison)
        threads = block.sim.threads
        self.live = np.arange(LANES) + number * LANES < threads
        self.groups = [Group(0, None if self.live.all() else self.live.copy())]
        self._special: dict[str, np.ndarray] = {}
        # wgmma: operations in order of issue, groups that are committed, and accumulators under way
        self.queue: deque = deque()
        self.open: list = []
        self.committed: deque = deque()
        self.chains: dict = {}
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

    def special(self, name: str) -> np.ndarray:
        found = self._special.get(name)
        if found is None:
            found = self._special[name] = self._compute_special(name)
            found.flags.writeable = False
        return found

    def _compute_special(self, name: str) -> np.ndarray:
        sim, block = self.sim, self.block
        base, _, axis = name.partition(".")
        at = {"x": 0, "y": 1, "z": 2}.get(axis, 0)
        flat = np.arange(LANES) + self.number * LANES
        x, y, _ = sim.block_size
        one = lambda value: np.full(LANES, value & 0xFFFFFFFF, np.uint32)  # noqa: E731
        if base == "tid":
            return [flat % x, flat // x % y, flat // (x * y)][at].astype(np.uint32)
        if base == "ntid":
            return one(sim.block_size[at])
        if base == "ctaid":
            return one(block.index[at])
        if base == "nctaid":
            return one(sim.grid[at])
        if base == "laneid":
            return np.arange(LANES, dtype=np.uint32)
        if base == "warpid":
            return one(self.number)
        if base in ("cluster_ctarank", "cluster_ctaid"):
            return one(block.rank if at == 0 else 0)
        if base in ("cluster_nctarank", "cluster_nctaid"):
            return one(sim.cluster_size if at == 0 else 1)
        if base == "clusterid":
            return one(block.index[at] // (sim.cluster_size if at == 0 else 1))
        if base == "nclusterid":
            return one(sim.grid[at] // (sim.cluster_size if at == 0 else 1))
        if base == "dynamic_smem_size":
            return one(sim.dynamic)
        if base.startswith("lanemask"):
            bit = np.uint64(1) << np.arange(LANES, dtype=np.uint64)
            low = bit - np.uint64(1)
            value = {"eq": bit, "lt": low, "le": low | bit, "gt": ~(low | bit), "ge": ~low}[base[9:]]
            return (value & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        if base in ("smid", "clock", "clock_hi", "clock64", "globaltimer", "envreg", "gridid", "nsmid", "nwarpid"):
            return one(132 if base == "nsmid" else 0)
        raise Fault("unsupported", f"special register %{name}")

    def where(self, instr: Instr | None) -> str:
        at = f"block {self.block.index[0]}{',%d' % self.block.index[1] if self.sim.grid[1] > 1 else ''} warp {self.number}"
        return at + (f", line {instr.line}: {instr.text[:110]}" if instr else "")

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
                other.wait = other.state = None
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
        steps, met = program.steps, program.met
        while budget > 0:
            g = self.ready()
            if g is None:
                return
            g.wait = None
            step = steps[g.pc]
            if step is None:
                step = program.build(g.pc)
            met[step.first] += 1
            sim.executed += step.count
            kind = step.kind
            if kind == "arithmetic":
                if g.mask is None:
                    step.full(R, self, None)
                else:
                    program.masked(step)(R, self, g.mask)
                g.pc = step.next
            elif kind == "bra":
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

    def _branch(self, g: Group, step: Step) -> None:
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
        rest = (g.mask if g.mask is not None else FULL) & ~going
        if rest.any():
            g.mask = rest
            g.pc += 1
        else:
            self.groups.remove(g)
        if not self.groups:
            self.sim.warp_done(self)
        self.block.cluster.barrier_check()


class Mbar:
    __slots__ = ("expected", "pending", "tx", "phase", "shown", "line", "clocks")

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


class Block:
    def __init__(self, sim: Simulation, cluster: Cluster, rank: int, index: tuple[int, int, int]):
        self.sim, self.cluster, self.rank, self.index = sim, cluster, rank, index
        self.shared = SharedMemory(sim.shared_bytes)
        self.mbars: dict[int, Mbar] = {}
        self.barriers: dict[int, list] = {}  # number -> [expected, arrived, generation]
        self.warps = [Warp(self, i) for i in range(-(-sim.threads // LANES))]
        self.running = len(self.warps)
        # What setmaxnreg moves: a multiprocessor's registers, of which each warp has the same at first.
        most = 65536 // (LANES * len(self.warps)) // 8 * 8
        each = min(255, sim.program.kernel.directives.get("maxnreg", (most,))[0], most) // 8 * 8
        for warp in self.warps:
            warp.registers = each
        self.registers = 65536 - LANES * each * len(self.warps)


class Cluster:
    def __init__(self, sim: Simulation, blocks: list[tuple[int, int, int]]):
        self.sim = sim
        self.arrived, self.phase = 0, 1
        self.races = Races(sim, self, -(-sim.threads // LANES)) if sim.schedule.races else None
        self.clocks = self.races.new() if self.races else None
        self.blocks: list[Block] = []
        for rank, index in enumerate(blocks):
            self.blocks.append(Block(sim, self, rank, index))
        self.running = sum(len(b.warps) for b in self.blocks)

    def barrier_check(self) -> None:
        if self.arrived and self.arrived >= sum(int(w.live.sum()) for b in self.blocks for w in b.warps):
            self.arrived = 0
            self.phase += 1
            if self.races:
                Races.phase(self.clocks)


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

    def __init__(self, device, program, grid, block_size, cluster_size, shared_bytes, dynamic, params, schedule):
        self.device, self.program, self.grid, self.block_size = device, program, grid, block_size
        self.memory = device.memory
        self.first_uid = device.memory.warps
        self.cluster_size, self.shared_bytes, self.dynamic = cluster_size, shared_bytes, dynamic
        self.params = params
        self.schedule, self.rng = schedule, random.Random(f"run {schedule.seed}")
        self.threads = block_size[0] * block_size[1] * block_size[2]
        self.pending: list = []
        self.last: list = []  # what is done only when nobody can run
        self.executed = self.done_async = self.switches = 0
        self.reports: dict[tuple, str] = {}
        self.notes: dict[tuple, str] = {}
        self.limit = 2_000_000_000
        self.elected = self.rng.randrange(LANES)
        self.warps: list[Warp] = []
        cells = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        assert len(cells) % cluster_size == 0
        self.waiting = [cells[i : i + cluster_size] for i in range(0, len(cells), cluster_size)]
        if schedule.resident:
            self.rng.shuffle(self.waiting)

    def report(self, kind: str, message: str, note: bool = False) -> None:
        """Once for each kind and line. A note is what the PTX ISA asks for and compilers do without."""
        line = re.search(r"line (\d+)", message)
        key = kind, line[1] if line else message
        (self.notes if note and not self.schedule.strict else self.reports).setdefault(key, f"{kind}: {message}")

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
            self.report("wgmma", f"{warp.where(None)} ended with products nobody waited for")
        self.warps.remove(warp)
        cluster, block = warp.block.cluster, warp.block
        block.running -= 1
        if block.running == 0 and block.shared is not None:
            if block.shared.flight.any():
                self.report("exit", f"block {block.index[0]} ended with a copy into its shared memory under way")
            block.shared, block.mbars = None, {}
        cluster.running -= 1
        if cluster.running == 0:
            self.active -= 1
            self._start()

    def _start(self) -> None:
        most = self.schedule.resident or 1 << 30
        while self.waiting and self.active < most:
            cluster = Cluster(self, self.waiting.pop(0))
            self.active += 1
            for block in cluster.blocks:
                for warp in block.warps:
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
                    raise Fault("deadlock", self._stuck())
                self.switches += 1
                warp.run(1 + int(rng.expovariate(1.0 / schedule.slice)) if schedule.slice > 1 else 1)
                if self.pending and schedule.rate and rng.random() < schedule.rate:
                    for _ in range(schedule.burst):
                        self.complete_one()
                if self.executed > self.limit:
                    raise Fault("livelock", self._stuck())
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

    def _stuck(self) -> str:
        places: dict[str, list[str]] = {}
        for w in self.warps:
            for g in w.groups:
                instr = self.program.kernel.instrs[g.pc] if g.pc < len(self.program.kernel.instrs) else None
                lanes = 32 if g.mask is None else int(g.mask.sum())
                key = f"line {instr.line}: {instr.text[:80]}" if instr else "the end"
                places.setdefault(key, []).append(
                    f"{w.block.index[0]}.{w.number}" + (f"({lanes} lanes)" if lanes < 32 else "")
                )
        return "; ".join(f"{key} <- {' '.join(who)}" for key, who in places.items())
