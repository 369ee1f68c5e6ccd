"""The PTX of fastbp's CUDA kernels, as nvcc makes it of csrc/ here and now.

A file of PTX is made when it is asked for, and kept under build/ptx by a digest of all that it depends on: the sources,
the flags and the version of nvcc. Two processes that want the same one do not both make it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import runpy
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ptxsim import load_module

from fastbp.activations import TABLE

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
CACHE = ROOT / "build" / "ptx"
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="tables")
NAMES = tuple(row.name for row in TABLE)
DTYPES = ("float64", "float32", "bfloat16", "float16")  # in the order of csrc/dtype.h
HOPPER = f"sm_{SETUP['HOPPER']}"
Replaced = tuple[tuple[str, str], ...]  # files under csrc/, and what stands in them instead


def _compiler() -> tuple[list[str], str]:
    """nvcc with setup.py's flags, less those of an object file; or why not."""
    try:
        (nvcc, _), cxx = SETUP["nvcc"](), SETUP["compiler"]()
    except SETUP["Unable"] as reason:
        return [], f"no nvcc: {reason}"
    flags, dropped = [], {"-c", "-Xcompiler"}
    for flag in SETUP["NVCC_FLAGS"]:
        if flag not in dropped and not flag.startswith("-fPIC"):
            flags.append(flag)
    return [*nvcc, *flags, "-ccbin", cxx[0], "-ptx", "-lineinfo"], ""


COMMAND, UNAVAILABLE = _compiler()


@functools.cache
def version() -> str:
    """The release of nvcc: "13.0.88"."""
    said = subprocess.run([COMMAND[0], "--version"], capture_output=True, text=True, check=True).stdout
    return said.split(", V")[1].split()[0]


@functools.cache
def _sources() -> dict[str, str]:
    """The files that CUDA sources are made of, by their place under csrc/."""
    found = [p for folder in (SOURCES, SOURCES / "cuda") for p in folder.iterdir() if p.suffix in (".h", ".cuh", ".cu")]
    return {str(p.relative_to(SOURCES)): p.read_text() for p in sorted(found)}


def source(file: str) -> str:
    return _sources()[file]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compiled(unit: str, architecture: str, replaced: Replaced = ()) -> Path:
    """The PTX of a source, whose includes begin at csrc/, with files there replaced by others."""
    files = {**_sources(), **dict(replaced)}
    digest = hashlib.sha256()
    for part in (unit, architecture, version(), *COMMAND[1:], *(x for item in sorted(files.items()) for x in item)):
        digest.update(f"{len(part)} {part}".encode())
    made = CACHE / f"{digest.hexdigest()[:24]}.ptx"
    if made.exists():
        return made
    with _locked(made.with_suffix(".lock")):
        if not made.exists():
            _compile(unit, architecture, files if replaced else None, made)
    return made


def _compile(unit: str, architecture: str, files: Mapping[str, str] | None, made: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="fastbp-ptx-") as folder:
        includes = SOURCES
        if files is not None:
            includes = Path(folder, "csrc")
            (includes / "cuda").mkdir(parents=True)
            for name, text in files.items():
                (includes / name).write_text(text)
        wanted, out = Path(folder, "unit.cu"), Path(folder, "unit.ptx")
        wanted.write_text(unit)
        command = [*COMMAND, f"-arch={architecture}", f"-I{includes}", "-o", str(out), str(wanted)]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False)
        if outcome.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{outcome.stderr}")
        # Complete under its name or not there: a process that reads does not wait for the lock.
        part = made.with_suffix(f".{os.getpid()}")
        shutil.copyfile(out, part)
        part.replace(made)


def _only(activations: Sequence[str]) -> str:
    """A table of these activations alone, in place of the one of activations.h."""
    listed = " ".join(f"F({name})" for name in activations)
    return (
        f'#include "activations.h"\n#undef FASTBP_FOR_EACH_ACTIVATION\n#define FASTBP_FOR_EACH_ACTIVATION(F) {listed}\n'
    )


KINDS = ("forward", "gated_forward", "dgrad", "gated_dgrad")  # in the order of csrc/cuda/hopper.h
READS = ("z", "y", "side")  # in the order of csrc/cuda/compressed.h
_MAP = "const __grid_constant__ CUtensorMap"


@functools.cache
def hopper(kind: str, reads: str, dtype: str, activations: tuple[str, ...] = NAMES, replaced: Replaced = ()):
    """A product's kernel: of all activations that of csrc/cuda/hopper_*.cu, else the same with these alone in it."""
    if activations == NAMES:
        unit = f'#include "cuda/hopper_{kind}.cu"\n'
    else:
        unit = _only(activations) + (
            '#include "cuda/hopper.cuh"\n'
            "namespace fastbp::cuda {\n"
            f"template __global__ void product_kernel<Dtype::{dtype}, Product::{kind}, Reads::{reads}>"
            f"({_MAP}, {_MAP}, {_MAP}, const __grid_constant__ ProductArguments);\n"
            "}\n"
        )
    module = load_module(compiled(unit, HOPPER, replaced))
    number, which = KINDS.index(kind), READS.index(reads)
    return module.find("product_kernel", f"DtypeE{DTYPES.index(dtype)}ELNS0_7Product4KindE{number}", f"ReadsE{which}")


PASSES = {  # kernels, and the structs by which csrc/cuda/elementwise.h names their launches
    "value": "Value",
    "compressed_value": "CompressedValue",
    "chain_rule": "ChainRule",
    "gated_chain_rule": "GatedChainRule",
}


@functools.cache
def elementwise(
    dtype: str,
    architecture: str,
    activations: tuple[str, ...] = NAMES,
    replaced: Replaced = (),
    kernels: tuple[str, ...] = tuple(PASSES),
):
    """The module of a dtype's elementwise kernels: csrc/cuda/elementwise_*.cu, or these of them and of activations."""
    if activations == NAMES:
        unit = f'#include "cuda/elementwise_{dtype}.cu"\n'
    else:
        launches = [
            f"template void launch_as<act::{name}, Dtype::{dtype}>(const Activation&, const {of}&, cudaStream_t);\n"
            for name in activations
            for of in (PASSES[kernel] for kernel in kernels)
        ]
        unit = _only(activations) + (
            '#include "cuda/elementwise.cuh"\n'
            "namespace fastbp::cuda {\n"
            f"{''.join(launches)}"
            f"template void launch_column_sum_of<Dtype::{dtype}>(const void*, void*, int64_t, int64_t, cudaStream_t);\n"
            "}\n"
        )
    return load_module(compiled(unit, architecture, replaced))
