"""Faults put into the CUDA kernels on purpose: what is changed, where it shows, and as what.

A mutant is a replacement in a file of csrc/cuda, all places of it; the rest of csrc/ stays. It is run on its case until
a schedule shows it. ``kinds`` are the faults it may show as; one that shows as nothing says why in ``equivalent``.
"""
# ruff: noqa: E501 - a mutant is a line, with what stands in the source

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from emulated import cuda_compressed, cuda_elementwise, cuda_hopper, ptx
from emulated.cuda_hopper import Case
from emulated.jobs import Verdict, judged

KERNEL, PTX, EPILOGUE, LAYOUT = "hopper.cuh", "hopper_ptx.h", "hopper_epilogue.cuh", "hopper_layout.h"
# A fault of the protocol shows as what a schedule makes of it.
LOST = frozenset({"race", "wrong numbers", "deadlock", "barrier", "exited", "phase", "overrun", "exit"})


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


WRONG, OUTSIDE, RACE = kinds("wrong numbers"), kinds("out of bounds"), kinds("race")
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


# Not even the order of the two groups: the fault that these kernels had.
def no_order() -> ptx.Replaced:
    text = ptx.source(f"cuda/{KERNEL}")
    assert _WAIT_ORDER in text and _ARRIVE_ORDER in text
    return ((f"cuda/{KERNEL}", text.replace(_WAIT_ORDER, "").replace(_ARRIVE_ORDER, "")),)


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
    Mutant("a stage released before its products are waited for", KERNEL, f"        products_wait<1>();\n{_RELEASE}", f"{_RELEASE}\n        products_wait<1>();", BIG["forward"], kinds=RACE),
    Mutant("a stage of the first step released twice", KERNEL, _RELEASE, "        release(before);", BIG["forward"]),
    Mutant("no products_wait<1>", KERNEL, "        products_wait<1>();\n", "", BIG["forward"], kinds=RACE),
    Mutant("products_wait<2> in place of <1>", KERNEL, "products_wait<1>()", "products_wait<2>()", BIG["forward"], kinds=RACE),
    Mutant("no products_wait<0>", KERNEL, "      products_wait<0>();\n", "", BIG["forward"]),
    Mutant("no products_commit", KERNEL, "        products_commit();\n", "", BIG["forward"]),
    Mutant("no wgmma.fence", KERNEL, "        products_begin();\n", "", BIG["forward"], kinds=kinds("wgmma")),
    Mutant("the last stage of a tile not released", KERNEL, "      hold(c);\n      release(before);", "      hold(c);", BIG["forward"]),
    Mutant("released to the own block only", KERNEL, "if (lane < 2) barrier_arrive(empty + 8 * stage, lane)", "if (lane == rank) barrier_arrive(empty + 8 * stage, lane)", BIG["forward"]),
    Mutant("empty counts the warps of one block", KERNEL, "2 * kGroupThreads / 32);", "kGroupThreads / 32);", BIG["forward"]),
    Mutant("empty counts the warps of both groups", KERNEL, "2 * kGroupThreads / 32);", "4 * kGroupThreads / 32);", BIG["forward"]),
    Mutant("too few bytes expected", KERNEL, "barrier_expect(ready, kStageBytes)", "barrier_expect(ready, kOperandBytes)", BIG["forward"]),
    Mutant("bytes not expected", KERNEL, "barrier_expect(ready, kStageBytes);", 'asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(ready) : "memory");', BIG["forward"]),
    Mutant("a multicast to one block", KERNEL, "place.column * kTile + rank * kHalfRows, ready, 3)", "place.column * kTile + rank * kHalfRows, ready, 1)", BIG["forward"]),
    Mutant("the halves of B exchanged", KERNEL, "kOperandBytes + rank * kHalfBytes", "kOperandBytes + (1 - rank) * kHalfBytes", BIG["forward"], kinds=WRONG),
    Mutant("both blocks load the same half of B", KERNEL, "kOperandBytes + rank * kHalfBytes", "kOperandBytes", BIG["forward"], kinds=RACE),
    Mutant("no cluster_sync at the end", KERNEL, "  cluster_sync();  // shared memory must not go while the other block writes to it\n", "", BIG["forward"]),
    Mutant("no cluster_sync at the start", KERNEL, "  cluster_sync();\n\n  if (group == 0)", "\n  if (group == 0)", BIG["forward"]),
    Mutant("barriers not made visible", KERNEL, "    barriers_visible();\n", "", BIG["forward"], kinds=kinds("proxy", "barrier")),
    Mutant("accumulators not cleared", KERNEL, "step > 0 || i > 0", "true", BIG["forward"], kinds=WRONG),
    Mutant("accumulators cleared at each step", KERNEL, "step > 0 || i > 0", "i > 0", BIG["forward"], kinds=WRONG),
    Mutant("registers not given away", KERNEL, "    give_registers<kLoaderRegisters>();\n", "", BIG["forward"]),
]  # fmt: skip
ORDER = [
    Mutant("no order_wait", KERNEL, _WAIT_ORDER, "", LONG["forward"]),
    Mutant("no order_arrive", KERNEL, _ARRIVE_ORDER, "", LONG["forward"]),
    Mutant("order_wait waits for nobody", PTX, "bar.sync %0, 256;", "", LONG["forward"]),
    Mutant("the other group told before the first step", KERNEL, _STEPS, f"{_ARRIVE_ORDER}{_STEPS}", LONG["forward"]),
    Mutant("a group waits where it tells the other", KERNEL, "order_wait(kFirstOrderBarrier + which)", "order_wait(kFirstOrderBarrier + 1 - which)", LONG["forward"]),
    Mutant("order barriers exchanged on both sides", KERNEL, "kFirstOrderBarrier + ", "kFirstOrderBarrier + 1 - ", LONG["forward"]),
    Mutant("a cluster's first tile waits", KERNEL, "if (tile != cluster) order_wait", "order_wait", LONG["forward"]),
    Mutant("after the last tile the other is told", KERNEL, "if (tile + clusters < tiles) order_arrive", "order_arrive", LONG["forward"], kinds("exit")),
    Mutant("an order barrier is the epilogue's", KERNEL, "kFirstOrderBarrier = 3;", "kFirstOrderBarrier = 1;", LONG["dgrad"]),
]  # fmt: skip
STAGING = [
    Mutant("no __syncwarp before staging", EPILOGUE, "    __syncwarp();  // the pass over the tile before this one has read what lies here\n", "", EDGES["forward"], equivalent="The order barrier's bar.sync, which every tile but a cluster's first passes, orders the warp's lanes too."),
    Mutant("no __syncwarp after staging", EPILOGUE, "      }\n    }\n    __syncwarp();\n  }", "      }\n    }\n  }", EDGES["forward"], kinds=RACE),
    Mutant("both groups stage in one place", KERNEL, "staging + (own / kGroupThreads - 1) * kStagingBytes", "staging", LONG["forward"], kinds=RACE),
    Mutant("stmatrix without the exchange of parts", EPILOGUE, "part_at(stored_row(half, warp, lane), stored_part(sixteen, lane))", "(stored_row(half, warp, lane) * 256 + stored_part(sixteen, lane) * 16)", EDGES["forward"], kinds=WRONG),
    Mutant("no bound of rows", EPILOGUE, "return row(pass) < static_cast<int>(arguments.product.m) && column()", "return column()", EDGES["forward"], kinds=OUTSIDE),
    Mutant("no bound of columns", EPILOGUE, " && column() < static_cast<int>(arguments.product.n);", ";", EDGES["forward"], kinds=OUTSIDE),
    Mutant("bias of the next column", EPILOGUE, "bias_of(of, first + register_column(lane, number)", "bias_of(of, 1 + first + register_column(lane, number)", EDGES["forward"], kinds=WRONG),
    Mutant("bias read beyond the edge", EPILOGUE, "return bias && at < arguments.product.n ?", "return bias ?", EDGES["forward"], kinds=OUTSIDE),
    Mutant("the gate's bias for both parts", EPILOGUE, "second ? p.bias2 : p.bias", "p.bias", EDGES["gated_forward"], kinds=WRONG),
    Mutant("the weights of a gated layer exchanged", KERNEL, "rank ? b2 : b", "rank ? b : b2", EDGES["gated_forward"], kinds=WRONG),
    Mutant("add_up: no barrier before", EPILOGUE, "    group_sync(barrier);  // every warp has read what was staged\n", "", EDGES["dgrad"], kinds=RACE),
    Mutant("add_up: no barrier between", EPILOGUE, "    group_sync(barrier);\n    const int thread", "    const int thread", EDGES["dgrad"], kinds=RACE),
    Mutant("add_up: no barrier after", EPILOGUE, "    group_sync(barrier);  // before somebody stages again\n", "", EDGES["dgrad"], equivalent="The order barrier's bar.sync stands between these sums and the next staging."),
    Mutant("add_up: one barrier for both groups", KERNEL, "epilogue.run(c, own / kGroupThreads)", "epilogue.run(c, 1)", LONG["dgrad"]),
    Mutant("add_up: a row of sums too many", EPILOGUE, "if (at < n && tile_row * kTile < arguments.product.m)", "if (at < n)", EDGES["dgrad"], kinds=OUTSIDE),
    Mutant("add_up: columns beyond the edge", EPILOGUE, "if (at < n && tile_row", "if (tile_row", EDGES["dgrad"], kinds=OUTSIDE),
    Mutant("add_up: half of the rows", EPILOGUE, "mine[i] += __shfl_xor_sync(0xffffffff, mine[i], 16);", ";", EDGES["dgrad"], kinds=WRONG),
    Mutant("sums of rows beyond the last one", EPILOGUE, _STAGED, "staged(first + i, lane % parts)", Case("dgrad", 130, 136, 72, special=float("inf")), kinds=WRONG),
    Mutant("sums of the gate for both parts", EPILOGUE, "add_up(sums2, p.sums2, barrier)", "add_up(sums, p.sums2, barrier)", EDGES["gated_dgrad"], kinds=WRONG),
    Mutant("what was kept of the pass before", EPILOGUE, "fetch(first + ahead)", "fetch(first)", EDGES["dgrad"], kinds=WRONG),
    Mutant("what was kept fetched beyond the last pass", EPILOGUE, "pass >= passes || !inside(pass)", "!inside(pass)", LONG["dgrad"], equivalent="It is read where `inside` allows it, and nobody looks at it."),
    Mutant("a scale of the wrong block", EPILOGUE, "column() / kBlock;", "column() / (2 * kBlock);", Case("dgrad", 128, 136, 72, policy="fp8"), kinds=WRONG),
    Mutant("a scale written beside its block", EPILOGUE, "column() / kBlock;", "column() / (2 * kBlock);", Case("forward", 128, 136, 72, policy="fp8"), kinds=WRONG),
    Mutant("lanes outside do not come to the scale", EPILOGUE, "const uint32_t scale = scale_of_block(z);\n    if (!inside(pass)) return;", "if (!inside(pass)) return;\n    const uint32_t scale = scale_of_block(z);", Case("forward", 128, 136, 72, policy="fp8")),
    Mutant("bits of the row before", EPILOGUE, "return offset(pass) / 2;", "return (offset(pass) - arguments.product.n) / 2;", Case("forward", 128, 136, 72, policy="output_bits"), kinds=OUTSIDE),
    Mutant("bits of the next pack", EPILOGUE, "beside)[bits_at(pass) / 4]", "beside)[bits_at(pass) / 4 + 1]", Case("dgrad", 128, 136, 72, policy="output_bits"), kinds=OUTSIDE),
    Mutant("outside a number is of the left side", EPILOGUE, "0xcccccccc", "0", Case("dgrad", 130, 136, 72, policy="output_bits"), kinds=WRONG),
]  # fmt: skip
PLACES = [
    Mutant("descriptors of A and B exchanged", KERNEL, "(c[half], of_a, of_b,", "(c[half], of_b, of_a,", BIG["forward"], kinds=WRONG),
    Mutant("both halves of the rows of A are the first", LAYOUT, "stage + half * kHalfBytes + sixteen * 32", "stage + sixteen * 32", BIG["forward"], kinds=WRONG),
    Mutant("leading offset of B by steps wrong", LAYOUT, "sixteen * 2048, 1024, kHalfBytes)", "sixteen * 2048, 1024, 1024)", BIG["dgrad"], kinds=WRONG),
    Mutant("stride of B by steps wrong", LAYOUT, "sixteen * 2048, 1024, kHalfBytes)", "sixteen * 2048, 2048, kHalfBytes)", BIG["dgrad"], kinds=RACE),
    Mutant("stride of A wrong", LAYOUT, "sixteen * 32, 1024, 16);\n}\nHD uint64_t b_at", "sixteen * 32, 512, 16);\n}\nHD uint64_t b_at", BIG["forward"], kinds=WRONG),
    Mutant("no swizzle in the descriptors", LAYOUT, " | uint64_t{1} << 62", "", BIG["forward"], kinds=WRONG),
    Mutant("the same sixteen steps four times", LAYOUT, "kOperandBytes + sixteen * 32", "kOperandBytes", BIG["forward"], kinds=WRONG),
    Mutant("a cluster's blocks exchange their tiles", LAYOUT, "2 * (first + inside % pairs) + rank", "2 * (first + inside % pairs) + 1 - rank", EDGES["forward"], equivalent="Which block of a cluster has which tile is free: both load their own rows of A, and halves of the same B."),
    Mutant("tiles beyond the first four pairs of rows", LAYOUT, "first = number / each * kPairs;", "first = 0;", Case("forward", 1290, 8, 72), kinds=WRONG),
]  # fmt: skip
HOPPER = [*RING, *ORDER, *STAGING, *PLACES]

