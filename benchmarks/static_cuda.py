"""What the CUDA kernels become on GPUs that are not here: the second half of ``python -m benchmarks.static``.

Compiles every .cu file of csrc/cuda by setup.py's own commands, reads the machine code, and prints for each kernel the
registers, what is spilled, the accesses to memory of 16 bytes, and of the products the matrix instructions. A fault is
a spill or a stack frame, an aligned elementwise kernel without accesses of 16 bytes, and a product whose operands are
not both in shared memory or whose matrix instructions wait for each other.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fastbp.activations import TABLE

ROOT = Path(__file__).resolve().parents[1]
SETUP: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"), run_name="tables")
QUICK = ("elementwise_bfloat16", "hopper_forward", "hopper_gated_forward", "hopper_dgrad", "hopper_gated_dgrad")
DTYPES = ("fp64", "fp32", "bf16", "fp16")  # in the order of csrc/dtype.h
KINDS = ("forward", "gated_forward", "dgrad", "gated_dgrad")  # of csrc/cuda/hopper.h
READS = ("", " from y", " from y and side")  # of csrc/cuda/compressed.h
HEAD = f"{'architecture':13} {'kernel':24} {'dtype':5} {'for':13} regs stack spills  16-byte loads, stores  products"


class Kernel(NamedTuple):
    """One kernel of one architecture, as its name tells."""

    architecture: str
    name: str
    dtype: str
    variant: str  # the activation, or what a product reads
    aligned: bool

    def __str__(self) -> str:
        return f"{self.architecture:13} {self.name:24} {self.dtype:5} {self.variant:13}"


class Found(NamedTuple):
    registers: int
    stack: int
    spills: int
    loads: int
    stores: int
    products: int
    faults: tuple[str, ...]

    def __str__(self) -> str:
        numbers = (
            f"{self.registers:4} {self.stack:5} {self.spills:6} {self.loads:14}, {self.stores:6} {self.products:9}"
        )
        return numbers + "".join(f"  FAULT: {fault}" for fault in self.faults)


def kernel_of(architecture: str, mangled: str) -> Kernel:
    """From a mangled name, whose template arguments are the activation, the dtype, and flags."""
    name = re.search(r"cuda\d+([a-z_]+)_kernelI", mangled)
    dtype = re.search(r"DtypeE(\d)", mangled)
    assert name and dtype, mangled
    flags = re.findall(r"Lb([01])E", mangled)
    kind, reads = re.search(r"KindE(\d)", mangled), re.search(r"ReadsE(\d)", mangled)
    slope = READS[int(reads[1])] if reads else ""
    if kind:
        return Kernel(architecture, f"product {KINDS[int(kind[1])]}", DTYPES[int(dtype[1])], slope.strip(), True)
    activation = re.search(r"act(\d+)([a-z0-9_]+)", mangled)
    variant = activation[2][: int(activation[1])] if activation else ""
    gated = name[1] == "value" and flags == ["1"]
    aligned = name[1] == "value" or (name[1] != "column_sum" and flags[-1] == "1")
    full = ("gated_" if gated else "") + name[1] + slope + ("" if aligned else " gathered")
    return Kernel(architecture, full, DTYPES[int(dtype[1])], variant, aligned)


def plain_name(kernel: Kernel) -> str:
    """Without what tells variants apart: ``cuda chain_rule``, ``hopper dgrad``."""
    kind, _, rest = kernel.name.partition(" ")
    if kind == "product":
        return f"hopper {rest.split()[0]}"
    return f"cuda {'value' if kind == 'gated_value' else kind}"


def judge(kernel: Kernel, registers: int, stack: int, code: list[str]) -> Found:
    """What is wrong with the machine code of a kernel."""

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in code)

    spills, loads, stores = count(r"\b(STL|LDL)\b"), count(r"\bLDG\S*\.128"), count(r"\bSTG\S*\.128")
    products = count(r"\bHGMMA\b")
    faults = []
    if spills or stack:
        faults.append(f"{spills} spills, {stack} bytes of stack")
    if kernel.name.startswith("product"):
        if products == 0:
            faults.append("no HGMMA")
        if count(r"\bHGMMA\S* R\d+, R\d+,"):
            faults.append("wgmma reads an operand from registers")
        if not count(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1"):
            faults.append("every wgmma is waited for at once")
        if not count(r"UTMALDG\S*\.MULTICAST"):
            faults.append("nothing is loaded for two blocks")
    if kernel.aligned and not stores:
        faults.append("no stores of 16 bytes")
    if kernel.aligned and not loads and "forward" not in kernel.name:
        faults.append("no loads of 16 bytes")
    return Found(registers, stack, spills, loads, stores, products, tuple(faults))


def parse(architecture: str, usage: str, sass: str) -> Iterator[tuple[Kernel, Found]]:
    """Every kernel of a cubin, from what cuobjdump says of it."""
    sizes = {name: (int(r), int(s)) for name, r, s in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)}
    for part in sass.split("Function : ")[1:]:
        mangled = part.split(maxsplit=1)[0]
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", part)
        kernel = kernel_of(architecture, mangled)
        yield kernel, judge(kernel, *sizes[mangled], code)


def compile_and_read(nvcc: list[str], folder: Path, tool: str, job: tuple[Path, str]) -> list[tuple[Kernel, Found]]:
    source, architecture = job
    cubin = folder / f"{source.stem}_{architecture}.cubin"
    flags = [flag for flag in SETUP["NVCC_FLAGS"] if flag != "-c"]
    command = [*nvcc, "-cubin", *flags, f"-arch=sm_{architecture}", str(source), "-o", str(cubin)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    texts = [
        subprocess.run([tool, flag, str(cubin)], check=True, capture_output=True, text=True).stdout
        for flag in ("-res-usage", "-sass")
    ]
    return list(parse(f"sm_{architecture}", *texts))


def jobs(architectures: list[str], quick: bool) -> list[tuple[Path, str]]:
    """Which files are compiled for what: as setup.py does it; for ``quick`` a dtype and Hopper."""
    found = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        if quick and source.stem not in QUICK:
            continue
        alone = quick or source.stem.startswith("hopper")
        found += [(source, a) for a in ([SETUP["HOPPER"]] if alone else architectures)]
    return found


def report(
    tool: str, quick: bool, verbose: bool, progress: Callable[..., Any], add: Callable[[str, str, bool], None]
) -> int:
    """Print the table, and return how many kernels have a fault; 0 with a line where there is no nvcc.

    ``add`` is told of each kernel: its name in docs/gpu-status.md, its architecture, whether it has a fault.
    """
    try:
        nvcc, architectures = SETUP["nvcc"]()
    except SETUP["Unable"] as reason:
        print(f"CUDA kernels are not compiled: {reason}")
        return 0
    todo = jobs(architectures, quick)
    failed = total = 0
    shown = set[Any]()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        print(f"CUDA: {len(todo)} compilations\n{HEAD}")
        run = partial(compile_and_read, nvcc, Path(folder), tool)
        for kernels in progress(pool.map(run, todo), len(todo)):
            worst = {}
            for kernel, found in kernels:
                total += 1
                failed += bool(found.faults)
                add(plain_name(kernel), kernel.architecture, bool(found.faults))
                key = kernel._replace(variant="") if kernel.variant in _ACTIVATIONS else kernel
                if key not in worst or found.registers > worst[key][1].registers:
                    worst[key] = kernel, found
                if verbose or found.faults:
                    print(f"{kernel} {found}", flush=True)
                    shown.add(kernel)
            for kernel, found in worst.values():  # of all activations the one that needs most registers
                if kernel not in shown:
                    print(f"{kernel} {found}", flush=True)
    print(f"CUDA: {total - failed} of {total} kernels without a fault")
    return failed


_ACTIVATIONS = {row.name for row in TABLE}
