"""Triton's own way to a launch, with a driver of CUDA's that runs the kernels in the emulator (fake_libcuda.cpp).

Specialisation, compiler, launcher and descriptors are Triton's; of its stages the last alone, ptxas, is left out. Run
as a program, in a process of its own without Triton's interpreter: whole calls, one for each line of the input.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import cxx
import torch

from emulated.emulator import HERE, device_library, emulator

FAMILIES = ("sm_80", "sm_90")  # by the number of the device


def run_apart(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of these calls (`_outcome`), in another process: in this one Triton interprets."""
    given = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "FASTBP_"))}
    folders = [str(cxx.ROOT), str(cxx.TESTS)]
    environment = given | {
        "PYTHONPATH": os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_CACHE_DIR": str(cxx.BUILD / "triton"),
        "TRITON_LIBCUDA_PATH": str(driver_library().parent),
    }
    outcome = subprocess.run(
        [sys.executable, "-m", "emulated.triton_driver"],
        input=json.dumps(calls), env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout.splitlines()[-1])


def driver_library() -> Path:
    device = device_library()
    link = [str(device), f"-Wl,-rpath,{device.parent}", "-Wl,-soname,libcuda.so.1"]
    return cxx.library("libcuda.so.1", [cxx.Source(HERE / "fake_libcuda.cpp", kind="c10")], *link)


def install() -> Any:
    """Triton's driver for an NVIDIA GPU, on the libcuda of the tests; ``device`` says which GPU is current."""
    from triton import knobs
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    emulator()
    ours = ctypes.CDLL(str(driver_library()), mode=ctypes.RTLD_GLOBAL)
    assert ctypes.CDLL("libcuda.so.1")._handle == ours._handle, "another libcuda.so.1 was loaded before, and is found"

    class Driver(CudaDriver):
        device = 0

        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda number: (int(FAMILIES[number][3:-1]), 0)
            self.get_current_device = lambda: self.device
            self.get_current_stream = lambda number: 0

    def without_ptxas(backend, stages, options, language, capability) -> None:
        stages["cubin"] = lambda ptx, metadata: ptx.encode()  # which the driver is given as it is

    knobs.runtime.add_stages_inspection_hook = without_ptxas
    driver.set_active(Driver())
    return driver.active


@contextmanager
def _on(family: str, route: str, tile: dict[str, Any] | None, fault: str) -> Iterator[None]:
    """Calls of backend triton take tensors of the CPU for those of a GPU of this family."""
    from fastbp.backends import triton as backend
    from fastbp.backends.triton import choice, configs, launch, layers

    of, launched = choice.Device(family, 4), launch.Launch.__call__
    with (
        mock.patch.object(backend, "supports", lambda problem: None),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(choice, "device_of", lambda device: of),
        mock.patch.object(layers, "device_of", lambda device: of),
        mock.patch.object(launch.Launch, "__call__", lambda made: launched(FAULTS[fault](made))),
        choice.forced(route, configs.Tile(**tile) if tile else None),
    ):
        yield


def _exchanged(one: str, other: str) -> Callable[[Any], Any]:
    """A launch whose two arguments of these names are exchanged, where it has both."""

    def fault(made):
        given = made.arguments
        both = one in given and other in given
        return replace(made, arguments=given | ({one: given[other], other: given[one]} if both else {}))

    return fault


# What a test may make of each launch.
FAULTS: dict[str, Callable[[Any], Any]] = {
    "": lambda made: made,
    "short grid": lambda made: replace(made, grid=(max(1, made.grid[0] - 1), *made.grid[1:])),
    "gate for up": _exchanged("gate", "up"),
    "strides of x": _exchanged("stride_xm", "stride_xk"),
    "rows for columns": _exchanged("M", "N"),
}


def _outcome(driver: Any, family: str, route: str, tile: Any, case: list[Any], options: dict[str, Any], fault: str):
    """The launches of a call, [name, grid, threads, bytes of shared memory]; or what went wrong."""
    from emulated.whole_calls import run
    from fastbp.activations import bind

    form, activation, save, dtype, rows, features = case
    driver.device = FAMILIES.index(family)
    with emulator().allocates() as launches, _on(family, route, tile, fault):
        try:
            run("triton", form, bind(activation), save, getattr(torch, dtype), tuple(rows), tuple(features), **options)
        except Exception:
            return {"error": traceback.format_exc()}
        return {"launches": [[one.kernel, one.grid, one.block, one.shared] for one in launches]}


def main() -> None:
    driver = install()
    print(json.dumps([_outcome(driver, **call) for call in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
