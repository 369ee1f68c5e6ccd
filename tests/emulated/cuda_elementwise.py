"""The elementwise kernels of csrc/cuda, executed: values, chain rules and column sums, in every dtype."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from ptxsim import Device, Schedule, Struct
from torch import Tensor

from emulated import ptx
from emulated import reference as ref
from emulated.jobs import Job, Verdict, judged

THREADS, LANES, FLAT, WARPS, ROWS_AT_ONCE = 128, 32, 4, 4, 4  # csrc/cuda/memory.cuh
ARCHITECTURES = ("sm_80", "sm_90a")
SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
NUMPY = {"float64": np.float64, "float32": np.float32, "bfloat16": np.uint16, "float16": np.uint16}


@dataclass(frozen=True)
class Case:
    kernel: str  # "value", "chain_rule", "gated_chain_rule"
    m: int
    n: int
    dtype: str = "bfloat16"
    activation: str = "gelu"
    family: str = "sm_80"
    policy: str = "preact"
    gated: bool = False  # of value
    skew: int = 0  # numbers by which all begin beside 16 bytes
    transposed: bool = False  # dh: its rows are columns
    results: str = "all"  # or "grad" alone, or in place: "over" what was kept
    processors: int = 1

    @property
    def width(self) -> int:
        return 16 // SIZES[self.dtype]

    @property
    def strips(self) -> tuple[int, int]:
        """Rows of a strip, and strips: strips_of in csrc/cuda/elementwise.cu."""
        step, columns = ROWS_AT_ONCE * WARPS, LANES * self.width
        wanted = max(1, 4 * self.processors // -(-self.n // columns))
        each = -(-max(self.m, 1) // wanted)
        rows = -(-each // step) * step
        return rows, max(1, -(-self.m // rows))

    @property
    def grid(self) -> tuple[int, int]:
        """grid_of in csrc/cuda/compressed.cuh."""
        return -(-self.n // (LANES * self.width)), self.strips[1]

    @property
    def aligned(self) -> bool:
        """in_packs in csrc/cuda/elementwise.cuh."""
        return not self.transposed and self.n % self.width == 0 and self.skew % self.width == 0

    @property
    def shape(self) -> str:
        return f"{self.m}x{self.n}"

    def __str__(self) -> str:
        words = [self.kernel, self.family, self.shape, self.dtype, self.activation, self.policy, self.results]
        words += ["gated"] * self.gated + ["dh transposed"] * self.transposed + [f"skew {self.skew}"] * bool(self.skew)
        return " ".join(words)


@functools.lru_cache(maxsize=4)
def operands(case) -> tuple[Tensor, Tensor, Tensor]:
    """dh, z or g, u; the first rows of z and u go far, the others are about the activation's middle."""
    generator, dtype = ref.generator_of(case), ref.TORCH[case.dtype]
    dh, z, u = (torch.randn(case.m, case.n, generator=generator, dtype=torch.float64) for _ in range(3))
    far = 10.0 ** torch.randint(-3, 3, (case.m, 1), generator=generator).double()
    z = z * torch.where(torch.arange(case.m)[:, None] % 3 == 0, far, 2.0)
    return tuple(t.clamp(-100, 100).to(dtype) for t in (dh, z, u))


class Memory:
    """A device, where the matrices of a case begin beside 16 bytes or not."""

    def __init__(self, case):
        self.case, self.device = case, Device(1 << 22)
        self.skew = case.skew * SIZES[case.dtype]

    def put(self, t: Tensor | None, name: str, writable: bool = False) -> int:
        return 0 if t is None else self.device.put(ref.to_numpy(t), name, writable=writable, skew=self.skew)

    def result(self, name: str, wanted: bool = True) -> int:
        size = (self.case.m, self.case.n)
        return self.device.empty(size, NUMPY[self.case.dtype], name, skew=self.skew) if wanted else 0

    def sums(self, name: str, wanted: bool = True) -> int:
        kind = np.float64 if self.case.dtype == "float64" else np.float32
        return self.device.empty((self.case.strips[1], self.case.n), kind, name) if wanted else 0

    def get(self, at: int) -> Tensor:
        return ref.to_torch(self.device.get(at), ref.TORCH[self.case.dtype])


