"""Faults put into the CUDA kernels on purpose: what is changed, where it shows, and as what.

A mutant is a replacement in a file of csrc/cuda, all places of it; the rest of csrc/ stays. It is run on its case until
a schedule shows it. ``kinds`` are the faults it may show as; one that shows as nothing says why in ``equivalent``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from emulated import cuda_hopper, ptx
from emulated.cuda_hopper import Case
from emulated.jobs import Verdict, judged

KERNEL, PTX, EPILOGUE, LAYOUT = "hopper.cuh", "hopper_ptx.h", "hopper_epilogue.cuh", "hopper_layout.h"
# A fault of the protocol shows as what a schedule makes of it.
LOST = frozenset({"race", "wrong numbers", "deadlock", "barrier"})


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    case: Any
    kinds: frozenset[str] = LOST
    execute: Callable[..., Verdict] = cuda_hopper.execute
    equivalent: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def replaced(self) -> ptx.Replaced:
        name = f"cuda/{self.file}"
        text = ptx.source(name)
        if self.old not in text:
            raise LookupError(f"{self.name}: {name} has no {self.old!r}; the mutant must follow the source")
        return ((name, text.replace(self.old, self.new)),)

    def run(self, seed: int) -> Verdict:
        return judged(self.execute, self.case, seed, (self.case.activation,), self.replaced)


def kinds(*names: str) -> frozenset[str]:
    return frozenset(names)


WRONG = kinds("wrong numbers")
BIG = {kind: Case(kind, 256, 256, 448) for kind in ptx.KINDS}  # two tiles, the ring almost three times
EDGES = {kind: Case(kind, 300, 136, 200) for kind in ptx.KINDS}  # four tiles with edges
LONG = {kind: Case(kind, 512, 256, 448) for kind in ptx.KINDS}  # four tiles, both groups twice

_WAIT_FULL, _WAIT_EMPTY = (
    "        barrier_wait(full + 8 * stage, parity);\n",
    "          barrier_wait(empty + 8 * stage, parity);\n",
)
_RELEASE, _STEPS = (
    "        if (step > 0) release(before);",
    "      for (int step = 0; step < steps; ++step) {\n        const uint32_t from",
)
_WAIT_ORDER = "      if (tile != cluster) order_wait(kFirstOrderBarrier + which);\n"
_ARRIVE_ORDER = "      if (tile + clusters < tiles) order_arrive(kFirstOrderBarrier + 1 - which);\n"
_STAGED = "inside(first + i) ? staged(first + i, lane % parts) : Pack<D>{}"

RING = [
    Mutant("a consumer does not wait for a full stage", KERNEL, _WAIT_FULL, "", BIG["forward"]),
    Mutant("the consumers' parity is the other", KERNEL, "barrier_wait(full + 8 * stage, parity)", "barrier_wait(full + 8 * stage, parity ^ 1)", BIG["forward"]),
    Mutant("the consumers' parity does not flip", KERNEL, "          stage = 0;\n          parity ^= 1;", "          stage = 0;", BIG["forward"]),
    Mutant("the consumers' next tile forgets the parity", KERNEL, "(turn + 2 * steps) % (2 * kStages)", "(turn + 2 * steps) % kStages", Case("forward", 512, 256, 256)),
    Mutant("the second consumer begins with the first's parity", KERNEL, "which * steps % (2 * kStages)", "which * steps % kStages", BIG["forward"]),
    Mutant("the loader's parity is the other", KERNEL, "int stage = 0, parity = 1;", "int stage = 0, parity = 0;", BIG["forward"]),
    Mutant("the loader's parity does not flip", KERNEL, "            stage = 0;\n            parity ^= 1;", "            stage = 0;", BIG["forward"]),
    Mutant("the loader does not wait for an empty stage", KERNEL, _WAIT_EMPTY, "", BIG["forward"]),
    Mutant("a stage released one step early", KERNEL, _RELEASE, "        release(stage); if (false) release(before);", BIG["forward"]),
    Mutant("a stage released before its products are waited for", KERNEL, f"        products_wait<1>();\n{_RELEASE}", f"{_RELEASE}\n        products_wait<1>();", BIG["forward"]),
    Mutant("a stage of the first step released twice", KERNEL, _RELEASE, "        release(before);", BIG["forward"]),
    Mutant("no products_wait<1>", KERNEL, "        products_wait<1>();\n", "", BIG["forward"]),
    Mutant("products_wait<2> in place of <1>", KERNEL, "products_wait<1>()", "products_wait<2>()", BIG["forward"]),
    Mutant("no products_wait<0>", KERNEL, "      products_wait<0>();\n", "", BIG["forward"]),
    Mutant("no products_commit", KERNEL, "        products_commit();\n", "", BIG["forward"]),
    Mutant("no wgmma.fence", KERNEL, "        products_begin();\n", "", BIG["forward"]),
    Mutant("the last stage of a tile not released", KERNEL, "      hold(c);\n      release(before);", "      hold(c);", BIG["forward"]),
    Mutant("released to the own block only", KERNEL, "if (lane < 2) barrier_arrive(empty + 8 * stage, lane)", "if (lane == rank) barrier_arrive(empty + 8 * stage, lane)", BIG["forward"]),
    Mutant("empty counts the warps of one block", KERNEL, "2 * kGroupThreads / 32);", "kGroupThreads / 32);", BIG["forward"]),
    Mutant("empty counts the warps of both groups", KERNEL, "2 * kGroupThreads / 32);", "4 * kGroupThreads / 32);", BIG["forward"]),
    Mutant("too few bytes expected", KERNEL, "barrier_expect(ready, kStageBytes)", "barrier_expect(ready, kOperandBytes)", BIG["forward"]),
    Mutant("bytes not expected", KERNEL, "barrier_expect(ready, kStageBytes);", 'asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(ready) : "memory");', BIG["forward"]),
    Mutant("a multicast to one block", KERNEL, "place.column * kTile + rank * kHalfRows, ready, 3)", "place.column * kTile + rank * kHalfRows, ready, 1)", BIG["forward"]),
    Mutant("the halves of B exchanged", KERNEL, "kOperandBytes + rank * kHalfBytes", "kOperandBytes + (1 - rank) * kHalfBytes", BIG["forward"]),
    Mutant("both blocks load the same half of B", KERNEL, "kOperandBytes + rank * kHalfBytes", "kOperandBytes", BIG["forward"]),
    Mutant("no cluster_sync at the end", KERNEL, "  cluster_sync();  // shared memory must not go while the other block writes to it\n", "", BIG["forward"]),
    Mutant("no cluster_sync at the start", KERNEL, "  cluster_sync();\n\n  if (group == 0)", "\n  if (group == 0)", BIG["forward"]),
    Mutant("barriers not made visible", KERNEL, "    barriers_visible();\n", "", BIG["forward"]),
    Mutant("accumulators not cleared", KERNEL, "step > 0 || i > 0", "true", BIG["forward"]),
    Mutant("accumulators cleared at each step", KERNEL, "step > 0 || i > 0", "i > 0", BIG["forward"]),
    Mutant("registers not given away", KERNEL, "    give_registers<kLoaderRegisters>();\n", "", BIG["forward"]),
]  # fmt: skip
ORDER = [
    Mutant("no order_wait", KERNEL, _WAIT_ORDER, "", LONG["forward"]),
    Mutant("no order_arrive", KERNEL, _ARRIVE_ORDER, "", LONG["forward"]),
    Mutant("neither order_wait nor order_arrive", PTX, "bar.sync %0, 256;", "", LONG["forward"]),
    Mutant("the other group told before the first step", KERNEL, _STEPS, f"{_ARRIVE_ORDER}{_STEPS}", LONG["forward"]),
    Mutant("a group waits where it tells the other", KERNEL, "order_wait(kFirstOrderBarrier + which)", "order_wait(kFirstOrderBarrier + 1 - which)", LONG["forward"]),
    Mutant("order barriers exchanged on both sides", KERNEL, "kFirstOrderBarrier + ", "kFirstOrderBarrier + 1 - ", LONG["forward"]),
    Mutant("a cluster's first tile waits", KERNEL, "if (tile != cluster) order_wait", "order_wait", LONG["forward"]),
    Mutant("after the last tile the other is told", KERNEL, "if (tile + clusters < tiles) order_arrive", "order_arrive", LONG["forward"]),
    Mutant("an order barrier is the epilogue's", KERNEL, "kFirstOrderBarrier = 3;", "kFirstOrderBarrier = 1;", LONG["dgrad"]),
]  # fmt: skip
STAGING = [
    Mutant("no __syncwarp before staging", EPILOGUE, "    __syncwarp();  // the pass over the tile before this one has read what lies here\n", "", EDGES["forward"]),
    Mutant("no __syncwarp after staging", EPILOGUE, "      }\n    }\n    __syncwarp();\n  }", "      }\n    }\n  }", EDGES["forward"]),
    Mutant("both groups stage in one place", KERNEL, "staging + (own / kGroupThreads - 1) * kStagingBytes", "staging", LONG["forward"]),
    Mutant("stmatrix without the exchange of parts", EPILOGUE, "part_at(stored_row(half, warp, lane), stored_part(sixteen, lane))", "(stored_row(half, warp, lane) * 256 + stored_part(sixteen, lane) * 16)", EDGES["forward"]),
    Mutant("no bound of rows", EPILOGUE, "return row(pass) < static_cast<int>(arguments.product.m) && column()", "return column()", EDGES["forward"]),
    Mutant("no bound of columns", EPILOGUE, " && column() < static_cast<int>(arguments.product.n);", ";", EDGES["forward"]),
    Mutant("bias of the next column", EPILOGUE, "bias_of(of, first + register_column(lane, number)", "bias_of(of, 1 + first + register_column(lane, number)", EDGES["forward"]),
    Mutant("bias read beyond the edge", EPILOGUE, "return bias && at < arguments.product.n ?", "return bias ?", EDGES["forward"]),
    Mutant("the gate's bias for both parts", EPILOGUE, "second ? p.bias2 : p.bias", "p.bias", EDGES["gated_forward"]),
    Mutant("the weights of a gated layer exchanged", KERNEL, "rank ? b2 : b", "rank ? b : b2", EDGES["gated_forward"]),
    Mutant("add_up: no barrier before", EPILOGUE, "    group_sync(barrier);  // every warp has read what was staged\n", "", EDGES["dgrad"]),
    Mutant("add_up: no barrier between", EPILOGUE, "    group_sync(barrier);\n    const int thread", "    const int thread", EDGES["dgrad"]),
    Mutant("add_up: no barrier after", EPILOGUE, "    group_sync(barrier);  // before somebody stages again\n", "", EDGES["dgrad"]),
    Mutant("add_up: one barrier for both groups", KERNEL, "epilogue.run(c, own / kGroupThreads)", "epilogue.run(c, 1)", LONG["dgrad"]),
    Mutant("add_up: a row of sums too many", EPILOGUE, "if (at < n && tile_row * kTile < arguments.product.m)", "if (at < n)", EDGES["dgrad"]),
    Mutant("add_up: columns beyond the edge", EPILOGUE, "if (at < n && tile_row", "if (tile_row", EDGES["dgrad"]),
    Mutant("add_up: half of the rows", EPILOGUE, "mine[i] += __shfl_xor_sync(0xffffffff, mine[i], 16);", ";", EDGES["dgrad"]),
    Mutant("sums of rows beyond the last one", EPILOGUE, _STAGED, "staged(first + i, lane % parts)", Case("dgrad", 130, 136, 72, special=float("inf"))),
    Mutant("sums of the gate for both parts", EPILOGUE, "add_up(sums2, p.sums2, barrier)", "add_up(sums, p.sums2, barrier)", EDGES["gated_dgrad"]),
    Mutant("what was kept of the pass before", EPILOGUE, "fetch(first + ahead)", "fetch(first)", EDGES["dgrad"]),
    Mutant("what was kept fetched beyond the last pass", EPILOGUE, "pass >= passes || !inside(pass)", "!inside(pass)", LONG["dgrad"]),
    Mutant("a scale of the wrong block", EPILOGUE, "column() / kBlock;", "column() / (2 * kBlock);", Case("dgrad", 128, 136, 72, policy="fp8")),
    Mutant("a scale written beside its block", EPILOGUE, "column() / kBlock;", "column() / (2 * kBlock);", Case("forward", 128, 136, 72, policy="fp8")),
    Mutant("lanes outside do not come to the scale", EPILOGUE, "const uint32_t scale = scale_of_block(z);\n    if (!inside(pass)) return;", "if (!inside(pass)) return;\n    const uint32_t scale = scale_of_block(z);", Case("forward", 128, 136, 72, policy="fp8")),
    Mutant("bits of the row before", EPILOGUE, "return offset(pass) / 2;", "return (offset(pass) - arguments.product.n) / 2;", Case("forward", 128, 136, 72, policy="output_bits")),
    Mutant("bits of the next pack", EPILOGUE, "beside)[bits_at(pass) / 4]", "beside)[bits_at(pass) / 4 + 1]", Case("dgrad", 128, 136, 72, policy="output_bits")),
    Mutant("outside a number is of the left side", EPILOGUE, "0xcccccccc", "0", Case("dgrad", 130, 136, 72, policy="output_bits")),
]  # fmt: skip
PLACES = [
    Mutant("descriptors of A and B exchanged", KERNEL, "(c[half], of_a, of_b,", "(c[half], of_b, of_a,", BIG["forward"]),
    Mutant("both halves of the rows of A are the first", LAYOUT, "stage + half * kHalfBytes + sixteen * 32", "stage + sixteen * 32", BIG["forward"]),
    Mutant("leading offset of B by steps wrong", LAYOUT, "sixteen * 2048, 1024, kHalfBytes)", "sixteen * 2048, 1024, 1024)", BIG["dgrad"]),
    Mutant("stride of B by steps wrong", LAYOUT, "sixteen * 2048, 1024, kHalfBytes)", "sixteen * 2048, 2048, kHalfBytes)", BIG["dgrad"]),
    Mutant("stride of A wrong", LAYOUT, "sixteen * 32, 1024, 16);\n}\nHD uint64_t b_at", "sixteen * 32, 512, 16);\n}\nHD uint64_t b_at", BIG["forward"]),
    Mutant("no swizzle in the descriptors", LAYOUT, " | uint64_t{1} << 62", "", BIG["forward"]),
    Mutant("the same sixteen steps four times", LAYOUT, "kOperandBytes + sixteen * 32", "kOperandBytes", BIG["forward"]),
    Mutant("a cluster's blocks exchange their tiles", LAYOUT, "2 * (first + inside % pairs) + rank", "2 * (first + inside % pairs) + 1 - rank", EDGES["forward"]),
    Mutant("tiles beyond the first four pairs of rows", LAYOUT, "first = number / each * kPairs;", "first = 0;", Case("forward", 1290, 8, 72)),
]  # fmt: skip
HOPPER = [*RING, *ORDER, *STAGING, *PLACES]
