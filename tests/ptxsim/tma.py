"""Tensor copies and bulk-groups (ISA, "cp.async.bulk.tensor")."""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np

from .dtypes import PARAM_WINDOW, i4, u2
from .faults import Unsupported
from .memory import BASE
from .operands import BLOCK_MASK, Operands


class TensorCopies(Operands):
    def make_cp(self, instr):
        mods = instr.mods
        if mods[:3] == ("async", "bulk", "tensor"):
            return self._tensor_load(instr) if mods[4].startswith("shared") else self._tensor_store(instr)
        if mods[:3] == ("async", "bulk", "commit_group"):
            return self._bulk_commit(instr)
        if mods[:3] == ("async", "bulk", "wait_group"):
            return self._bulk_wait(instr)
        if mods[:2] == ("async", "commit_group"):
            return self._commit(instr)
        if mods[:2] in (("async", "wait_group"), ("async", "wait_all")):
            return self._wait_group(instr)
        if mods[:1] == ("async",) and mods[1] in ("ca", "cg"):
            return self._copy(instr)
        raise Unsupported(instr.name)

    def tensor_map(self, w, instr, address: int):
        found = w.sim.device.maps.get(address) or w.sim.maps.get(address - PARAM_WINDOW) or w.sim.maps.get(address)
        if found is None:
            self.fault("address", w, instr, f"no tensor map lies at {address:#x}")
        return found

    def _tensor_load(self, instr):
        multicast = any(mod == "multicast::cluster" for mod in instr.mods)
        if any(mod.startswith(("im2col", "tile::")) for mod in instr.mods):
            raise Unsupported(instr.name)
        to, source, bar_at, *rest = instr.args
        to, bar_at = self.shared_address(to), self.shared_address(bar_at)
        map_at = self.reader(source.base)
        coordinates = [self.reader(c, i4) for c in source.coordinates]
        mask_of = self.reader(rest[0], u2) if multicast else None

        def load(w, g, m):
            sim = w.sim
            a, b, t, places = to(w), bar_at(w), map_at(w), [c(w) for c in coordinates]
            masks = mask_of(w) if mask_of else None
            for lane in self.each(m):
                found = self.tensor_map(w, instr, int(t[lane]) + source.offset)
                where = tuple(int(p[lane]) for p in places)
                if len(where) != len(found.box):
                    self.fault("tensor map", w, instr, "its rank is another")
                target = int(a[lane])
                home = self.cta_of(w, instr, target)
                at, bar = target & BLOCK_MASK, int(b[lane]) & BLOCK_MASK
                if at % 128 or at < sim.shared_base or at + found.bytes > home.shared.size:
                    self.fault("tensor copy", w, instr, f"to shared memory at {at:#x}")
                ctas = w.cta.cluster.ctas
                chosen = [x for x in ctas if int(masks[lane]) >> x.rank & 1] if masks is not None else [home]
                if masks is not None and int(masks[lane]) >> len(ctas):
                    self.fault("tensor copy", w, instr, f"to CTAs {int(masks[lane]):b} of {len(ctas)}")
                for cta in chosen:
                    self._start_load(w, instr, found, where, cta, at, bar)
            return True

        return load

    def _start_load(self, w, instr, found, where, cta, at, bar_at):
        """Into one cta, in a few pieces that land when they like."""
        sim = w.sim
        if cta.shared is None:
            self.fault("exited", w, instr, "a copy into a CTA that has ended")
        rows = found.rows
        # 1, 2 or 4 pieces of whole rows
        pieces = sim.rng.choice([1, 2, 4])
        cuts = sorted({0, rows, *(sim.rng.randrange(1, rows) for _ in range(pieces - 1))}) if rows > 1 else [0, rows]
        shared = cta.shared
        parts = found.parts(at)
        flat = parts.ravel()
        wide = shared.views[16]
        if cta.mbarriers and any(at <= base < at + found.bytes for base in cta.mbarriers):
            self.fault("tensor copy", w, instr, "over an mbarrier")
        if shared.dirty[flat].any():
            sim.report("proxy", w, instr, "a tensor copy over what ordinary stores wrote, without fence.proxy.async")
            shared.dirty[flat] = 0
        if shared.flight[flat].any():
            sim.report("race", w, instr, "two tensor copies into the same shared memory")
        there = cta.mbarriers.get(bar_at)
        if there is not None and there.clocks:
            w.cta.cluster.races.copy_into(w, instr, cta.rank, flat, there.clocks, there.phase)
            w.cta.cluster.races.global_load(w, instr, found, where, there.clocks, there.phase)
        poison = wide[flat].copy()
        poison.view(np.uint8)[:] = 0xFF
        wide[flat] = poison
        shared.flight[flat] += 1

        def land(first, last):
            def operation():
                if cta.shared is None:
                    self.fault("exited", w, instr, "a copy into a CTA that has ended")
                bar = cta.mbarriers.get(bar_at)
                if bar is None:
                    self.fault(
                        "barrier", w, instr, f"no mbarrier at {bar_at:#x} of CTA {cta.rank} for the bytes of a copy"
                    )
                if not bar.shown:
                    sim.report("barrier", w, instr, "a copy completes at an mbarrier that no fence has shown", True)
                data = found.load(sim.memory, where, first, last)
                wide[parts[first:last]] = data.view(np.complex128)
                shared.flight[parts[first:last]] -= 1
                bar.tx -= data.nbytes
                bar.check()

            return operation

        for first, last in itertools.pairwise(cuts):
            sim.later(land(first, last))

    def _tensor_store(self, instr):
        if "bulk_group" not in instr.mods or instr.mods[3].startswith("shared"):
            raise Unsupported(instr.name)
        target, source, *_ = instr.args
        map_at, address = self.reader(target.base), self.shared_address(source)
        coordinates = [self.reader(c, i4) for c in target.coordinates]

        def store(w, g, m):
            sim = w.sim
            t, a, places = map_at(w), address(w), [c(w) for c in coordinates]
            for lane in self.each(m):
                found = self.tensor_map(w, instr, int(t[lane]) + target.offset)
                where = tuple(int(p[lane]) for p in places)
                at = int(a[lane]) & BLOCK_MASK
                shared = w.cta.shared
                if at % 128 or at + found.bytes > shared.size:
                    self.fault("tensor copy", w, instr, f"from shared memory at {at:#x}")
                self.check_writable(w, instr, found)
                parts = found.parts(at)
                if shared.dirty[parts].any():
                    who = sorted(set(shared.dirty[parts].ravel().tolist()) - {0})
                    sim.report(
                        "proxy",
                        w,
                        instr,
                        f"a tensor store reads what warps {[x - 1 for x in who]} wrote without fence.proxy.async",
                    )
                if w.cta.cluster.races:
                    w.cta.cluster.races.read_async(w, instr, w.cta.rank, parts, 1)
                    w.cta.cluster.races.global_store(w, instr, found, where)
                operation = {"read": False, "done": False, "waited": False, "instr": instr}

                def read(operation=operation, found=found, parts=parts, shared=shared):
                    if not operation["read"]:
                        operation["read"] = True
                        operation["data"] = shared.views[16][parts].view(np.uint8).reshape(found.rows, -1)

                def write(operation=operation, found=found, where=where, read=read):
                    read()
                    if not operation["done"]:
                        operation["done"] = True
                        found.store(sim.memory, where, 0, found.rows, operation["data"])

                operation["run_read"], operation["run_write"] = read, write
                w.bulk_open.setdefault(int(lane), []).append(operation)
                sim.later(read)
                sim.later(write)
            return True

        return store

    def check_writable(self, w, instr, found) -> None:
        owner, first = w.sim.memory.owner, found.base - BASE
        if (owner[first], owner[first + found.extent - 1]) != (2, 2):
            self.fault(
                "out of bounds", w, instr, f"a store through a tensor map of {w.sim.memory.describe(found.base)}"
            )

    def _bulk_commit(self, instr):
        def commit(w, g, m):
            for lane in self.each(m):
                lane = int(lane)
                w.bulk_groups.setdefault(lane, deque()).append(w.bulk_open.pop(lane, []))
            if w.cta.cluster.races:
                w.cta.cluster.races.commit(w, 1)
            return True

        return commit

    def _bulk_wait(self, instr):
        keep, reads = instr.args[0].value, "read" in instr.mods

        def wait(w, g, m):
            if not w.bulk_groups:
                return True
            for lane in self.each(m):
                groups = w.bulk_groups.get(int(lane))
                if not groups:
                    continue
                if w.cta.cluster.races:
                    w.cta.cluster.races.waited(w, 1, keep)
                    if not reads:
                        w.cta.cluster.races.written(w, keep)
                for group in list(groups)[: max(0, len(groups) - keep)]:
                    for operation in group:
                        operation["run_read"]()
                        operation["waited"] = True
                        if not reads:
                            operation["run_write"]()
                if not reads:
                    while len(groups) > keep:
                        groups.popleft()
            return True

        return wait
