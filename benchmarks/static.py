"""What the kernels become on GPUs that are not here: ``python -m benchmarks.static``, Triton's and then CUDA's.

Compiles every shipped Triton kernel, configuration and dtype for sm_80, sm_90 and sm_100, reads the machine code, and
prints registers, spills, shared memory, matrix instructions and the instructions an element costs in the epilogue.
Exits 1 on a spill, on more shared memory than the architecture has, and on sm_90 and sm_100 on a product that does not
run on the asynchronous tensor cores with both operands in shared memory. ``--quick`` takes the activations that need
most registers; without it every activation is compiled, which takes some minutes. static_cuda.py does CUDA.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from benchmarks import compiled, static_cuda
from benchmarks.environment import progress
from benchmarks.static_cases import QUICK, SIXTEEN, TYPES, Case, K, cases, compressed_cases, odd_cases
from fastbp.activations import ROWS
from fastbp.backends.triton import configs, interpreting, launch
from fastbp.backends.triton.configs import Tile
from fastbp.backends.triton.launch import Launch
from fastbp.compression import BLOCK
from fastbp.problem import configure
from fastbp.saving import POLICIES

SHARED_LIMIT = {"sm_80": 99, "sm_90": 227, "sm_100": 227}  # KiB a block may have; of sm_86 and sm_89 in sm_80's place
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}  # instructions of the tensor cores
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


@dataclass(frozen=True)
class Found:
    """What a case became, and what is wrong with it."""

    registers: int
    spills: int
    shared: int  # KiB
    matrix: int  # instructions of the tensor cores
    form: str  # their shape
    waits: str  # how many products may be under way at each wait, of sm_90
    epilogue: float | None  # instructions an element after the last product
    faults: tuple[str, ...]

    def __str__(self) -> str:
        epilogue = "     " if self.epilogue is None else f"{self.epilogue:5.1f}"
        numbers = f"{self.registers:4} {self.spills:6} {self.shared:5} KiB"
        products = f"{self.matrix:4} {self.form:10} {self.waits:>5}"
        return f"{numbers} {products} {epilogue}" + "".join(f"  FAULT: {fault}" for fault in self.faults)


HEAD = f"{'family':7} {'kernel':17} {'tile':41} {'activation':12} {'dtype':5} {'policy':11} {'size':9}"
HEAD += " regs spills    shared  mma form       waits ops/el"


def empty(*shape: int, dtype: torch.dtype, skew: int = 0) -> Tensor:
    return torch.empty(math.prod(shape) + skew, dtype=dtype, device="meta")[skew:].view(shape)


def make_launch(case: Case) -> Launch:
    """The launch as a call would make it, on tensors without memory; every optional output is there."""
    m, n = case.m, case.n
    params = tuple(default for _, default in ROWS[case.activation].params)
    how = launch.arithmetic(configure("linear_act", case.activation, params, case.save, "triton"), case.dtype)
    new: Callable[..., Tensor] = partial(empty, dtype=case.dtype, skew=case.skew)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    h = None if POLICIES[case.save].from_output else new(m, n)
    x, weight, bias, out = new(m, K), new(n, K), new(n), new(m, n)
    # What forward keeps of z and what backward reads, and what lies beside it: bits or scales.
    kept = {"preact": out, "output": None, "output_lsb": None}.get(case.save, empty(m, n, dtype=torch.uint8))
    extra = empty(m, -(-n // BLOCK), dtype=torch.uint8) if case.save == "fp8" else None
    read, beside = (kept, extra) if case.save == "fp8" else (out, None)
    if case.save == "output_bits":
        kept = beside = empty(m, -(-n // 2), dtype=torch.uint8)
    assert read is not None
    if case.tile is None:
        strip = configs.strip(m, n, case.dtype.itemsize, 132)
        sums = empty(strip.strips(m), n, dtype=wide)
        return {
            "activation": lambda: launch.activation(how, out, None, out),
            "gated_activation": lambda: launch.activation(how, out, out, out),
            "compress": lambda: launch.compress(how, strip, out, None, out, kept, extra),
            "gated_compress": lambda: launch.compress(how, strip, out, out, out, *[kept, extra] * 2),
            "chain_rule": lambda: launch.chain_rule(how, strip, out, read, out, h, sums, beside),
            "gated_chain_rule": lambda: launch.gated_chain_rule(
                how, strip, out, read, read, out, out, h, sums, sums, beside, beside
            ),
            "column_sum": lambda: launch.column_sum(sums, bias),
        }[case.kernel]()
    sums = empty(-(-m // case.tile.block_m), n, dtype=torch.float32)
    return {
        "forward": lambda: launch.forward(how, case.tile, 132, x, weight, bias, out, kept, extra),
        "gated_forward": lambda: launch.gated_forward(
            how, case.tile, 132, x, [weight] * 2, [bias] * 2, out, kept, kept, extra, extra
        ),
        "dgrad": lambda: launch.dgrad(how, case.tile, 132, x, new(K, n), read, out, h, sums, beside),
        "gated_dgrad": lambda: launch.gated_dgrad(
            how, case.tile, 132, x, new(K, n), read, read, out, out, h, sums, sums, beside, beside
        ),
    }[case.kernel]()


def source_of(made: Launch) -> ASTSource:
    """The source with the types, and what Triton assumes of the values, as a launch would find them."""
    signature, constants, attributes = dict[str, str](), dict[str, Any](), dict[tuple[int, ...], Any]()
    for i, param in enumerate(made.kernel.params):
        name, value = param.name, made.arguments[param.name]
        one = isinstance(value, int) and value == 1 and not param.do_not_specialize
        if param.is_constexpr or value is None or one:
            signature[name], constants[name] = "constexpr", value
        elif hasattr(value, "block_shape"):  # a descriptor, of Triton or of Gluon, which adds a layout
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}{layout}>"
        elif isinstance(value, float):
            signature[name] = "fp64"
        else:
            signature[name] = f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else param.annotation_type or "i32"
            if not param.do_not_specialize and (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    kind = GluonASTSource if isinstance(made.kernel, GluonJITFunction) else ASTSource
    return kind(made.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_for(family: str, made: Launch) -> Any:
    target = GPUTarget("cuda", int(family.removeprefix("sm_")), 32)
    return triton.compile(source_of(made), target=target, options=made.options)


def disassemble(compiled: Any) -> tuple[int, int, list[str]]:
    """Registers, bytes of stack, and the machine code, an instruction a line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", sass)
    return int(found[1]), int(found[2]), [line for line in code if not line.startswith("NOP")]


