"""The elementwise kernels of the compressed policies, executed: what is kept, byte for byte as fastbp/compression.py
has it, and the chain rules from it."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from ptxsim import Struct
from torch import Tensor

from emulated import cuda_elementwise, ptx
from emulated import reference as ref
from emulated.cuda_elementwise import ARCHITECTURES, Run, params_of
from emulated.jobs import Job, Verdict, judged


@dataclass(frozen=True)
class Case(cuda_elementwise.Case):
    """Of ``compressed_value``: ``results`` "over" writes y over z, "read" takes codes that were kept, for y alone."""

    kernel: str = "compressed_value"
    m: int = 9
    n: int = 40
    policy: str = "fp8"


@functools.lru_cache(maxsize=4)
def operands(case: Case) -> list[Tensor]:
    """z, or g and u: blocks of different sizes, and for codes numbers that are not finite."""
    generator, dtype = ref.generator_of(case), ref.TORCH[case.dtype]

    def part() -> Tensor:
        t = torch.randn(case.m, case.n, generator=generator, dtype=torch.float64) * 2
        blocks = -(-case.n // 32)
        t *= 2.0 ** torch.randint(-4, 3, (case.m, blocks), generator=generator).repeat_interleave(32, 1)[:, : case.n]
        if case.policy == "fp8":
            t.view(-1)[::37], t.view(-1)[5::41], t.view(-1)[7::43] = math.inf, math.nan, 0.0
        else:
            t[0] = -120.0  # where f has ended on the left
        return t.to(dtype)

    return [part() for _ in range(1 + case.gated)]


def compressed_value(case: Case, run: Run) -> None:
    parts, memory, device = operands(case), run.memory, run.memory.device
    activation, over, read = ref.activation_of(case.activation), case.results == "over", case.results == "read"
    shape, scale_shape = (case.m, case.n), (case.m, -(-case.n // 32))
    inputs, scales, codes, beside = [0, 0], [0, 0], [0, 0], [0, 0]
    for i, part in enumerate(parts):
        if read:
            kept = ref.compression.encode_fp8(part)
            inputs[i], scales[i] = (device.put(t.numpy(), "codes") for t in kept)
            parts = [*parts[:i], ref.compression.decode_fp8(*kept, part.dtype), *parts[i + 1 :]]
        else:
            inputs[i] = memory.put(part, "part", writable=over and i == 0)
            if case.policy == "fp8":
                codes[i], beside[i] = (device.empty(s, np.uint8, "kept") for s in (shape, scale_shape))
    if case.policy == "output_bits":
        beside[0] = device.empty((case.m, -(-case.n // 2)), np.uint8, "bits")
    y_at = inputs[0] if over else memory.result("y")
    given = Struct().ptr(*inputs, *scales, y_at, *codes, *beside).i64(*shape)
    given.i32(0 if read else ref.KEEPS[case.policy]).struct(Struct().i64(*case.strips))
    kernel = run.find("compressed_value_kernel", f"Lb{int(case.aligned)}E")
    run.launch(kernel, case.grid, [bytes(given), *params_of(case)])

    y, up = memory.get(y_at), parts[1] if case.gated else None
    z = parts[0]
    wide, terms = ref.value(activation, z, up), ref.value_terms(z) * (1.0 if up is None else up.double().abs())
    fine = torch.stack([part.isfinite() for part in parts]).all(0)
    marked = case.policy == "output_lsb"
    run.check("y", ref.error(y.where(fine, 0), wide.where(fine, 0.0), terms.where(fine, 0.0), 1.51 if marked else 0.51))
    if case.policy == "fp8" and not read:
        for i, part in enumerate(parts):
            wanted = ref.compression.encode_fp8(part)
            run.check("codes", ref.same_bytes(device.get(codes[i]), wanted[0]))
            run.check("scales", ref.same_bytes(device.get(beside[i]), wanted[1]))
    elif case.policy == "output_bits":
        run.check("bits", ref.bits_error(device.get(beside[0]), z, wide, y, activation.row.minimum_at))
    elif marked:
        run.check("marks", ref.marks_error(y, z, activation.row.minimum_at))


def execute(case: Case, seed: int, activations: tuple[str, ...] = ptx.NAMES, replaced: ptx.Replaced = ()) -> Verdict:
    """Its launch under a schedule; a Fault is raised."""
    found = Run(case, seed, activations, replaced)
    compressed_value(case, found)
    return found.verdict()


def run(case: Case, activations: tuple[str, ...], seed: int) -> Verdict:
    return judged(execute, case, seed, activations)


SHAPES = [(9, 513), (33, 256), (5, 37), (12, 264), (1, 1), (70, 72)]


def campaign() -> Iterator[Job]:
    """Every activation × dtype × policy × shape, forward and backward, gated where a policy is; places by turns."""
    turn = itertools.count()
    for family, dtype, name in itertools.product(ARCHITECTURES, ptx.DTYPES[1:], ptx.NAMES):
        policies = [p for p in ref.policies_of(ref.activation_of(name)) if p not in ("preact", "output")]
        ways = ("value", "chain_rule", "gated value", "gated_chain_rule")
        for policy, way, _ in itertools.product(policies, ways, SHAPES):
            if policy != "fp8" and "gated" in way:
                continue
            i = next(turn)
            m, n = SHAPES[(i + i // len(SHAPES)) % len(SHAPES)]
            case = Case(m=m, n=n, dtype=dtype, activation=name, family=family, policy=policy,
                        gated=way == "gated value", skew=i // 2 % 2)  # fmt: skip
            if "value" in way:
                reads = ("all", "over", "read") if policy == "fp8" else ("all", "over")
                case = replace(case, results=reads[i % len(reads)])
                yield _job(case, run)
            else:
                given = cuda_elementwise.Case(way, case.m, case.n, dtype, name, family, policy,
                                              transposed=i % 5 == 0, results=("all", "grad")[i % 2])  # fmt: skip
                yield _job(given, cuda_elementwise.run)


def _job(case, run) -> Job:
    return Job.of(f"cuda {case.kernel}", case, run, 0.1, ptx.NAMES)
