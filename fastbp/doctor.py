"""What this machine and this installation can do, what they lack, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil

import torch

from fastbp import backends, cache
from fastbp.backends import available_backends, measured, native, triton
from fastbp.version import __version__

# Optional packages: what they are for, and how they come. The versions are those of pyproject.toml.
_OPTIONAL = {
    "triton": ("Triton kernels (GPU)", 'pip install "triton>=3.6"'),
    "sklearn": ("the demo's data", 'pip install "fastbp[demo]"'),
    "matplotlib": ("the demo's picture", 'pip install "fastbp[demo]"'),
}
_DISTRIBUTION = {"sklearn": "scikit-learn"}


def report() -> str:
    """The whole report as text."""
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "backends, fastest first": [f"{name}: {status}" for name, status in available_backends().items()],
        "native kernels": _native(),
        "Triton kernels": _triton(),
        "measured choices": _measured(),
        "optional packages": [_optional(name) for name in _OPTIONAL],
    }
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections.items())


def _versions() -> list[str]:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return [
        f"fastbp {__version__}",
        f"torch {torch.__version__} ({cuda})",
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}",
    ]


def _devices() -> list[str]:
    lines = [f"CPU: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            lines.append(f"GPU {i}: {torch.cuda.get_device_name(i)}, sm_{major}{minor}")
    elif torch.version.cuda:
        lines.append("GPU: none that torch can use; nvidia-smi says whether the driver sees one")
    else:
        lines.append("GPU: this torch is a CPU build; pip install torch from PyPI brings the CUDA build on Linux")
    return lines


def _measured() -> list[str]:
    """What was measured of whole calls, on each device, and where that is written."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    lines = []
    for device in devices:
        environment = backends.environment(device)
        try:
            place = cache.folder() / measured.file_name(environment)
        except OSError as error:
            return [f"none: {error}"]
        lines.append(f"{device}: {len(measured.inventory(environment))} calls, in {place}")
    return [*lines, "`python -m fastbp tune --help` says how to measure more"]


def _native() -> list[str]:
    tools = [tool for tool in ("g++", "clang++", "nvcc") if shutil.which(tool)]
    if native.unavailable:
        lines = [native.unavailable]
        if not {"g++", "clang++"} & set(tools):
            lines.append("no C++ compiler is on the path; `apt-get install g++` brings one")
    else:
        lines = [f"CPU kernels for {native.capability()}; FASTBP_CPU_CAPABILITY names another capability of this CPU"]
        lines += _cuda()
    return [*lines, f"compilers on the path: {', '.join(tools) or 'none'}"]


def _cuda() -> list[str]:
    architectures = native.cuda_architectures()
    if not architectures:
        return [f"CUDA kernels: not built; `{native.rebuild_command('cuda')}` builds them, with nvcc"]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [f"GPU {i}: {native.cuda_refusal(i) or 'served by the CUDA kernels'}" for i in range(count)]
    return [f"CUDA kernels for {architectures}", *gpus]


def _triton() -> list[str]:
    if triton.unavailable:
        return [triton.unavailable]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lines = [_gpu(torch.device("cuda", i)) for i in range(count)]
    return lines or ["no GPU to run on; with TRITON_INTERPRET=1 in the environment the CPU interprets them, for tests"]


def _gpu(device: torch.device) -> str:
    """What calls on this GPU take, and from where it is known."""
    reason = triton.refusal(torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
    reason = reason or triton.builds()
    if reason:
        return f"GPU {device.index}: {reason}"
    from fastbp.backends.triton import choice, tuning  # not before there is a GPU, for this imports triton

    family, processors = choice.device_of(device)
    proven = ", ".join(sorted(kind for at, kind in choice.PROVEN if at == family)) or "none yet"
    return (
        f"GPU {device.index}: {processors} multiprocessors, tiles of {family}; products of ours taken unmeasured: "
        f"{proven}; measured: {tuning.inventory(device)}; PyTorch alone serves calls with fewer than {choice.SMALL:,} "
        "numbers in the widest layer"
    )


def _optional(name: str) -> str:
    purpose, command = _OPTIONAL[name]
    if importlib.util.find_spec(name) is None:
        return f"{name}: missing, wanted for {purpose}; {command}"
    return f"{name} {importlib.metadata.version(_DISTRIBUTION.get(name, name))}: {purpose}"
