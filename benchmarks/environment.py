"""What a result belongs to: machine, versions, commit, command."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch

import fastbp
from benchmarks import records
from benchmarks.clock import keep_freed_memory as keep_freed_memory
from fastbp.backends import native
from fastbp.backends.measured import cpu_facts

CPU = torch.device("cpu")
NOT_MEASURED = ": not measured, the time is up"  # printed after a case's name; benchmarks.gpu counts them
# What nvidia-smi knows of a GPU that torch does not say.
QUERIES = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
T = TypeVar("T")
_VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}


def folder_of(device: torch.device) -> str:
    """Where among the results the files of a device are: ``cpu-intel-amx``, or the GPU's name, like ``nvidia-h200``.

    Of a CPU the vendor and what its products are made with: one that differs in either is another machine.
    """
    if device.type != "cuda":
        facts = cpu_facts()
        vendor = _VENDORS.get(facts.get("vendor_id", ""), platform.machine())
        kernels = "amx" if "amx_bf16" in facts.get("flags", "").split() else native_capability().replace("_", "-")
        return f"cpu-{vendor}-{kernels}".lower()
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def results_of(device: torch.device) -> Path:
    """Where the result files of a device are."""
    return records.RESULTS / folder_of(device)


def write(
    path: Path,
    rows: list[dict[str, object]],
    command: list[str],
    device: torch.device = CPU,
    quiet: bool = False,
    peaks: dict[str, float] | None = None,
) -> None:
    """A result file: what it belongs to, and its rows. ``command`` is the module that measured, and its arguments."""
    found = environment(f"python -m {shlex.join(command)}", device)
    records.write(path, found | ({"peaks": peaks} if peaks else {}), rows)
    if not quiet:
        print(f"written to {path}")


def _said(*command: str) -> str:
    """What a command prints; "" where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def native_capability() -> str:
    """What the C++ kernels use of this CPU, or why there are none, but not what to do about it, with paths of here."""
    return native.capability() if native.unavailable is None else native.unavailable.split(";")[0]


@lru_cache(maxsize=8)
def gpu(device: torch.device) -> dict[str, object]:
    """The GPU and what it is driven by. The clocks are those of the moment of the first call."""
    found = torch.cuda.get_device_properties(device)
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    query = [
        "nvidia-smi",
        f"--id=GPU-{str(found.uuid).removeprefix('GPU-')}",
        f"--query-gpu={','.join(QUERIES)}",
        "--format=csv,noheader",
    ]
    answers = [answer.strip() for answer in _said(*query).split(",")]
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "triton": triton,
        **(dict(zip(QUERIES, answers, strict=True)) if len(answers) == len(QUERIES) else {"driver_version": "unknown"}),
    }


def environment(command: str, device: torch.device = CPU) -> dict[str, object]:
    return {
        "date": date.today().isoformat(),
        "commit": _said("git", "rev-parse", "--short", "HEAD"),
        "command": command,
        "device": device.type,
        "cpu": f"{cpu_facts().get('model name', 'unknown')}, {torch.backends.cpu.get_cpu_capability()}",
        "cpu_mhz": cpu_facts().get("cpu MHz", "unknown"),  # of the moment
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "native": native_capability(),
        "python": platform.python_version(),
        "fastbp": fastbp.__version__,
        **(gpu(device) if device.type == "cuda" else {}),
        # Settings of the environment under which PyTorch and fastbp choose other kernels.
        "settings": {
            k: v for k, v in os.environ.items() if k.startswith(("FASTBP_", "TRITON_", "ATEN_CPU", "ONEDNN_", "OMP_"))
        },
    }


def progress(items: Iterable[T], total: int, end: str = "\r") -> Iterator[T]:
    """The items; on a terminal, before each its number and about how long the rest will take."""
    shown, start = sys.stderr.isatty(), time.monotonic()
    for count, item in enumerate(items, 1):
        if shown:
            left = (time.monotonic() - start) / max(count - 1, 1) * (total - count + 1)
            about = f", about {left / 60:.0f} min left" if count > 1 else ""
            print(f"{count} of {total}{about}  ", end=end, file=sys.stderr, flush=True)
        yield item
    if shown and end == "\r":
        print(file=sys.stderr)


def announced(items: Sequence[T]) -> Iterator[T]:
    """``progress`` of items that print lines of their own."""
    return progress(items, len(items), end="\n")
