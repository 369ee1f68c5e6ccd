"""The four products of csrc/cuda/hopper*, executed: sm_90a PTX against PyTorch, under adversarial schedules."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from ptxsim import Device, Schedule, Struct, TensorMap
from torch import Tensor

from emulated import ptx
from emulated import reference as ref
from emulated.cuda_hopper_case import TILE, Case, Operands, operands
from emulated.jobs import Job, Verdict, judged

DEPTH, HALF_ROWS, THREADS = 64, 64, 384
STAGES, STAGE_BYTES, STAGING_BYTES = 5, 32768, 32768
SHARED = 1024 + STAGES * STAGE_BYTES + 2 * STAGING_BYTES + 2 * STAGES * 8  # kSharedBytes


class Placed(NamedTuple):
    device: Device
    params: list
    at: dict[str, int]  # of the results, by name


def place(case: Case, given: Operands, kept: list[ref.Kept], number: int) -> Placed:
    """Operands and NaN for results on a device, and the parameters of the kernel as csrc/cuda/hopper.h has them."""
    device, at = Device(1 << 23), {}

    def operand(matrix: Tensor | None, name: str) -> tuple[int, tuple[int, int, int]]:
        """Rows begin at 16 bytes; between them lies NaN, which nobody may use."""
        if matrix is None:
            return 0, (0, 0, 0)
        rows, columns = matrix.shape
        stride = -(-columns // 8) * 8
        whole = torch.full((rows, stride), math.nan, dtype=matrix.dtype)
        whole[:, :columns] = matrix
        return device.put(ref.to_numpy(whole), name), (rows, columns, stride)

    def put(t: Tensor | None, name: str, writable: bool = False) -> int:
        return 0 if t is None else device.put(ref.to_numpy(t), name, writable=writable)

    def result(name: str, wanted: bool, shape: tuple[int, int], dtype: type) -> int:
        if wanted:
            at[name] = device.empty(shape, dtype, name)
        return at.get(name, 0)

    a, b, b2 = operand(given.a, "A"), operand(given.b, "B"), operand(given.b2, "B2")
    bias = [put(t, "bias") for t in given.biases]
    size, parts = (case.m, case.n), ("first", "second")[: 1 + case.gated]
    inputs, inputs_beside, outputs_beside, sums = [0, 0], [0, 0], [0, 0], [0, 0]
    for i, name in enumerate(parts):
        if case.backward:
            inputs[i] = put(kept[i].codes, f"kept {name}", writable=case.over)
            inputs_beside[i] = put(kept[i].beside, f"beside {name}")
            sums[i] = result(f"{name} sums", case.sums, (-(-case.m // TILE), case.n), np.float32)
            if case.over:
                at[name] = inputs[i]
            else:
                result(name, True, size, np.uint16)
        else:
            fp8 = case.policy == "fp8"
            result(name, case.keep and case.policy in ("preact", "fp8"), size, np.uint8 if fp8 else np.uint16)
            beside = {"output_bits": -(-case.n // 2), "fp8": -(-case.n // 32)}.get(case.policy, 0)
            outputs_beside[i] = result(f"{name} beside", beside > 0, (case.m, beside), np.uint8)
    result("y", not case.backward or (case.h and case.reads == "z"), size, np.uint16)

    def tensor_map(of: tuple[int, tuple[int, int, int]], rows: int) -> TensorMap:
        address, (height, width, stride) = of
        return TensorMap(address, 2, (width, height), (2 * stride,), (DEPTH, rows), 128)

    b_rows = DEPTH if case.backward else HALF_ROWS
    maps = [tensor_map(a, TILE), tensor_map(b, b_rows), tensor_map(b2 if b2[0] else b, b_rows)]
    product = Struct().i32(ptx.KINDS.index(case.kind))
    for address, dimensions in (a, b, b2):
        product.struct(Struct().ptr(address).i64(*dimensions))
    product.i64(case.m, case.n, case.k)
    product.ptr(*bias, *inputs, at.get("first", 0), at.get("second", 0), at.get("y", 0)).i32(ref.KEEPS[case.policy])
    product.ptr(*inputs_beside, *outputs_beside, *sums, 0)
    params = kept[0].params() if kept else (*ref.activation_of(case.activation).params, 0.0, 0.0)[:2]
    arguments = Struct().struct(product).i32(number).f64(*params)
    return Placed(device, [*maps, bytes(arguments)], at)


class Results:
    """Results of a launch by name, and the largest error of those that were looked at."""

    def __init__(self, placed: Placed, dtype: torch.dtype):
        self.placed, self.dtype, self.errors = placed, dtype, []

    def raw(self, name: str) -> np.ndarray:
        return self.placed.device.get(self.placed.at[name])

    def of(self, name: str) -> Tensor:
        return ref.to_torch(self.raw(name), self.dtype)

    def check(self, name: str, found: float) -> None:
        self.errors.append((name, found))


@functools.lru_cache(maxsize=4)
def exact(case: Case) -> tuple[list[Tensor], list[ref.Kept]]:
    """z of each part or dh, to the last bit; and of a backward what was kept."""
    given, dtype = operands(case), ref.TORCH[case.dtype]
    activation = ref.activation_of(case.activation)
    if case.backward:
        kept = [ref.Kept(activation, case.policy, t) for t in (given.gate, given.up) if t is not None]
        return [(given.a.double() @ given.b.double()).to(dtype)], kept
    weights = [w for w in (given.b, given.b2) if w is not None]
    sums = [given.a.double() @ w.double().T for w in weights]
    return [(z if b is None else z + b.double()).to(dtype) for z, b in zip(sums, given.biases, strict=False)], []


def check_forward(case: Case, results: Results) -> None:
    z, activation = exact(case)[0], ref.activation_of(case.activation)
    up = z[1] if case.gated else None
    wide, y = ref.value(activation, z[0], up), results.of("y")
    terms = ref.value_terms(z[0]) * (1.0 if up is None else up.double().abs())
    marked = case.policy == "output_lsb"
    results.check("y", ref.error(y, wide, terms, units=1.51 if marked else 0.51))
    for name, part in zip(("first", "second"), z, strict=False):
        if case.policy == "fp8":
            codes, scales = ref.compression.encode_fp8(part)
            results.check(f"{name} codes", ref.same_bytes(results.raw(name), codes))
            results.check(f"{name} scales", ref.same_bytes(results.raw(f"{name} beside"), scales))
        elif case.policy == "preact" and case.keep:
            results.check(name, ref.same_bytes(results.raw(name), part))
    if case.policy == "output_bits":
        found = ref.bits_error(results.raw("first beside"), z[0], wide, y, activation.row.minimum_at)
        results.check("bits", found)
    elif marked:
        results.check("marks", ref.marks_error(y, z[0], activation.row.minimum_at))


def check_backward(case: Case, results: Results) -> None:
    (dh,), kept = exact(case)
    activation = ref.activation_of(case.activation)
    if case.gated:
        gate, up = kept[0].z, kept[1].z.double()
        f = ref.value(activation, gate)
        first, terms = kept[0].chain_rule((dh.double() * up).to(results.dtype))
        size = dh.double().abs().nan_to_num(posinf=0.0)
        grads = [(first, terms), (dh.double() * f, size * ref.value_terms(gate))]
        h, h_terms = f * up, ref.value_terms(gate) * up.abs()
    else:
        grads = [kept[0].chain_rule(dh)]
        if case.reads == "z":
            h, h_terms = ref.value(activation, kept[0].z), ref.value_terms(kept[0].z)
    for name, (wanted, terms) in zip(("first", "second"), grads, strict=False):
        results.check(f"d{name}", ref.error(results.of(name), wanted, terms))
        if case.sums:
            found = torch.from_numpy(results.raw(f"{name} sums"))
            results.check(f"{name} sums", ref.sums_error(found, wanted, terms, TILE))
    if "y" in results.placed.at:
        results.check("h", ref.error(results.of("y"), h, h_terms))


def execute(
    case: Case, schedule: int | Schedule, activations: tuple[str, ...] = ptx.NAMES, replaced: ptx.Replaced = ()
) -> Verdict:
    """One launch under a schedule; a Fault is raised."""
    kernel = ptx.hopper(case.kind, case.reads, case.dtype, activations, replaced)
    placed = place(case, operands(case), exact(case)[1], activations.index(case.activation))
    label = f"{case}, {schedule if isinstance(schedule, Schedule) else f'seed {schedule}'}"
    grid = 2 * case.clusters
    if isinstance(schedule, int):  # by the letter of the PTX ISA, too
        schedule = replace(Schedule.of(schedule), strict=True)
    done = placed.device.launch(kernel, grid, THREADS, placed.params, shared=SHARED, schedule=schedule, label=label)
    results = Results(placed, ref.TORCH[case.dtype])
    (check_backward if case.backward else check_forward)(case, results)
    whole = placed.device.red_zones_whole()
    return Verdict.of(label, results.errors, done.instructions, (kernel,), whole)


def run(case: Case, activations: tuple[str, ...], seed: int) -> Verdict:
    return judged(execute, case, seed, activations)


#           m    n    k  processors
SHAPES = [
    (256, 128, 64, 2),  # one tile
    (256, 128, 320, 2),  # a whole ring of stages
    (128, 128, 128, 2),  # the second block of the cluster has no rows
    (1, 8, 8, 2),  # least
    (257, 136, 72, 2),  # one row and eight columns over
    (300, 200, 328, 2),  # odd edges everywhere, four tiles
    (512, 256, 448, 2),  # both groups, the ring several times
    (1024, 128, 192, 2),  # fewer steps than stages
    (700, 392, 264, 4),  # two clusters, unequal shares
    (256, 640, 640, 4),  # five tiles for two clusters
    (512, 128, 200, 6),  # fewer tiles than clusters
    (2304, 136, 136, 4),  # more than four pairs of rows, so tile_at turns
]  # fmt: skip


def campaign() -> Iterator[Job]:
    """Every shape × kernel × dtype of one activation; every activation × policy × dtype of one shape."""
    for kind, dtype in itertools.product(ptx.KINDS, ("bfloat16", "float16")):
        gated = kind.startswith("gated")
        cases = [Case(kind, m, n, k, dtype, "silu" if gated else "gelu", "preact", p) for m, n, k, p in SHAPES]
        for i, name in enumerate(ptx.NAMES):
            for policy in ref.policies_of(ref.activation_of(name), gated):
                odd = i % 2 == 0
                cases.append(
                    Case(kind, 200, 136, 328, dtype, name, policy, bias=odd, h=odd, keep=odd or policy != "preact")
                )
        if "dgrad" in kind:
            cases += [Case(kind, 300, 200, 200, dtype, "silu", over=True), Case(kind, 300, 200, 200, dtype, sums=False)]
            cases += [
                Case(kind, 200, 136, 72, dtype, special=math.inf),
                Case(kind, 200, 136, 72, dtype, "hardtanh", special=math.nan),
            ]
        for number, case in enumerate(cases):
            yield Job.of(f"hopper {kind}", case, run, 1.0 if number < len(SHAPES) else 0.25, ptx.NAMES)
