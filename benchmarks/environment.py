"""What a result belongs to: machine, versions, commit, command."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

import fastbp
from fastbp.backends import native


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