ELEMENTWISE, MEMORY, COMPRESSED, PACKS, NUMBERS = (
    "elementwise.cuh",
    "memory.cuh",
    "compressed.cuh",
    "compressed.h",
    "pack.h",
)
VALUE = cuda_elementwise.Case("value", 5, 37)
RULE = cuda_elementwise.Case("chain_rule", 34, 40)
GATHERED = cuda_elementwise.Case("chain_rule", 34, 37)
GATED = cuda_elementwise.Case("gated_chain_rule", 34, 40)
CODES, BITS = cuda_compressed.Case(m=9, n=72), cuda_compressed.Case(m=9, n=37, policy="output_bits")


def _elementwise(
    name: str, file: str, old: str, new: str, case: Any, kinds: frozenset[str] = WRONG, equivalent: str = ""
) -> Mutant:
    execute = (cuda_compressed if case.kernel == "compressed_value" else cuda_elementwise).execute
    return Mutant(name, file, old, new, case, kinds, execute, equivalent)


ELEMENTWISES = [
    _elementwise("value: the last pack whole", ELEMENTWISE, "aligned && at + width <= size", "aligned", VALUE, OUTSIDE),
    _elementwise("value: packs of the next thread", ELEMENTWISE, "kFlat * kThreads + threadIdx.x) * width", "kFlat * kThreads + threadIdx.x + 1) * width", VALUE),
    _elementwise("no mask of the last column, read", MEMORY, "first + i < count ? row[(first + i) * stride]", "true ? row[(first + i) * stride]", GATHERED, kinds("out of bounds", "global race")),
    _elementwise("no mask of the last column, written", MEMORY, "if (first + i < count) row[first + i] = pack.at[i];", "row[first + i] = pack.at[i];", GATHERED, kinds("out of bounds", "global race")),
    _elementwise("a column's stride ignored", MEMORY, "row[(first + i) * stride]", "row[first + i]", cuda_elementwise.Case("chain_rule", 34, 37, transposed=True), kinds("wrong numbers", "out of bounds")),
    _elementwise("rows of dh as far apart as those of z", ELEMENTWISE, "dh + at * rule.dh_stride", "dh + at * rule.stride", cuda_elementwise.Case("chain_rule", 34, 37, transposed=True), kinds("wrong numbers", "out of bounds")),
    _elementwise("a row of z ahead", MEMORY, "kept) + row * stride", "kept) + (row + 1) * stride", RULE, kinds("wrong numbers", "out of bounds")),
    _elementwise("no end of a strip", ELEMENTWISE, "min(begin + rule.strips.rows, rule.m)", "rule.m", RULE, kinds("global race", "wrong numbers")),
    _elementwise("no end of the rows", ELEMENTWISE, "min(begin + rule.strips.rows, rule.m)", "begin + rule.strips.rows", RULE, OUTSIDE),
    _elementwise("the rows of a warp are the next's", ELEMENTWISE, "row += rows * kWarps", "row += rows * (kWarps - 1)", RULE, kinds("global race", "wrong numbers")),
    _elementwise("the sums in the next strip's row", ELEMENTWISE, "out[blockIdx.y * n + first + c]", "out[(blockIdx.y + 1) * n + first + c]", RULE, kinds("out of bounds", "wrong numbers")),
    _elementwise("the sums of one warp", ELEMENTWISE, "for (int i = 0; i < kWarps; ++i) total += shared[i][c];", "total += shared[0][c];", RULE),
    _elementwise("the sums: no barrier after a warp has written", ELEMENTWISE, "mine[i];\n  __syncthreads();", "mine[i];", RULE, RACE),
    _elementwise("the sums: no barrier before", ELEMENTWISE, "  __syncthreads();  // for whoever used it before\n", "", GATED, RACE),
    _elementwise("the sums beyond the last column", ELEMENTWISE, "c < columns && first + c < n;", "c < columns;", RULE, OUTSIDE),
    _elementwise("column sum: no barrier", ELEMENTWISE, "shared[warp][lane] = total;\n  __syncthreads();", "shared[warp][lane] = total;", RULE, RACE),
    _elementwise("column sum: a warp left out", ELEMENTWISE, "for (int i = 1; i < kWarps; ++i) total += shared[i][lane];", "for (int i = 1; i < kWarps - 1; ++i) total += shared[i][lane];", replace(RULE, m=66, processors=2)),
    _elementwise("u in place of g", ELEMENTWISE, "gated_value(activation, g, u)", "gated_value(activation, u, g)", GATED),
    _elementwise("dh · u not rounded", NUMBERS, "wide(rounded<D>(d.at[i] * u.at[i]))", "d.at[i] * u.at[i]", GATED),
    _elementwise("the sums of what was rounded", NUMBERS, "    sums[i] += plain(d.at[i]);\n  }\n  return d.rounded();", "    sums[i] += plain(wide(rounded<D>(d.at[i])));\n  }\n  return d.rounded();", RULE),
    _elementwise("a parameter ignored", NUMBERS, "p1(static_cast<C>(second))", "p1(p0)", cuda_elementwise.Case("chain_rule", 34, 40, activation="softplus")),
    _elementwise("a code of the next block", COMPRESSED, "store_bytes(codes, column, n,", "store_bytes(codes, column + 32, n,", CODES, kinds("wrong numbers", "global race", "out of bounds")),
    _elementwise("a scale in the next block's place", COMPRESSED, "scales[at * scales_size(n) + column / kBlock]", "scales[at * scales_size(n) + column / kBlock + 1]", CODES, kinds("out of bounds", "global race")),
    _elementwise("a scale of half a block", PACKS, "lanes < kSharers<D>; lanes *= 2", "lanes < kSharers<D> / 2; lanes *= 2", CODES),
    _elementwise("a scale read of the first block", MEMORY, "[row * scales_size(n) + column / kBlock]", "[row * scales_size(n)]", cuda_elementwise.Case("chain_rule", 34, 72, policy="fp8")),
    _elementwise("lanes outside do not come to the scale", COMPRESSED, "if (!v.kept[which]) continue;", "if (!v.kept[which] || !inside) continue;", CODES, kinds("shuffle", "wrong numbers", "deadlock")),
    _elementwise("bits beyond the last number", COMPRESSED, "        if (column + width > n) bits &= (1u << (4 * (n - column))) - 1;\n", "", BITS),
    _elementwise("bits of the next pack", COMPRESSED, "beside[0]) + at * bytes, column / 2, bytes", "beside[0]) + at * bytes, column / 2 + 4, bytes", BITS, kinds("wrong numbers", "global race")),
    _elementwise("the side of the minimum exchanged", PACKS, ">= minimum_at, plain(y.at[i])", "< minimum_at, plain(y.at[i])", BITS),
    _elementwise("what is not finite kept", PACKS, "size < kInfinity ? size | sign : 0x7fffffffu", "size | sign", CODES),
]  # fmt: skip
MUTANTS = [*HOPPER, *ELEMENTWISES]
