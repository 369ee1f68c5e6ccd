"""What a result belongs to: machine, versions, commit, command."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import TypeVar

import torch

import fastbp
from fastbp.backends import native

RESULTS = Path(__file__).parent / "results"
T = TypeVar("T")


def write(path: Path, rows: list[dict[str, object]], command: list[str]) -> None:
    """A result file: what it belongs to, and its rows. ``command`` is the module that measured, and its arguments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"environment": environment(f"python -m {' '.join(command)}"), "rows": rows}
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {path}")


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what is freed, as it does anyway after a while.

    Whether it gives the top of the heap back to the kernel after a step, and so has every page faulted in again,
    depends on what else lies there: one rival's gradients on another's remains. It was up to half of a step's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        for setting in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(setting, 1 << 30)


def environment(command: str) -> dict[str, object]:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "date": date.today().isoformat(),
        "commit": git.stdout.strip(),
        "command": command,
        "cpu": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native": native.capability() if native.unavailable is None else native.unavailable,
        "python": platform.python_version(),
        "fastbp": fastbp.__version__,
        # Settings of the environment under which PyTorch and fastbp choose other kernels.
        "settings": {k: v for k, v in os.environ.items() if k.startswith(("FASTBP_", "ATEN_CPU", "ONEDNN_", "OMP_"))},
    }


def progress(items: Iterable[T], total: int) -> Iterator[T]:
    """The items, with their count on a terminal's last line meanwhile."""
    shown = sys.stderr.isatty()
    for count, item in enumerate(items, 1):
        yield item
        if shown:
            print(f"\r{count} of {total}", end="\n" if count == total else "", file=sys.stderr, flush=True)