def examine(case: Case, count_epilogue: bool = False) -> Found:
    """Compile a case and judge it."""
    made = make_launch(case)
    compiled = compile_for(case.family, made)
    registers, stack, code = disassemble(compiled)
    spills = sum(bool(re.search(r"\b(STL|LDL)\b", line)) for line in code)
    matrix = [i for i, line in enumerate(code) if re.search(rf"\b{MATRIX[case.family]}\b", line)]
    forms = sorted({found[1] for i in matrix if (found := re.search(r"MMA\.(\d[\dx]*)", code[i]))})
    ptx = compiled.asm["ptx"]
    waits = ",".join(sorted(set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx))))
    shared = -(-compiled.metadata.shared // 1024)
    faults = []
    if spills or stack:
        faults.append(f"{spills} spills, {stack} bytes of stack")
    if shared > SHARED_LIMIT[case.family]:
        faults.append(f"{shared} KiB of shared memory, of {SHARED_LIMIT[case.family]}")
    if case.tile and not matrix:
        faults.append(f"no {MATRIX[case.family]}")
    if any(re.search(r"\bHGMMA\S* R\d+, R\d+,", code[i]) for i in matrix):
        faults.append("wgmma reads an operand from registers")
    usual = case.tile != configs.ODD or not case.odd  # number by number the products wait for the loads anyway
    if case.tile and usual and case.family == "sm_90" and set(waits.split(",")) <= {"0"}:
        faults.append("every wgmma is waited for at once")
    epilogue = None
    if case.tile and count_epilogue:
        epilogue = _epilogue(case, case.tile, code, matrix)
    return Found(registers, spills, shared, len(matrix), ",".join(forms), waits, epilogue, tuple(faults))


def _epilogue(case: Case, tile: Tile, code: list[str], matrix: list[int]) -> float:
    """Instructions an element after the last product, of the kernel that is not persistent: there each stands once."""
    if tile.persistent and not tile.pingpong:
        plain = case._replace(tile=replace(tile, persistent=False))
        *_, code = disassemble(compile_for(case.family, make_launch(plain)))
        matrix = [i for i, line in enumerate(code) if re.search(rf"\b{MATRIX[case.family]}\b", line)]
    outputs = 2 if case.kernel.startswith("gated_f") else 1
    return (len(code) - matrix[-1]) / (tile.block_m * tile.block_n * outputs / (32 * tile.warps))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="the activations that need most registers; under 2 minutes"
    )
    parser.add_argument("--family", choices=list(configs.FAMILIES), action="append", help="only this architecture")
    parser.add_argument("--activation", choices=list(ROWS), action="append", help="only this activation")
    parser.add_argument("--kernel", action="append", help="only this kernel of Triton's")
    parser.add_argument("--policy", choices=list(POLICIES), action="append", help="only kernels of this save policy")
    parser.add_argument("--verbose", action="store_true", help="print every case, not only faults and one per tile")
    parser.add_argument("--only", choices=["triton", "cuda"], help="only the kernels of one kind")
    parser.add_argument(
        "--record", action="store_true", help=f"count them in {compiled.FILE.name}, for docs/gpu-status.md"
    )
    options = parser.parse_args(argv)
    tally = compiled.Tally()
    failed = 0
    if options.only != "cuda":
        failed += _report_triton(parser, options, tally)
    if options.only != "triton" and not options.kernel:
        failed += static_cuda.report(CUOBJDUMP, options.quick, options.verbose, progress, tally.add)
    if options.record:
        words = shlex.join(sys.argv[1:] if argv is None else argv)
        part = bool(options.quick or options.activation or options.policy)
        tally.write(f"python -m benchmarks.static {words}", part, triton=triton.__version__)
    return int(failed > 0)


