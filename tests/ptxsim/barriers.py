"""Barriers of CTAs and clusters, and fences (ISA, "bar", "barrier.cluster", "fence")."""

from __future__ import annotations

import numpy as np

from .dtypes import LANES, i4
from .faults import Unsupported
from .operands import FULL, Operands


class Barriers(Operands):
    def make_bar(self, instr):
        if "warp" in instr.mods:
            lanes_of = self.members(instr.args[0])

            def warp_sync(w, g, m):
                if not self.whole(w, g, lanes_of(w, m)):
                    return False
                if w.cta.cluster.races is not None:
                    w.cta.cluster.races.tick(w)
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
            cta = w.cta
            if g.state is None:
                which = int(number(w)[self.first(m)])
                need = int(count(w)[self.first(m)]) if count else len(cta.warps) * LANES
                if need % LANES or not 0 <= which < 16:
                    self.fault("barrier", w, instr, f"barrier {which} of {need} threads")
                if not count and cta.sim.threads % LANES == 0:
                    need = sum(LANES for x in cta.warps if x.groups)
                races = cta.cluster.races
                barrier = cta.barriers.setdefault(which, [need, 0, 0, races.new() if races else None])
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
                if cta.cluster.races:
                    cta.cluster.races.acquire(w, barrier[3])
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
            cluster = w.cta.cluster
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
            cluster = w.cta.cluster
            lanes = FULL if m is None else m
            mine = int(w.cluster_phase[lanes].max())
            if cluster.phase > mine:
                if cluster.races:
                    cluster.races.acquire(w, cluster.clocks)
                return True
            g.wait = lambda: cluster.phase > mine
            return False

        return cluster_arrive if arrive else cluster_wait

    def make_fence(self, instr):
        proxy = "proxy" in instr.mods and "async" in ".".join(instr.mods)

        def fence(w, g, m):
            for bar in w.barriers_to_show:
                bar.shown = True
            w.barriers_to_show.clear()
            if proxy:
                races = w.cta.cluster.races
                for cta in w.cta.cluster.ctas:
                    if cta.shared is not None:
                        dirty = cta.shared.dirty
                        at = np.flatnonzero(dirty)
                        dirty[at if races is None else at[races.known(w, cta.rank, at)]] = 0
            return True

        return fence

    def make_tensormap(self, instr):
        raise Unsupported(instr.name)
