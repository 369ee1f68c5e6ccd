"""Barriers of CTAs and clusters, and fences (ISA, "bar", "barrier.cluster", "fence")."""

from __future__ import annotations

import numpy as np

from .cta import NamedBarrier
from .dtypes import LANES, i4
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
        arrives_only = "arrive" in instr.mods
        number = self.reader(instr.args[0], i4)
        count = self.reader(instr.args[1], i4) if len(instr.args) > 1 else None

        def bar(w, g, m):
            if not self.whole(w, g):
                return False
            races = w.cta.cluster.races
            if g.state is None:
                which = int(number(w)[self.first(m)])
                need = int(count(w)[self.first(m)]) if count else None
                barrier = self.named_barrier(w, instr, which, need)
                barrier.arrived += LANES
                generation = barrier.generation
                if races:
                    races.release(w, barrier.clocks)
                if barrier.complete():
                    if races and not arrives_only:
                        races.acquire(w, barrier.clocks)
                    return True
                if arrives_only:
                    return True
                g.state = (barrier, generation)
            barrier, generation = g.state
            if barrier.generation != generation:
                if races:
                    races.acquire(w, barrier.clocks)
                return True
            g.wait = lambda: barrier.generation != generation
            return False

        return bar

    def named_barrier(self, w, instr, which: int, need: int | None) -> NamedBarrier:
        if (need is not None and (need % LANES or need <= 0)) or not 0 <= which < 16:
            self.fault("barrier", w, instr, f"barrier {which} of {need} threads")
        barrier = w.cta.barriers.get(which)
        if barrier is None:
            barrier = w.cta.barriers[which] = NamedBarrier(w.cta)
        if barrier.arrived and barrier.count != need:
            counts = ["all" if n is None else n for n in (barrier.count, need)]
            self.fault("barrier", w, instr, f"barrier {which} of {counts[0]} threads, and here of {counts[1]}")
        barrier.count, barrier.instr = need, instr
        return barrier

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