def _report_triton(parser: argparse.ArgumentParser, options: argparse.Namespace, tally: compiled.Tally) -> int:
    """Print the table, and return how many compilations have a fault."""
    if interpreting():
        parser.error("TRITON_INTERPRET is set, so nothing is compiled; unset it")
    activations = options.activation or [*(QUICK if options.quick else ROWS)]
    given = options.family or list(configs.FAMILIES), activations, options.quick
    todo = [*cases(*given), *compressed_cases(*given), *odd_cases(*given)]
    todo = [case for case in todo if case.save in (options.policy or POLICIES)]
    if unknown := {*(options.kernel or ())} - {case.kernel for case in todo}:
        parser.error(f"no kernel {', '.join(sorted(unknown))}; of these there are {sorted({c.kernel for c in todo})}")
    todo = [case for case in todo if not options.kernel or case.kernel in options.kernel]
    print(f"Triton {triton.__version__}: {len(todo)} compilations\n{HEAD}")
    shown = set[Any]()
    failed = 0
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        first = {
            (c.family, c.kernel, c.tile, c.dtype, c.save): c for c in reversed(todo)
        }  # one of each has its epilogue counted
        counted = [first[c.family, c.kernel, c.tile, c.dtype, c.save] is c for c in todo]
        for case, found in zip(todo, progress(pool.map(examine, todo, counted, chunksize=4), len(todo)), strict=True):
            failed += bool(found.faults)
            pingpong = case.tile is not None and case.tile.pingpong
            tally.add(f"{'ping-pong' if pingpong else 'triton'} {case.kernel}", case.family, bool(found.faults))
            key = (case.family, case.kernel, case.tile, case.dtype, case.save)
            if options.verbose or found.faults or (case.tile and key not in shown and case.dtype == SIXTEEN[0]):
                print(f"{case} {found}", flush=True)
            shown.add(key)
    print(f"{len(todo) - failed} of {len(todo)} without a fault")
    return failed


if __name__ == "__main__":
    sys.exit(main())
