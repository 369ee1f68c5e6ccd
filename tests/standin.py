"""The C++ around the CUDA kernels, built with the host in the GPU's place (cuda_standin.cpp)."""

import os
import runpy
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="tables")
SOURCES = [
    "csrc/cuda/calls.cpp",
    "csrc/cuda/layers.cpp",
    "csrc/cuda/route.cpp",
    "csrc/cpu/call.cpp",
    "csrc/cpu/checks.cpp",
]

VIEWS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "outer gap": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
}


def build(folder):
    """The library, made in a folder; skips where something is missing for it."""
    try:
        cxx, (nvcc, _) = SETUP["compiler"](), SETUP["nvcc"]()
        include, _ = SETUP["toolkit_folders"](nvcc)
        folders, libraries = SETUP["torch_folders"]()
    except SETUP["Unable"] as reason:
        pytest.skip(str(reason))
    flags = ["-c", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}", "-isystem", include]
    flags += [f"-DTORCH_TARGET_VERSION={SETUP['ABI']}", "-DTORCH_STABLE_ONLY", *SETUP["QUIET"]]
    flags += [flag for path in folders for flag in ("-isystem", str(path))]

    def compile_one(source):
        to = folder / f"{source.replace('/', '_')}.o"
        subprocess.run([*cxx, *flags, str(ROOT / source), "-o", str(to)], check=True)
        return str(to)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, ["tests/cuda_standin.cpp", *SOURCES]))
    to, link = folder / "standin.so", [f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*cxx, "-shared", "-Wl,--no-as-needed", *objects, *link, "-o", str(to)], check=True)
    return to
