"""Non-bulk asynchronous copies (ISA, "cp.async", async-group)."""

from __future__ import annotations

import numpy as np

from .dtypes import LANES, i8
from .memory import BASE
from .operands import BLOCK_MASK, BY_COPY, FULL, Operands


class AsyncCopies(Operands):
    def _copy(self, instr):
        to, source, size, *rest = instr.args
        to, source = self.shared_address(to), self.address(source)
        size = size.value
        given = self.reader(rest[0], i8) if rest else None

        def copy(w, g, m):
            sim = w.sim
            a, b = to(w), source(w)
            lanes = np.flatnonzero(FULL if m is None else m)
            count = given(w)[lanes] if given else np.full(len(lanes), size)
            if ((count != 0) & (count != size)).any():
                self.fault("unsupported", w, instr, "a copy of a part")
            cta = self.cta_of(w, instr, a[lanes[0]])
            shared, at = cta.shared, a[lanes] & BLOCK_MASK
            if int(at.max()) + size > shared.size or (at & (size - 1)).any():
                self.fault("out of bounds", w, instr, "cp.async into shared memory")
            races = w.cta.cluster.races
            if races is not None:
                races.copy_async(w, instr, cta.rank, at, size)
            reads = count == size
            from_ = b - np.int64(BASE)
            if reads.any():
                chosen = np.zeros(LANES, bool)
                chosen[lanes[reads]] = True
                from_ = self.check_global(w, instr, b, None if chosen.all() else chosen, size, False, check=False)
                if races is not None:
                    races.global_copy(w, instr, from_[chosen], size)
            from_ = from_[lanes]
            shift = min(size, 16).bit_length() - 1
            view, memory = shared.views[size], sim.memory.views[size]
            shared.bytes[(at[:, None] + np.arange(size)).ravel()] = 0xFF
            part = at >> 4
            np.add.at(shared.flight, part, 1)
            state = {"done": False}

            def operation():
                if state["done"]:
                    return
                state["done"] = True
                view[at[~reads] >> shift] = 0
                view[at[reads] >> shift] = memory[from_[reads] >> shift]
                np.subtract.at(shared.flight, part, 1)
                shared.dirty[part] = BY_COPY | (w.number + 1)

            w.copies.append(operation)
            sim.later(operation)
            return True

        return copy

    def _commit(self, instr):
        def commit(w, g, m):
            if not self.whole(w, g):
                return False
            w.copy_groups.append(w.copies)
            w.copies = []
            if w.cta.cluster.races:
                w.cta.cluster.races.commit(w, 2)
            return True

        return commit

    def _wait_group(self, instr):
        keep = instr.args[0].value if instr.args else 0

        def wait(w, g, m):
            if not self.whole(w, g):
                return False
            races = w.cta.cluster.races
            if "wait_all" in instr.mods:
                w.copy_groups.append(w.copies)
                w.copies = []
                if races:
                    races.commit(w, 2)
            if races:
                races.waited(w, 2, keep)
            while len(w.copy_groups) > keep:
                for operation in w.copy_groups.popleft():
                    operation()
            return True

        return wait
