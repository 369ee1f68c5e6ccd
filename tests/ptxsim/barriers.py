"""Barriers of blocks and clusters, mbarriers, and fences."""

from __future__ import annotations

import numpy as np

from .alu import LANES, SHARED_WINDOW, Unsupported, i4, i8, u8
from .operands import BLOCK_MASK, FULL, RANK_SHIFT, Operands
from .parse import Address


class Barriers(Operands):
    def make_bar(self, instr):
        if "warp" in instr.mods:
            lanes_of = self.members(instr.args[0])

            def warp_sync(w, g, m):
                if not self.whole(w, g, lanes_of(w, m)):
                    return False
                if w.block.cluster.races is not None:
                    w.block.cluster.races.tick(w)
                return True

            return warp_sync
        if "red" in instr.mods:
            raise Unsupported(instr.name)
        arrives_only = "arrive" in instr.mods
        number = self.reader(instr.args[0], i4)
        count = self.reader(instr.args[1], i4) if len(instr.args) > 1 else None

        def bar(w, g, m):
            if not self.whole(w, g):
                return False
            block = w.block
            if g.state is None:
                which = int(number(w)[self.first(m)])
                need = int(count(w)[self.first(m)]) if count else len(block.warps) * LANES
                if need % LANES or not 0 <= which < 16:
                    self.fault("barrier", w, instr, f"barrier {which} of {need} threads")
                if not count and block.sim.threads % LANES == 0:
                    need = sum(LANES for x in block.warps if x.groups)
                races = block.cluster.races
                barrier = block.barriers.setdefault(which, [need, 0, 0, races.new() if races else None])
                if barrier[1] and barrier[0] != need:
                    self.fault("barrier", w, instr, f"barrier {which} of {barrier[0]} threads, and here of {need}")
                barrier[0] = need
                barrier[1] += LANES
                generation = barrier[2]
                if races:
                    races.release(w, barrier[3])
                if barrier[1] >= need:
                    barrier[1] = 0
                    barrier[2] += 1
                    if races:
                        races.phase(barrier[3])
                        if not arrives_only:
                            races.acquire(w, barrier[3])
                    return True
                if arrives_only:
                    return True
                g.state = (barrier, generation)
            barrier, generation = g.state
            if barrier[2] != generation:
                if block.cluster.races:
                    block.cluster.races.acquire(w, barrier[3])
                return True
            g.wait = lambda: barrier[2] != generation
            return False

        return bar

    def make_barrier(self, instr):
        if "cluster" not in instr.mods:
            return self.make_bar(instr)
        arrive, aligned, relaxed = "arrive" in instr.mods, "aligned" in instr.mods, "relaxed" in instr.mods

        def cluster_arrive(w, g, m):
            if aligned and not self.whole(w, g):
                return False
            cluster = w.block.cluster
            lanes = FULL if m is None else m
            if (w.cluster_phase[lanes] >= cluster.phase).any():
                self.fault("barrier", w, instr, "a second arrival at the barrier of the cluster without a wait")
            w.cluster_phase[lanes] = cluster.phase
            cluster.arrived += int(lanes.sum())
            if cluster.races and not relaxed:
                cluster.races.release(w, cluster.clocks)
            cluster.barrier_check()
            return True

        def cluster_wait(w, g, m):
            if aligned and not self.whole(w, g):
                return False
            cluster = w.block.cluster
            lanes = FULL if m is None else m
            mine = int(w.cluster_phase[lanes].max())
            if cluster.phase > mine:
                if cluster.races:
                    cluster.races.acquire(w, cluster.clocks)
                return True
            g.wait = lambda: cluster.phase > mine
            return False

        return cluster_arrive if arrive else cluster_wait

    def mbar(self, w, instr, address: int):
        block = self.shared_block(w, instr, address)
        at = address & BLOCK_MASK
        if block.shared is None:
            self.fault("exited", w, instr, "an mbarrier of a block that has ended")
        found = block.mbars.get(at)
        if found is None:
            self.fault("barrier", w, instr, f"no mbarrier was made at {at:#x} of block {block.rank} of the cluster")
        return found

    def make_mbarrier(self, instr):
        what = instr.mods[0]
        method = getattr(self, f"_mbarrier_{what}", None)
        if method is None:
            raise Unsupported(instr.name)
        return method(instr)

    def each(self, m):
        return range(LANES) if m is None else np.flatnonzero(m)

    def shared_address(self, arg):
        """Addresses in shared memory, also of generic ones."""
        address = self.address(arg if isinstance(arg, Address) else Address(arg))

        def read(w):
            at = address(w)
            return np.where(at >= SHARED_WINDOW, at - SHARED_WINDOW, at)

        return read

    def _mbarrier_init(self, instr):
        address, count = self.shared_address(instr.args[0]), self.reader(instr.args[1], i4)

        def init(w, g, m):
            from .machine import Mbar

            at, n = address(w), count(w)
            for lane in self.each(m):
                a = int(at[lane])
                if a % 8 or (a & BLOCK_MASK) + 8 > w.block.shared.size:
                    self.fault("barrier", w, instr, f"an mbarrier at {a:#x}")
                races = w.block.cluster.races
                bar = w.block.mbars[a & BLOCK_MASK] = Mbar(int(n[lane]), instr.line, races.new_bar() if races else None)
                w.barriers_to_show.append(bar)
            return True

        return init

    def _mbarrier_inval(self, instr):
        address = self.shared_address(instr.args[0])

        def inval(w, g, m):
            at = address(w)
            for lane in self.each(m):
                bar = self.mbar(w, instr, int(at[lane]))
                if bar.tx:
                    self.fault("barrier", w, instr, f"ends with {bar.tx} bytes to come")
                del w.block.mbars[int(at[lane]) & BLOCK_MASK]
            return True

        return inval

    def _mbarrier_arrive(self, instr):
        expects = "expect_tx" in instr.mods
        d, a, *rest = instr.args
        put = self.writer(d, u8)
        address = self.shared_address(a)
        number = self.reader(rest[0], i8) if rest else None

        def arrive(w, g, m):
            at = address(w)
            n = number(w) if number else None
            state = np.zeros(LANES, u8)
            for lane in self.each(m):
                bar = self.mbar(w, instr, int(at[lane]))
                if int(at[lane]) >> RANK_SHIFT not in (0, w.block.rank + 1) and not bar.shown:
                    w.sim.report("barrier", f"{w.where(instr)}: the other block may not see this mbarrier yet", True)
                state[lane] = bar.phase
                if expects:
                    bar.tx += int(n[lane])
                    count = 1
                else:
                    count = int(n[lane]) if n is not None else 1
                bar.pending -= count
                if bar.pending < 0:
                    self.fault(
                        "barrier",
                        w,
                        instr,
                        f"more than the {bar.expected} arrivals of the mbarrier at {int(at[lane]):#x}",
                    )
                if bar.clocks:
                    w.block.cluster.races.release(w, bar.clocks)
                bar.check()
            put(w, state, m)
            return True

        return arrive

    def _mbarrier_expect_tx(self, instr):
        address, number = self.shared_address(instr.args[0]), self.reader(instr.args[1], i8)

        def expect(w, g, m):
            at, n = address(w), number(w)
            for lane in self.each(m):
                self.mbar(w, instr, int(at[lane])).tx += int(n[lane])
            return True

        return expect

    def _mbarrier_test_wait(self, instr):
        return self._wait(instr, True)

    def _mbarrier_try_wait(self, instr):
        return self._wait(instr, False)

    def _wait(self, instr, once):
        by_parity = "parity" in instr.mods
        p, a, which, *_ = instr.args
        put = self.writer(p, np.dtype(bool))
        address, phase = self.shared_address(a), self.reader(which, i8)

        def wait(w, g, m):
            at, want = address(w), phase(w)
            lanes = FULL if m is None else m
            pairs = {}
            out = np.zeros(LANES, bool)
            for lane in np.flatnonzero(lanes):
                key = int(at[lane]), int(want[lane])
                if key not in pairs:
                    bar = self.mbar(w, instr, key[0])
                    pairs[key] = bar, (bar.phase & 1) != (key[1] & 1) if by_parity else bar.phase != key[1]
                out[lane] = pairs[key][1]
            if g.state is not None:
                for bar, seen in g.state:
                    if bar.phase > seen + 1:
                        w.sim.report(
                            "overrun",
                            f"{w.where(instr)}: the barrier went {bar.phase - seen} phases on while this waited",
                        )
            if w.block.cluster.races:
                for bar, done in pairs.values():
                    if done:
                        w.block.cluster.races.acquire(w, bar.clocks)
            if out[lanes].any() or once or w.sim.rng.random() < w.sim.schedule.spin:
                put(w, out, m)
                return True
            bars = [bar for bar, _ in pairs.values()]
            now = [(bar, bar.phase) for bar in bars]
            if g.state is None:
                g.state = now
            g.wait = lambda: any(bar.phase != seen for bar, seen in now)
            return False

        return wait

    def make_fence(self, instr):
        proxy = "proxy" in instr.mods and "async" in ".".join(instr.mods)

        def fence(w, g, m):
            for bar in w.barriers_to_show:
                bar.shown = True
            w.barriers_to_show.clear()
            if proxy:
                races = w.block.cluster.races
                for block in w.block.cluster.blocks:
                    if block.shared is not None:
                        dirty = block.shared.dirty
                        at = np.flatnonzero(dirty)
                        dirty[at if races is None else at[races.known(w, block.rank, at)]] = 0
            return True

        return fence

    def make_tensormap(self, instr):
        raise Unsupported(instr.name)