class Run:
    """Launches of a case under one schedule, and the largest errors of what was looked at."""

    def __init__(self, case, schedule: int, activations: tuple[str, ...], replaced: ptx.Replaced):
        self.case, self.memory, self.errors, self.kernels, self.instructions = case, Memory(case), [], [], 0
        self.schedule = replace(Schedule.of(schedule), strict=True)
        self.label = f"{case}, seed {schedule}"
        kernels = (case.kernel,) if replaced else tuple(ptx.PASSES)  # a mutant is made for one run, and goes
        self.module = ptx.elementwise(case.dtype, case.family, activations, replaced, kernels)

    def find(self, kernel: str, *parts: str):
        name, number = self.case.activation, ptx.DTYPES.index(self.case.dtype)
        return self.module.find(f"{len(kernel)}{kernel}I", f"{len(name)}{name}E", f"E{number}E{''.join(parts)}")

    def launch(self, kernel, grid, params) -> None:
        device = self.memory.device
        done = device.launch(kernel, grid, THREADS, params, schedule=self.schedule, label=self.label)
        self.kernels.append(kernel)
        self.instructions += done.instructions

    def check(self, name: str, found: float) -> None:
        self.errors.append((name, found))

    def check_sums(self, name: str, at: int, terms: Tensor, sizes: Tensor) -> None:
        """A strip's row of them, and what the second stage makes of the rows."""
        found = torch.from_numpy(self.memory.device.get(at))
        self.check(name, ref.sums_error(found, terms, sizes, self.case.strips[0]))
        device, (strips, n) = self.memory.device, found.shape
        out = device.empty(n, NUMPY[self.case.dtype], f"{name} of all rows")
        kernel = self.module.find("17column_sum_kernelI", f"E{ptx.DTYPES.index(self.case.dtype)}E")
        self.launch(kernel, -(-n // LANES), [at, out, strips, n])
        total = found.double().sum(0)
        self.check(f"{name} of all rows", ref.error(self.memory.get(out), total, found.double().abs().sum(0)))

    def verdict(self) -> Verdict:
        whole = self.memory.device.red_zones_whole()
        return Verdict.of(self.label, self.errors, self.instructions, tuple(self.kernels), whole)


def params_of(case: Case, kept: ref.Kept | None = None) -> tuple[float, float]:
    return kept.params() if kept else (*ref.activation_of(case.activation).params, 0.0, 0.0)[:2]


def value(case: Case, run: Run) -> None:
    """y = f(z) or f(g) · u of adjacent numbers; in place y is u, or z."""
    _, z, up = operands(case)
    up = up if case.gated else None
    memory, size = run.memory, case.m * case.n
    over = case.results == "over"
    gate_at = memory.put(z, "gate", writable=over and not case.gated)
    up_at = memory.put(up, "up", writable=over)
    y_at = (up_at or gate_at) if over else memory.result("y")
    kernel = run.find("value_kernel", f"Lb{int(case.gated)}E")
    blocks = -(-size // (THREADS * FLAT * case.width))
    run.launch(kernel, blocks, [gate_at, up_at, y_at, size, *params_of(case), int(case.skew % case.width == 0)])
    terms = ref.value_terms(z) * (1.0 if up is None else up.double().abs())
    run.check("y", ref.error(memory.get(y_at), ref.value(ref.activation_of(case.activation), z, up), terms))


def strides_of(case: Case) -> tuple[int, int]:
    return (1, case.m) if case.transposed else (case.n, 1)


def chain_rule(case: Case, run: Run) -> None:
    dh, z, _ = operands(case)
    activation, memory = ref.activation_of(case.activation), run.memory
    kept = ref.Kept(activation, case.policy, z)
    reads = {"output": 1, "output_bits": 2, "output_lsb": 2}.get(case.policy, 0)
    over, everything = case.results == "over", case.results != "grad"
    dh_at = memory.put(dh.t() if case.transposed else dh, "dh")
    kept_at = memory.put(kept.codes, "kept", writable=over)
    beside_at = 0 if kept.beside is None else memory.device.put(kept.beside.numpy(), "beside")
    dz_at = kept_at if over else memory.result("dz")
    h_at, sums_at = memory.result("h", everything and reads == 0), memory.sums("sums", everything)
    rule = Struct().ptr(dh_at, kept_at, beside_at, dz_at, h_at, sums_at).i64(case.m, case.n, *strides_of(case), case.n)
    rule.i32(ref.KEEPS[case.policy]).struct(Struct().i64(*case.strips))
    kernel = run.find("chain_rule_kernel", f"LNS0_5ReadsE{reads}ELb{int(case.aligned)}E")
    run.launch(kernel, case.grid, [bytes(rule), *params_of(case, kept)])
    wanted, terms = kept.chain_rule(dh)
    run.check("dz", ref.error(memory.get(dz_at), wanted, terms))
    if h_at:
        run.check("h", ref.error(memory.get(h_at), ref.value(activation, kept.z), ref.value_terms(kept.z)))
    if sums_at:
        run.check_sums("sums", sums_at, wanted, terms)


def gated_chain_rule(case: Case, run: Run) -> None:
    """In place dg is g, and du is u."""
    dh, *parts = operands(case)
    activation, memory = ref.activation_of(case.activation), run.memory
    kept = [ref.Kept(activation, case.policy, part) for part in parts]
    over, everything = case.results == "over", case.results != "grad"
    dh_at = memory.put(dh.t() if case.transposed else dh, "dh")
    kept_at = [memory.put(part.codes, "kept", writable=over) for part in kept]
    scales = [0 if part.beside is None else memory.device.put(part.beside.numpy(), "scales") for part in kept]
    grads = kept_at if over else [memory.result("dgate"), memory.result("dup")]
    h_at, sums = memory.result("h", everything), [memory.sums(name, everything) for name in ("gate sums", "up sums")]
    rule = Struct().ptr(dh_at, *kept_at, *scales, *grads, h_at, *sums).i64(case.m, case.n, *strides_of(case), case.n)
    rule.i32(ref.KEEPS[case.policy]).struct(Struct().i64(*case.strips))
    kernel = run.find("gated_chain_rule_kernel", f"Lb{int(case.aligned)}E")
    run.launch(kernel, case.grid, [bytes(rule), *params_of(case)])
    gate, up = kept[0].z, kept[1].z.double()
    f, size = ref.value(activation, gate), dh.double().abs()
    wanted = [kept[0].chain_rule((dh.double() * up).to(gate.dtype)), (dh.double() * f, size * ref.value_terms(gate))]
    for name, at, sums_at, (of, terms) in zip(("dgate", "dup"), grads, sums, wanted, strict=True):
        run.check(name, ref.error(memory.get(at), of, terms))
        if sums_at:
            run.check_sums(f"{name} sums", sums_at, of, terms)
    if h_at:
        run.check("h", ref.error(memory.get(h_at), f * up, ref.value_terms(gate) * up.abs()))


KERNELS = {"value": value, "chain_rule": chain_rule, "gated_chain_rule": gated_chain_rule}


def execute(case: Case, seed: int, activations: tuple[str, ...] = ptx.NAMES, replaced: ptx.Replaced = ()) -> Verdict:
    """Its launches under a schedule; a Fault is raised."""
    found = Run(case, seed, activations, replaced)
    KERNELS[case.kernel](case, found)
    return found.verdict()


def run(case: Case, activations: tuple[str, ...], seed: int) -> Verdict:
    return judged(execute, case, seed, activations)


SHAPES = [(1, 1), (5, 37), (33, 256), (70, 264), (9, 513), (66, 40)]


def campaign() -> Iterator[Job]:
    """Every activation × dtype × kernel × policy that reads z or y × shape, places by turns; and sums of columns."""
    turn = itertools.count()
    for family, dtype, name in itertools.product(ARCHITECTURES, ptx.DTYPES, ptx.NAMES):
        from_y = ["output"] * ("output" in ref.policies_of(ref.activation_of(name)))
        passes = [
            ("value", "preact"),
            *(("chain_rule", p) for p in ("preact", *from_y)),
            ("gated_chain_rule", "preact"),
        ]
        shapes = SHAPES[:2] if dtype == "float64" else SHAPES  # its exp and erf go lane by lane here
        for (kernel, policy), _ in itertools.product(passes, shapes):
            i = next(turn)
            m, n = shapes[(i + i // len(shapes)) % len(shapes)]
            case = Case(
                kernel, m, n, dtype, name, family, policy, gated=kernel == "value" and i % 2 == 0,
                skew=i // 2 % 2, transposed=i % 5 == 0 and kernel != "value", results=("all", "grad", "over")[i % 3],
            )  # fmt: skip
            yield Job.of(f"cuda {kernel}", case, run, 0.1, ptx.NAMES)
    for family, dtype, (m, n) in itertools.product(ARCHITECTURES, ptx.DTYPES, SHAPES):
        yield Job.of("cuda column_sum", Case("chain_rule", m, n, dtype, "relu", family), run, 0.1, ptx.NAMES)
