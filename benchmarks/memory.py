"""Memory of forward and backward against its rivals: ``python -m benchmarks.memory``.

``steps``: every case and rival runs in a process of its own. After a first step on two rows (which loads what is loaded
once) the kernel's count of the most memory in use is set back, one step runs, and the table shows how far it rose, in
MiB: what is kept for backward, every gradient, and all scratch memory of the kernels. malloc is told to give back at
once what is freed, so that the count is of what is in use. Linux only.

``models``: blocks of the size of known models: the bytes kept for backward and the most in use in a step, by hidden
element, as benchmarks/model_memory.py counts them without memory; with ``--processes`` also how far a step raises the
memory of a process, as above, which takes minutes a block. With ``--device cuda`` by PyTorch's allocator, and snapshots
of two steps for https://pytorch.org/memory_viz.

Results go to benchmarks/results/<device>/memory.jsonl and model_memory.jsonl.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import model_memory
from benchmarks.cases import Case
from benchmarks.environment import NOT_MEASURED, results_of, write
from benchmarks.model_memory import has_kernels, hidden_elements
from benchmarks.rivals import KINDS, RIVALS, Make, make_linears
from benchmarks.suites import MEMORY, MODEL_BLOCKS, SAVERS, STEPS
from fastbp.activations import bind
from fastbp.forms import FORMS
from fastbp.saving import resolve

SUITES = ("steps", "models")
QUICK = Case("layer", 8192, (64, 64), "gelu")  # one of MEMORY
QUICK_RIVALS = ("eager", "fastbp", "fastbp preact", "fastbp recompute")  # of either suite
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
PICTURED = ("eager", "fastbp preact")  # whose steps are kept as snapshots of a GPU's memory


def read_status(key: str) -> float:
    """MiB, by /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def rise(case: Case, make: Make, warm_rows: int | None = 2) -> float:
    """How far one step of this rival raises the memory of this process, in MiB."""
    torch.manual_seed(0)
    linears = make_linears(case)
    run = make(case, linears)
    x = torch.randn(case.rows, case.features[0], dtype=case.dtype).requires_grad_()
    dy = torch.randn(case.rows, case.features[-1], dtype=case.dtype)
    run(x.detach()[:warm_rows].requires_grad_()).backward(dy[:warm_rows])
    for linear in linears:
        linear.zero_grad()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most there was, starts again
    y = run(x)
    y.backward(dy)
    return read_status("VmHWM") - before


def in_process(suite: str, key: str, name: str) -> float:
    """``rise`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", suite, key, name]
    outcome = subprocess.run(command, env=os.environ | MALLOC, stdout=subprocess.PIPE, text=True, check=True)
    return float(outcome.stdout.splitlines()[-1])


def here(suite: str, key: str, name: str) -> float:
    """The other side of ``in_process``."""
    make = RIVALS[name].make
    if suite == "steps":
        return rise(MEMORY[int(key)], make)
    # What is compiled is compiled for the rows it is given.
    return rise(MODEL_BLOCKS[key], make, None if name.startswith("torch.compile") else 2)


def measure(number: int, names: list[str], repeats: int) -> dict[str, object]:
    """One row of ``steps``: medians of several processes, in turn."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            found[name].append(in_process("steps", str(number), name))
    rows = {
        name: {"mib": round(statistics.median(v), 1), "spread": round(max(v) - min(v), 1)} for name, v in found.items()
    }
    return {"case": MEMORY[number].name, "rivals": rows}


