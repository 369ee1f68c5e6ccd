"""Memory of forward and backward against its rivals: ``python -m benchmarks.memory``.

Every case and rival runs in a process of its own. After a first step on two rows (which loads what is loaded once) the
kernel's count of the most memory in use is set back, one step runs, and the table shows how far it rose, in MiB: what
is kept for backward, every gradient, and all scratch memory of the kernels. malloc is told to give back at once what
is freed, so that the count is of what is in use. Linux only. Results go to benchmarks/results/<device>/memory.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, write
from benchmarks.rivals import RIVALS, make_linears
from benchmarks.suites import MEMORY, Case

NAMES = ("eager", "fastbp", "fastbp recompute")
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def read_status(key: str) -> float:
    """MiB, by /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def rise(case: Case, name: str) -> float:
    """How far one step of this rival raises the memory of this process, in MiB."""
    torch.manual_seed(0)
    linears = make_linears(case)
    run = RIVALS[name].make(case, linears)
    assert run is not None, f"{case.name}: {name} does not serve"
    x = torch.randn(case.rows, case.features[0], dtype=case.dtype).requires_grad_()
    dy = torch.randn(case.rows, case.features[-1], dtype=case.dtype)
    run(x.detach()[:2].requires_grad_()).backward(dy[:2])
    for linear in linears:
        linear.zero_grad()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most there was, starts again
    y = run(x)
    y.backward(dy)
    return read_status("VmHWM") - before


def measure(number: int, repeats: int) -> dict[str, object]:
    """One row of a result file: medians of several processes, in turn."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(repeats):
        for name in NAMES:
            command = [sys.executable, "-m", "benchmarks.memory", "--one", str(number), name]
            outcome = subprocess.run(command, env=os.environ | MALLOC, stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(float(outcome.stdout))
    rows = {
        name: {"mib": round(statistics.median(v), 1), "spread": round(max(v) - min(v), 1)} for name, v in found.items()
    }
    return {"case": MEMORY[number].name, "rivals": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="", help="only cases whose name has this in it; nothing written")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each case and rival")
    parser.add_argument("--output", type=Path, help="a folder for the result file, also for --case")
    parser.add_argument("--one", nargs=2, metavar=("NUMBER", "RIVAL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(rise(MEMORY[int(arguments.one[0])], arguments.one[1]))
        return 0
    rows = []
    for number, case in enumerate(MEMORY):
        if arguments.case not in case.name:
            continue
        rows.append(measure(number, arguments.repeats))
        print(case.name)
        rivals: dict[str, dict[str, float]] = rows[-1]["rivals"]  # type: ignore[assignment]
        for name, r in rivals.items():
            print(f"  {name:18}{r['mib']:8.1f} MiB   {r['mib'] / rivals['eager']['mib']:5.2f} × eager", flush=True)
    output = arguments.output or (None if arguments.case else RESULTS / "cpu")
    if output is not None:
        command = ["benchmarks.memory", *(argv if argv is not None else sys.argv[1:])]
        write(output / "memory.json", rows, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
