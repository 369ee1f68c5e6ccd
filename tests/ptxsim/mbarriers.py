"""mbarrier objects (ISA, "mbarrier")."""

from __future__ import annotations

import numpy as np

from .cta import Mbarrier
from .dtypes import LANES, SHARED_WINDOW, i4, i8, u8
from .faults import Unsupported
from .ir import Address
from .operands import BLOCK_MASK, FULL, RANK_SHIFT, Operands


class Mbarriers(Operands):
    def mbar(self, w, instr, address: int):
        cta = self.cta_of(w, instr, address)
        at = address & BLOCK_MASK
        if cta.shared is None:
            self.fault("exited", w, instr, "an mbarrier of a CTA that has ended")
        found = cta.mbarriers.get(at)
        if found is None:
            self.fault("barrier", w, instr, f"no mbarrier was made at {at:#x} of CTA {cta.rank} of the cluster")
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
            at, n = address(w), count(w)
            for lane in self.each(m):
                a = int(at[lane])
                if a % 8 or (a & BLOCK_MASK) + 8 > w.cta.shared.size:
                    self.fault("barrier", w, instr, f"an mbarrier at {a:#x}")
                races = w.cta.cluster.races
                bar = w.cta.mbarriers[a & BLOCK_MASK] = Mbarrier(
                    int(n[lane]), instr.line, races.new_bar() if races else None
                )
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
                del w.cta.mbarriers[int(at[lane]) & BLOCK_MASK]
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
                if int(at[lane]) >> RANK_SHIFT not in (0, w.cta.rank + 1) and not bar.shown:
                    w.sim.report("barrier", w, instr, "the other CTA may not see this mbarrier yet", True)
                state[lane] = bar.phase
                if expects:
                    bar.tx += int(n[lane])
                    count = 1
                else:
                    count = int(n[lane]) if n is not None else 1
                self.check_tx(w, instr, bar)
                bar.pending -= count
                if bar.pending < 0:
                    self.fault(
                        "barrier",
                        w,
                        instr,
                        f"more than the {bar.expected} arrivals of the mbarrier at {int(at[lane]):#x}",
                    )
                if bar.clocks:
                    w.cta.cluster.races.release(w, bar.clocks)
                bar.check()
            put(w, state, m)
            return True

        return arrive

    def check_tx(self, w, instr, bar) -> None:
        """The range of a tx-count (ISA, "mbarrier", "Tx-count")."""
        if abs(bar.tx) >= 1 << 20:
            self.fault("barrier", w, instr, f"a tx-count of {bar.tx} is out of its range")

    def _mbarrier_expect_tx(self, instr):
        address, number = self.shared_address(instr.args[0]), self.reader(instr.args[1], i8)

        def expect(w, g, m):
            at, n = address(w), number(w)
            for lane in self.each(m):
                bar = self.mbar(w, instr, int(at[lane]))
                bar.tx += int(n[lane])
                self.check_tx(w, instr, bar)
            return True

        return expect

    def _mbarrier_test_wait(self, instr):
        return self._wait(instr, True)

    def _mbarrier_try_wait(self, instr):
        return self._wait(instr, False)

    def check_phase(self, w, instr, bar, wanted: int, by_parity: bool) -> None:
        """That which phase a wait means does not depend on the schedule.

        A warp knows (by its clock) that `known` phases have completed. If the barrier may have gone on since, a wait by
        parity is safe only for the next of them, and only until the one after that completes; one that would have
        passed in phase `known` must not find the barrier further: in another schedule it passes two phases early.
        """
        if not by_parity:
            if bar.phase > wanted + 1:
                w.sim.report(
                    "overrun", w, instr, f"the mbarrier is {bar.phase - wanted} phases past the one of the token"
                )
            return
        known = int(w.cta.cluster.races.clock[w.cta.cluster.races.id(w), bar.clocks[2]])
        passes_early = (known & 1) != (wanted & 1)
        if passes_early and bar.phase > known:
            text = (
                f"the mbarrier may be in phase {known} here, where this wait passes at once, and is in phase "
                f"{bar.phase}: which phase it waits for depends on the schedule, two phases apart"
            )
            w.sim.report("phase", w, instr, text)
        elif not passes_early and bar.phase > known + 1:
            text = (
                f"the mbarrier is in phase {bar.phase} and this wait is for phase {known}: it went on without this warp"
            )
            w.sim.report("overrun", w, instr, text)

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
            if w.cta.cluster.races:
                for (_, wanted), (bar, _) in pairs.items():
                    self.check_phase(w, instr, bar, wanted, by_parity)
            if w.cta.cluster.races:
                for bar, done in pairs.values():
                    if done:
                        w.cta.cluster.races.acquire(w, bar.clocks)
            if out[lanes].any() or once or w.sim.rng.random() < w.sim.schedule.spin:
                put(w, out, m)
                return True
            bars = [bar for bar, _ in pairs.values()]
            now = [(bar, bar.phase) for bar in bars]
            g.wait = lambda: any(bar.phase != seen for bar, seen in now)
            return False

        return wait
