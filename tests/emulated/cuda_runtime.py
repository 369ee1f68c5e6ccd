"""csrc/cuda as it is built for a GPU, beside a runtime of the tests (fake_cudart.cpp): kernels run in the emulator."""

from __future__ import annotations

import ctypes
import re
from functools import lru_cache
from pathlib import Path

import cxx
import torch
from cxx import CSRC, Change, Source
from emulated.emulator import HERE, device_library, emulator
from standin import SOURCES, fall_through

# Of all activations, what the tests take; the others are compiled as if they were the first of these.
ACTIVATIONS = ("gelu", "tanh", "identity")
HOST = [*SOURCES, "csrc/cuda/device.cpp", "csrc/cuda/capture.cpp", "csrc/cuda/cublaslt.cpp"]
DTYPES = (torch.bfloat16, torch.float32)


def _few_activations() -> list[Change]:
    """The header's list with the few that the elementwise kernels are compiled for; numbers stay what they are."""
    text = (CSRC / "activations.h").read_text()
    every = re.search(r"#define FASTBP_FOR_EACH_ACTIVATION\(F\)(?:.*\\\n)+.*\n", text)
    assert every
    head, *names = every[0].splitlines(keepends=True)
    few = [re.sub(r"F\((\w+)\)", lambda f: f[0] if f[1] in ACTIVATIONS else f"F({ACTIVATIONS[0]})", n) for n in names]
    return [Change("activations.h", every[0], head + "".join(few))]


def _sources(changes: tuple[Change, ...], changed: tuple[str, ...]) -> list[Source]:
    """What the library is made of. The changes are in the sources that are named, and in what these include."""
    few = cxx.changed_csrc(*_few_activations())
    found = [Source(CSRC / path) for path in sorted(CSRC.glob("cuda/hopper*.cu"))] + [Source(CSRC / "cuda/elementwise.cu")]
    found += [Source(few / f"cuda/elementwise_{str(dtype)[6:]}.cu", few) for dtype in DTYPES]
    found = [source._replace(kind="cuda") for source in found]
    found += [Source(HERE / "fake_cudart.cpp"), Source(HERE / "native_ops.cpp"), *(Source(cxx.ROOT / s) for s in HOST)]
    named = [source for source in found if source.path.name in changed]
    assert len(named) == len(changed), changed
    for source in named:
        tree = cxx.changed_csrc(*changes, *(_few_activations() if source.csrc is few else ()))
        path = tree / source.path.relative_to(source.csrc)
        found[found.index(source)] = Source(path, tree, source.kind, HERE / "faults.h")
    return found


def ops(changes: tuple[Change, ...] = (), changed: tuple[str, ...] = ()):
    """The ops of a library, with changes to csrc/ in the sources that are named (faults.h is there then)."""
    device = device_library()
    return _loaded(cxx.library("native.so", _sources(changes, changed), str(device), f"-Wl,-rpath,{device.parent}"))


@lru_cache(maxsize=None)
def _loaded(path: Path):
    emulator()  # the library needs what that has loaded
    name = f"fastbp_emulated_{path.parent.name}"
    ctypes.CDLL(str(path)).register_ops(name.encode())
    found = getattr(torch.ops, name)
    found.beneath = fall_through(name)  # which ends with the object
    return found
