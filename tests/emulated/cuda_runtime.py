"""csrc/cuda as it is built for a GPU, beside a runtime of the tests (fake_cudart.cpp): kernels run in the emulator."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path

import cxx
import torch
from cxx import CSRC, Change, Source
from standin import SOURCES, fall_through

from emulated.emulator import HERE, device_library, emulator

# Of all activations, what the tests take; in the elementwise kernels the others are as if they were the first of these.
ACTIVATIONS = ("gelu", "tanh", "identity")
DTYPES = (torch.bfloat16, torch.float32)  # of the elementwise kernels; of the products the first alone
HOST = [*SOURCES, "csrc/cuda/device.cpp", "csrc/cuda/capture.cpp", "csrc/cuda/cublaslt.cpp"]


def _few_activations() -> Change:
    """The header's list with the few; numbers stay what they are."""
    text = (CSRC / "activations.h").read_text()
    every = re.search(r"#define FASTBP_FOR_EACH_ACTIVATION\(F\)(?:.*\\\n)+.*\n", text)
    assert every
    head, *names = every[0].splitlines(keepends=True)
    few = [re.sub(r"F\((\w+)\)", lambda f: f[0] if f[1] in ACTIVATIONS else f"F({ACTIVATIONS[0]})", n) for n in names]
    return Change("activations.h", every[0], head + "".join(few))


def _one_dtype() -> Change:
    """What the products are compiled for."""
    text = (CSRC / "cuda/hopper_launch.cuh").read_text()
    other = re.search(r"  PREFIX template void launch_product_as<Dtype::float16.*\\\n.*\n", text)
    assert other
    return Change("cuda/hopper_launch.cuh", other[0], "\n")


def _sources(changes: tuple[Change, ...], changed: tuple[str, ...]) -> list[Source]:
    """What the library is made of. The changes are in the sources that are named, and in what these include."""
    elementwise = [CSRC / f"cuda/elementwise_{str(dtype).removeprefix('torch.')}.cu" for dtype in DTYPES]
    kernels = [(path, _one_dtype()) for path in sorted(CSRC.glob("cuda/hopper*.cu"))]
    kernels += [(path, _few_activations()) for path in [CSRC / "cuda/elementwise.cu", *elementwise]]
    host = [HERE / "fake_cudart.cpp", HERE / "native_ops.cpp", *(cxx.ROOT / path for path in HOST)]
    found, unmet = [], set(changed)
    for path, less in [*kernels, *((path, None) for path in host)]:
        here = () if path.name not in changed else changes
        unmet.discard(path.name)
        kind = "cuda" if path.suffix == ".cu" else "cxx"
        if less or here:
            tree = cxx.changed_csrc(*(less,) * bool(less), *here)
            found.append(Source(tree / path.relative_to(CSRC), tree, kind, HERE / "faults.h" if here else None))
        else:
            found.append(Source(path, CSRC, kind))
    assert not unmet, unmet
    return found


def ops(changes: tuple[Change, ...] = (), changed: tuple[str, ...] = ()):
    """The ops of a library, with changes to csrc/ in the sources that are named (faults.h is there then)."""
    device = device_library()
    return _loaded(cxx.library("native.so", _sources(changes, changed), str(device), f"-Wl,-rpath,{device.parent}"))


@cache
def _loaded(path: Path):
    emulator()  # the library needs what that has loaded
    name, library = f"fastbp_emulated_{path.parent.name}", ctypes.CDLL(str(path))
    library.register_ops(name.encode())
    found = getattr(torch.ops, name)
    found.beneath = fall_through(name)  # which ends with the object
    found.new_process = library.new_process
    return found
