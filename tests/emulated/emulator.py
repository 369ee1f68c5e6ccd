"""The GPU of fake_device.cpp with the emulator plugged in: PyTorch's tensors of the CPU lie in its memory."""

from __future__ import annotations

import ctypes
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cxx
import numpy as np
import torch
from ptxsim import Device, Fault, Schedule, TensorMap, load_module
from ptxsim.memory import BASE, GlobalMemory

HERE = Path(__file__).parent
MAGIC, SHARED_OF_BLOCK, SHARED_ASIDE = 0x70616D5F726F736E, 227 << 10, 1024
MOST_WORDS = 900  # Triton's launchers have room for 1024 bytes of an error
U32x3 = ctypes.c_uint32 * 3


class Told(ctypes.Structure):
    """EmulatedLaunch of fake_device.h."""

    _fields_ = (
        ("image", ctypes.c_char_p), ("name", ctypes.c_char_p), ("grid", U32x3), ("block", U32x3),
        ("cluster", ctypes.c_uint32), ("shared", ctypes.c_uint32), ("granted", ctypes.c_uint32),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
    )  # fmt: skip


class Map(ctypes.Structure):
    """What fake_device.cpp writes into a tensor map."""

    _fields_ = (
        ("magic", ctypes.c_uint64), ("address", ctypes.c_uint64), ("sizes", ctypes.c_uint64 * 2),
        ("stride", ctypes.c_uint64), ("box", ctypes.c_uint32 * 2), ("item", ctypes.c_uint32),
        ("swizzle", ctypes.c_uint32),
    )  # fmt: skip


class Refused(Exception):
    """A launch that CUDA refuses."""


class Launched(NamedTuple):
    """A launch that was run."""

    kernel: str
    grid: tuple[int, ...]
    block: int
    cluster: int
    shared: int


class Memory(GlobalMemory):
    """Where fake_device.cpp allocates."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        bytes_, owners, size = (ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t())
        library.emulated_memory(*map(ctypes.byref, (bytes_, owners, size)))
        assert bytes_.value == BASE, "fake_device.cpp and ptxsim/memory.py have one address"
        lies, owner = (
            np.ctypeslib.as_array(ctypes.cast(p, ctypes.POINTER(ctypes.c_uint8)), (size.value,))
            for p in (bytes_, owners)
        )
        super().__init__(size.value, lies, owner)

    def allocate(self, size: int, name: str, writable: bool, align: int = 256, skew: int = 0) -> int:
        assert not skew
        at = self.library.emulated_allocate(size)
        self.owner[at - BASE : at - BASE + size] = 2 if writable else 1
        return at

    def reserve(self, size: int, name: str, writable: bool) -> int:
        return self.allocate(size, name, writable)

    def describe(self, address: int) -> str:
        size = ctypes.c_size_t()
        start = self.library.emulated_allocation(address, ctypes.byref(size))
        return f"{address:#x}, byte {address - start} of an allocation of {size.value}"


class Emulator:
    """One for the process: its memory is at one address. ``launches`` says what was run."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(device_library()), mode=ctypes.RTLD_GLOBAL)
        self.library.emulated_allocate.restype = ctypes.c_uint64
        self.library.emulated_allocate.argtypes = [ctypes.c_size_t]
        self.library.emulated_allocation.restype = ctypes.c_uint64
        self.library.emulated_allocation.argtypes = [ctypes.c_uint64, ctypes.c_void_p]
        self.device = Device(memory=Memory(self.library))
        self.launches: list[Launched] = []
        self.seed, self.shared_start = 0, SHARED_ASIDE
        self._plugged = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Told))(self._launch)
        self.library.emulated_plug(self._plugged)

    @contextmanager
    def allocates(self, shared_start: int = SHARED_ASIDE) -> Iterator[list[Launched]]:
        """Tensors are made in the GPU's memory; the launches until the end. Schedules are the same each time.

        ``shared_start`` is where dynamic shared memory begins, after what CUDA keeps for itself.
        """
        self.launches, self.seed, self.shared_start = [], 0, shared_start
        self.library.emulated_allocates(1)
        try:
            yield self.launches
        finally:
            self.library.emulated_allocates(0)

    def protect(self, *tensors: torch.Tensor | None) -> None:
        """From now on kernels may only read these."""
        for tensor in tensors:
            if tensor is not None and tensor.numel():
                storage = tensor.untyped_storage()
                start = storage.data_ptr() - BASE
                assert 0 <= start < len(self.device.memory), "the tensor was not made in the GPU's memory"
                self.device.memory.owner[start : start + storage.nbytes()] = 1

    def _launch(self, told: ctypes._Pointer[Told]) -> int:
        try:
            self._run(told.contents)
            return 0
        except (Fault, Refused) as reason:
            words = f"{type(reason).__name__}: {reason} {' '.join(getattr(reason, 'reports', []))}"
        except BaseException:  # it ends in C++, which knows no exceptions of Python's
            words = traceback.format_exc()
        self.library.emulated_fail(words.encode()[:MOST_WORDS])
        return 1

    def _run(self, told: Told) -> None:
        kernel = load_module(told.image.decode()).find(told.name.decode())
        cluster = _within_limits(kernel, told)
        params = [_argument(ctypes.string_at(told.arguments[i], p.size)) for i, p in enumerate(kernel.params)]
        self.seed += 1
        self.device.launch(
            kernel, tuple(told.grid), tuple(told.block), params, shared=told.shared, cluster=cluster,
            schedule=Schedule.of(self.seed), shared_start=self.shared_start, label=kernel.name,
        )  # fmt: skip
        self.launches.append(Launched(kernel.name, tuple(told.grid), told.block[0], cluster, told.shared))


def _argument(raw: bytes) -> bytes | TensorMap:
    found = Map.from_buffer_copy(raw) if len(raw) == 128 else None
    if found is None or found.magic != MAGIC:
        return raw
    return TensorMap(
        found.address, found.item, tuple(found.sizes), (found.stride,), tuple(found.box), swizzle=found.swizzle
    )


def _within_limits(kernel, told: Told) -> int:
    """The size of a cluster; Refused where CUDA refuses the launch."""
    grid, block, directives = tuple(told.grid), tuple(told.block), kernel.directives
    threads = int(np.prod(block))
    if not 0 < threads <= 1024 or 0 in grid or max(grid[1:]) > 65535:
        raise Refused(f"grid {grid}, block {block}")
    for name, fits in (("maxntid", int.__le__), ("reqntid", int.__eq__)):
        if name in directives and not fits(threads, int(np.prod(directives[name]))):
            raise Refused(f"{threads} threads, .{name} {directives[name]}")
    required = directives.get("reqnctapercluster", (0,))[0]
    cluster = told.cluster or required or 1
    if required and cluster != required:
        raise Refused(f"clusters of {cluster}, compiled for {required}")
    if grid[0] % cluster:
        raise Refused(f"{grid[0]} blocks in clusters of {cluster}")
    static = sum(v.size for v in {**kernel.shared, **kernel.module.shared}.values() if not v.external)
    if told.shared > told.granted or static + told.shared > SHARED_OF_BLOCK:
        raise Refused(f"{static} + {told.shared} bytes of shared memory, {told.granted} granted")
    return cluster


def device_library() -> Path:
    return cxx.library("libfastbp_device.so", [cxx.Source(HERE / "fake_device.cpp", kind="c10")])


@lru_cache(maxsize=1)
def emulator() -> Emulator:
    return Emulator()
