"""C++ and CUDA of the tests, compiled once for each text: objects lie under build/ by what they are made of."""

import fcntl
import hashlib
import os
import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
TESTS, CSRC, BUILD = ROOT / "tests", ROOT / "csrc", ROOT / "build" / "tests"
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="tables")
Unable = SETUP["Unable"]


class Source(NamedTuple):
    """A file to compile, and the folder that stands for csrc/."""

    path: Path
    csrc: Path = CSRC
    kind: str = "cxx"  # by what of `_commands` it is compiled
    before: Path | None = None  # a header that is included before all else


@lru_cache(maxsize=1)
def _commands() -> dict[str, list[str]]:
    """The compilers with the flags of each kind of source; Unable where something is missing."""
    cxx, (nvcc, _) = SETUP["compiler"](), SETUP["nvcc"]()
    include, _ = SETUP["toolkit_folders"](nvcc)
    folders, _ = SETUP["torch_folders"]()
    torch_folders = [flag for path in folders for flag in ("-isystem", str(path))]
    host = [*cxx, "-c", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-isystem", include]
    host += [*SETUP["QUIET"], *torch_folders]
    architecture = SETUP["HOPPER"]
    device = [f"-gencode=arch=compute_{architecture},code=compute_{architecture}", "--no-compress"]
    return {
        "cxx": [*host, f"-DTORCH_TARGET_VERSION={SETUP['ABI']}", "-DTORCH_STABLE_ONLY", _architectures(architecture)],
        "c10": host,  # what needs more of PyTorch than its stable ABI
        "cuda": [*nvcc, *SETUP["NVCC_FLAGS"], "-ccbin", cxx[0], *device],  # PTX, and the host's part in a launch
    }


def _architectures(name: str) -> str:
    return f'-DFASTBP_CUDA_ARCHITECTURES="sm_{name}"'


@lru_cache(maxsize=1)
def _compilers() -> str:
    """Which compilers and which PyTorch: of others the objects are others."""
    first = [SETUP["compiler"](), SETUP["nvcc"]()[0]]
    said = [subprocess.run([*one, "--version"], capture_output=True, text=True, check=True).stdout for one in first]
    return "\n".join([*said, torch.__version__])


def _closure(path: Path, csrc: Path, seen: dict[Path, bytes]) -> dict[Path, bytes]:
    """A file and what it includes in quotes, with their texts."""
    if path not in seen:
        text = seen[path] = path.read_bytes()
        for name in re.findall(rb'^#include "([^"]+)"', text, re.MULTILINE):
            beside = path.parent / os.fsdecode(name)
            _closure((beside if beside.is_file() else csrc / os.fsdecode(name)).resolve(), csrc, seen)
    return seen


def _digest(*parts: str | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
        found.update(b"\0")
    return found.hexdigest()[:20]


@contextmanager
def _alone():
    """One process builds at a time, so that nothing is built twice."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _made(name: str, command: list[str]) -> Path:
    """What the command writes, unless it is there already."""
    to = BUILD / name
    if not to.is_file():
        part = to.with_name(f"part-{to.name}")
        outcome = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True, check=False)
        assert outcome.returncode == 0, f"{' '.join(command)}\n{outcome.stderr}"
        part.rename(to)
    return to


def _object(source: Source) -> Path:
    command = _commands()[source.kind]
    texts = _closure(source.path.resolve(), source.csrc, {})
    if source.before:
        texts = _closure(source.before, source.csrc, texts)
    digest = _digest(_compilers(), *command, *(part for path, text in texts.items() for part in (path.name, text)))
    first = ["-include", str(source.before)] if source.before else []
    return _made(f"{source.path.stem}-{digest}.o", [*command, *first, f"-I{source.csrc}", str(source.path)])


def library(name: str, sources: list[Source], *link: str) -> Path:
    """A shared library of these sources."""
    _, torch_libraries = SETUP["torch_folders"]()
    with _alone():
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = [str(path) for path in pool.map(_object, sources)]
        command = [*SETUP["compiler"](), "-shared", "-Wl,--no-as-needed,-Bsymbolic,-z,defs", *objects, *link]
        command += [f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
        folder = BUILD / _digest(_compilers(), *command)
        folder.mkdir(exist_ok=True)
        return _made(f"{folder.name}/{name}", command)


class Change(NamedTuple):
    """A text in a file of csrc/ that is replaced in a copy."""

    file: str
    old: str
    new: str


def changed_csrc(*changes: Change) -> Path:
    """A copy of csrc/ with these changes, each of which has its one place."""
    texts = {}
    for change in changes:
        text = texts.get(change.file) or (CSRC / change.file).read_text()
        assert text.count(change.old) == 1, f"{text.count(change.old)} places in {change.file} have {change.old!r}"
        texts[change.file] = text.replace(change.old, change.new)
    every = sorted(path for path in CSRC.rglob("*") if path.is_file())
    files = {str(path.relative_to(CSRC)): path.read_bytes() for path in every} | {
        file: text.encode() for file, text in texts.items()
    }
    with _alone():
        to = BUILD / f"csrc-{_digest(*(part for pair in sorted(files.items()) for part in pair))}"
        if not to.is_dir():
            part = to.with_name(f"part-{to.name}")
            shutil.rmtree(part, ignore_errors=True)
            for file, content in files.items():
                (part / file).parent.mkdir(parents=True, exist_ok=True)
                (part / file).write_bytes(content)
            part.rename(to)
    return to
