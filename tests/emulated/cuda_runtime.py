"""csrc/cuda as it is built for a GPU, beside a runtime of the tests (fake_cudart.cpp): kernels run in the emulator."""

from __future__ import annotations

import ctypes
import re
from functools import lru_cache

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


def _sources(changes: tuple[Change, ...], recompiled: tuple[str, ...]) -> list[Source]:
    """What the library is made of; the changes are in these sources alone, and in what they include."""
    found = [Source(HERE / "fake_cudart.cpp"), Source(HERE / "native_ops.cpp")]
    found += [Source(cxx.ROOT / path) for path in HOST]
    found += [Source(path, kind="cuda") for path in sorted(CSRC.glob("cuda/hopper*.cu"))]
    found.append(Source(CSRC / "cuda/elementwise.cu", kind="cuda"))
    few = cxx.changed_csrc(*_few_activations())
    found += [Source(few / f"cuda/elementwise_{str(dtype)[6:]}.cu", few, "cuda") for dtype in DTYPES]
    unmet = set(recompiled)
    for i, source in enumerate(found):
        name = f"cuda/{source.path.name}"
        if name in unmet:
            unmet.remove(name)
            more = _few_activations() if source.csrc is few else []
            tree = cxx.changed_csrc(*more, *changes)
            found[i] = source._replace(path=tree / name, csrc=tree)
    assert not unmet, unmet
    return found


@lru_cache(maxsize=None)
def ops(*changes: Change, recompiled: tuple[str, ...] = ()):
    """The ops of a library, with changes to csrc/ in the sources that are named."""
    emulator()  # the library needs what that has loaded
    device = device_library()
    path = cxx.library("native.so", _sources(changes, recompiled), str(device), f"-Wl,-rpath,{device.parent}")
    name = f"fastbp_emulated_{path.parent.name}"
    ctypes.CDLL(str(path)).register_ops(name.encode())
    found = getattr(torch.ops, name)
    found.beneath = fall_through(name)
    return found
