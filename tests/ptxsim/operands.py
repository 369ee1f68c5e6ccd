"""Operands of instructions as functions of a warp, and checks of the addresses they reach."""

from __future__ import annotations

import numpy as np

from .dtypes import LANES, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, i8
from .faults import Fault, Unsupported
from .ir import Address, Imm, Instr, Not, Reg, Special, Symbol, Vector
from .memory import BASE

FULL = np.ones(LANES, bool)
LANE = np.arange(LANES)
RANK_SHIFT = 24  # a shared address of a cluster: which cta, plus one, and where in it
BLOCK_MASK = (1 << RANK_SHIFT) - 1
BY_COPY = 0x8000  # in SharedMemory.dirty: by cp.async, after which Triton fences nothing


class Operands:
    def __init__(self, program):
        self.program = program
        self.t = program.translator
        products = [i for i in program.kernel.instrs if i.op == "wgmma" and i.mods[0] == "mma_async"]
        vectors = [arg for i in products for arg in i.args[:2] if isinstance(arg, Vector)]
        self.wgmma_registers = {tuple(reg.number for reg in vector.parts) for vector in vectors}

    def guard(self, instr: Instr):
        if instr.guard is None:
            return None
        negated = isinstance(instr.guard, Not)
        return (instr.guard.of if negated else instr.guard).number, negated

    @staticmethod
    def active(w, g, guard):
        """The lanes that take part: None for all 32, False for none."""
        m = g.mask
        if guard is None:
            return m
        p = w.R[guard[0]]
        if guard[1]:
            p = ~p
        if m is not None:
            p = p & m
        if p.all():
            return None
        return p if p.any() else False

    def reader(self, arg, dtype=i8):
        """A function of a warp that gives an operand as an array."""
        if isinstance(arg, Reg):
            n, have = arg.number, self.t.storage[arg.number]
            if have.kind == "b":
                return lambda w: w.R[n]
            if have == dtype:
                return lambda w: w.R[n]
            if have.itemsize == dtype.itemsize:
                return lambda w: w.R[n].view(dtype)
            if have.itemsize < dtype.itemsize:  # addresses: zero extended
                source = np.dtype(f"u{have.itemsize}")
                return lambda w: w.R[n].view(source).astype(dtype)
            source = np.dtype(f"u{have.itemsize}")
            return lambda w: w.R[n].view(source).astype(f"u{dtype.itemsize}").view(dtype)
        if isinstance(arg, Imm):
            value = self.t.immediate(arg, dtype)
            if dtype.kind in "ui":
                array = np.full(LANES, int(value) & ((1 << 8 * dtype.itemsize) - 1), f"u{dtype.itemsize}").view(dtype)
            else:
                array = np.full(LANES, value, dtype)
            return lambda w: array
        if isinstance(arg, Symbol):
            array = np.full(LANES, self.program.symbols[arg.name], dtype)
            return lambda w: array
        if isinstance(arg, Special):
            return lambda w: w.special(arg.name).astype(dtype)
        raise Unsupported(f"operand {arg}")

    def address(self, arg: Address):
        base, offset = self.reader(arg.base), arg.offset
        if offset:
            delta = np.int64(offset)
            return lambda w: base(w) + delta
        return base

    def writer(self, arg, dtype):
        """A function that puts an array of this type into a register, where the mask says so."""
        if arg is None:
            return lambda w, x, m: None
        n, have = arg.number, self.t.storage[arg.number]
        if have == dtype:
            change = None
        elif have.itemsize == dtype.itemsize and have.kind != "b":
            change = lambda x: x.view(have)  # noqa: E731
        elif have.itemsize > dtype.itemsize:
            wide = np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{have.itemsize}")
            narrow = np.dtype(f"u{dtype.itemsize}") if dtype.kind == "f" else dtype
            change = lambda x: x.view(narrow).astype(wide).view(have)  # noqa: E731
        elif have.kind == dtype.kind == "b":
            change = None
        else:
            raise Unsupported(f"{arg.name} is narrower than {dtype}")

        def put(w, x, m):
            if change is not None:
                x = change(x)
            w.R[n] = x if m is None else np.where(m, x, w.R[n])

        return put

    @staticmethod
    def fault(kind, w, instr, message):
        raise Fault(kind, f"{w.where(instr)}: {message}")

    @staticmethod
    def whole(w, g, lanes=None) -> bool:
        """Whether the lanes that must be here are; else the group waits for them."""
        if g.mask is None or w.covers(g, lanes):
            return True
        g.wait, g.lacks = (lambda: w.covers(g, lanes)), True
        return False

    @staticmethod
    def first(m) -> int:
        return 0 if m is None else int(m.argmax())

    SPACES = ("param", "global", "shared", "local", "const")

    def space(self, instr: Instr) -> str:
        for mod in instr.mods:
            name = mod.split("::")[0]
            if name in self.SPACES:
                return "global" if name == "const" else name
        return "generic"

    def resolve(self, w, instr, address, m):
        """Of generic addresses: the space, and the addresses in it."""
        a = int(address[self.first(m)])
        if a >= BASE:
            return "global", address
        if a >= PARAM_WINDOW:
            return "param", address - PARAM_WINDOW
        if a >= LOCAL_WINDOW:
            return "local", address - LOCAL_WINDOW
        if a >= SHARED_WINDOW:
            return "shared", address - SHARED_WINDOW
        self.fault("address", w, instr, f"{a:#x} is in no window")

    def check_global(self, w, instr, address, m, size, writes: bool, atomic=False, check=True):
        """Indices of bytes in the arena."""
        memory = w.sim.memory
        at = address - np.int64(BASE)
        if m is not None:
            at = np.where(m, at, at[int(m.argmax())])
        low, high = int(at.min()), int(at.max())
        if low < 0 or high + size > len(memory.bytes):
            bad = low if low < 0 else high
            self.fault("out of bounds", w, instr, f"global memory at {bad + BASE:#x}")
        if size > 1 and (at & np.int64(size - 1)).any():
            bad = int(at[(at & (size - 1)) != 0][0])
            self.fault("misaligned", w, instr, f"{size} bytes at {memory.describe(bad + BASE)}")
        least = 2 if writes else 1
        owner = memory.owner
        bad = (owner[at] < least) | (owner[at + (size - 1)] < least)
        if bad.any():
            what = "write to" if writes else "read of"
            self.fault("out of bounds", w, instr, f"{what} {size} bytes at {memory.describe(int(at[bad][0]) + BASE)}")
        if w.sim.global_races is not None and check:
            w.sim.global_races.ordinary(w, instr, at if m is None else at[m], size, writes, atomic)
        return at

    def cta_of(self, w, instr, address):
        """The CTA of an address, by its first lane, and offsets in it."""
        rank = int(address) >> RANK_SHIFT
        if rank == 0:
            return w.cta
        ctas = w.cta.cluster.ctas
        if not 0 < rank <= len(ctas):
            self.fault("address", w, instr, f"shared address {int(address):#x} is of no CTA of the cluster")
        return ctas[rank - 1]

    def check_shared(self, w, instr, address, m, size, writes, collective=False, same=None, atomic=False):
        if m is not None:
            address = np.where(m, address, address[int(m.argmax())])
        cta = self.cta_of(w, instr, address[0])
        if (address >> RANK_SHIFT != address[0] >> RANK_SHIFT).any():
            self.fault("unsupported", w, instr, "lanes that reach into several CTAs")
        at = address & BLOCK_MASK
        shared = cta.shared
        if shared is None:
            self.fault("exited", w, instr, "the shared memory of a CTA that has ended")
        if int(at.max()) + size > shared.size or int(at.min()) < w.sim.shared_base:
            self.fault("out of bounds", w, instr, f"shared memory at {int(at.max()):#x} of {shared.size:#x} bytes")
        if size > 1 and (at & (size - 1)).any():
            self.fault("misaligned", w, instr, f"{size} bytes of shared memory")
        races = w.cta.cluster.races
        if races is not None:
            unless = same and (lambda: same(shared, at))
            races.access(w, instr, cta.rank, at, m, size, writes, collective, unless, atomic)
        part = at >> 4
        if shared.flight[part].any():
            what = "overwrites" if writes else "reads"
            w.sim.report("race", w, instr, f"{what} shared memory into which a copy is under way")
        if writes:
            shared.dirty[part if m is None else part[m]] = w.number + 1
            for base in cta.mbarriers:
                if ((at < base + 8) & (at + size > base)).any():
                    self.fault("barrier", w, instr, "an ordinary store to an mbarrier")
        return shared, at