def measure_block(
    block: str, names: list[str], device: torch.device, processes: bool, pictures: Path | None
) -> dict[str, object]:
    """One row of ``models``. Bytes, and with ``_per_hidden`` bytes by hidden element."""
    case = MODEL_BLOCKS[block]
    rivals: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        picture = pictures / f"{block}-{name.replace(' ', '-')}.pickle" if pictures and name in PICTURED else None
        try:
            found = model_memory.measure(case, name, device, picture)
        except Exception as error:  # the others are still worth it
            if not name.startswith("torch.compile"):
                raise
            left_out[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        if found is None:
            continue
        if processes and has_kernels(case, name):
            found["risen"] = round(in_process("models", block, name) * 2**20)
        count = hidden_elements(case)
        rivals[name] = found | {f"{key}_per_hidden": round(size / count, 3) for key, size in found.items()}
    auto = resolve("auto", bind(case.activation), FORMS[KINDS[case.kind]], "")
    row: dict[str, object] = {"case": case.name, "block": block, "auto": f"fastbp {auto}", "rivals": rivals}
    return row | ({"left_out": left_out} if left_out else {})


def print_block(row: dict[str, Any]) -> None:
    """A block on the terminal."""
    print(f"{row['block']}: {row['case']}; bytes by hidden element")
    wide = max(len(name) for name in SAVERS) + 1
    for name, found in row["rivals"].items():
        figures = [f"{key} {found[f'{key}_per_hidden']:7.3f}" for key in found if f"{key}_per_hidden" in found]
        print(f"  {name:{wide}}{'   '.join(figures)}", flush=True)
    for name, reason in row.get("left_out", {}).items():
        print(f"  {name:{wide}}left out: {reason}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with what they leave open filled in for the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--suite", choices=SUITES, action="append", help="both on a CPU, models on a GPU if not given")
    parser.add_argument("--case", default="", help="only cases whose name has this in it; nothing written")
    parser.add_argument("--block", choices=list(MODEL_BLOCKS), action="append", help="only these; nothing written")
    parser.add_argument(
        "--rival", choices=list(dict.fromkeys((*SAVERS, *STEPS))), action="append", help="only these; nothing written"
    )
    parser.add_argument("--repeats", type=int, default=3, help="processes for each case and rival of steps")
    parser.add_argument(
        "--quick", action="store_true", help="the smallest case of each, of models without torch.compile"
    )
    parser.add_argument("--processes", action="store_true", help="of models, also steps in processes of their own")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no new block begins")
    parser.add_argument("--output", type=Path, help="a folder for the result files, also for a part of them")
    parser.add_argument("--one", nargs=3, metavar=("SUITE", "CASE", "RIVAL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU that torch can use; `python -m fastbp doctor` says more")
    if cuda and arguments.suite and "steps" in arguments.suite:
        parser.error("--suite steps is of a process on a CPU; for a GPU there is models")
    arguments.suite = arguments.suite or (["models"] if cuda else list(SUITES))
    arguments.whole = not (arguments.case or arguments.block or arguments.rival or arguments.quick)
    if arguments.quick:
        arguments.case, arguments.repeats = arguments.case or QUICK.name, 1
        arguments.block, arguments.rival = arguments.block or ["bert"], arguments.rival or list(QUICK_RIVALS)
    arguments.steps = [n for n, case in enumerate(MEMORY) if arguments.case in case.name]
    arguments.blocks = arguments.block or [b for b, case in MODEL_BLOCKS.items() if arguments.case in case.name]
    if arguments.case and not (arguments.steps or arguments.blocks):
        there = dict.fromkeys(case.name for case in (*MEMORY, *MODEL_BLOCKS.values()))
        parser.error(f"--case {arguments.case}: no such case; there are {'; '.join(there)}")
    return arguments


def measure_steps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of ``steps``."""
    rows: list[dict[str, Any]] = []
    names = [name for name in STEPS if name in (arguments.rival or STEPS)]
    for number in arguments.steps if "eager" in names else ():
        rows.append(measure(number, names, arguments.repeats))
        print(rows[-1]["case"])
        rivals: dict[str, dict[str, float]] = rows[-1]["rivals"]
        for name, r in rivals.items():
            print(f"  {name:18}{r['mib']:8.1f} MiB   {r['mib'] / rivals['eager']['mib']:5.2f} × eager", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    start = time.monotonic()
    arguments = parse(argv)
    if arguments.one:
        print(here(*arguments.one))
        return 0
    cuda = arguments.device == "cuda"
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    output = arguments.output or (results_of(device) if arguments.whole else None)
    command = ["benchmarks.memory", *(argv if argv is not None else sys.argv[1:])]
    if "steps" in arguments.suite and (steps := measure_steps(arguments)) and output is not None:
        write(output / "memory.jsonl", steps, command)
    rows: list[dict[str, Any]] = []
    for block in arguments.blocks if "models" in arguments.suite else ():
        if time.monotonic() - start > arguments.limit:
            print(f"{block}{NOT_MEASURED}", flush=True)
            continue
        processes = arguments.processes and not cuda
        names, pictures = arguments.rival or list(SAVERS), output / "snapshots" if cuda and output else None
        where = device if cuda else torch.device("meta")
        rows.append(measure_block(block, names, where, processes, pictures))
        print_block(rows[-1])
        if output is not None:  # now, should this process be ended before the last block
            write(output / "model_memory.jsonl", rows, command, device, quiet=block != arguments.blocks[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
