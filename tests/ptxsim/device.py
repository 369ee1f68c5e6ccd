"""What a test uses: a device with memory, modules of PTX, launches."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np

from .faults import Fault
from .ir import Kernel, Module, Variable
from .memory import BASE, GlobalMemory
from .parse_module import parse
from .program import Program
from .schedule import Schedule
from .simulation import Result, Simulation
from .tensor_map import TensorMap

_modules: dict[str, Module] = {}


def load_module(source: str | Path) -> Module:
    """Of a file, or of the text itself."""
    text = Path(source).read_text() if isinstance(source, Path) or "\n" not in str(source) else source
    if text not in _modules:
        _modules[text] = parse(text)
    return _modules[text]


class Struct:
    """A C struct: `Struct().ptr(a).i64(3).i32(1)`, aligned as C++ does."""

    def __init__(self):
        self.data, self.most = bytearray(), 1

    def _put(self, fmt: str, value) -> Struct:
        raw = struct.pack("<" + fmt, value)
        return self.raw(raw, len(raw))

    def raw(self, raw: bytes, align: int) -> Struct:
        self.most = max(self.most, align)
        self.data += b"\0" * (-len(self.data) % align) + raw
        return self

    def i64(self, *values: int) -> Struct:
        for value in values:
            self._put("q", value)
        return self

    ptr = i64

    def i32(self, *values: int) -> Struct:
        for value in values:
            self._put("i", value)
        return self

    def f64(self, *values: float) -> Struct:
        for value in values:
            self._put("d", value)
        return self

    def f32(self, *values: float) -> Struct:
        for value in values:
            self._put("f", value)
        return self

    def u8(self, *values: int) -> Struct:
        for value in values:
            self._put("B", value)
        return self

    def struct(self, other: Struct) -> Struct:
        return self.raw(bytes(other), other.most)

    def __bytes__(self) -> bytes:
        return bytes(self.data) + b"\0" * (-len(self.data) % self.most)


class Device:
    def __init__(self, size: int = 1 << 25, memory: GlobalMemory | None = None):
        self.memory = GlobalMemory(size) if memory is None else memory
        self.memory.base = BASE
        self.variables: dict[Variable, int] = {}
        self.maps: dict[int, TensorMap] = {}  # of tensor maps in memory, by address
        self.places: dict[int, tuple[int, np.dtype, tuple[int, ...]]] = {}

    def put(self, array: np.ndarray, name: str = "", writable: bool = False, skew: int = 0) -> int:
        """A copy of an array on the device; its address. `skew` bytes off the alignment of 256."""
        array = np.ascontiguousarray(array)
        at = self.memory.allocate(array.nbytes, name, writable, skew=skew)
        self.memory.bytes[at - BASE : at - BASE + array.nbytes] = array.reshape(-1).view(np.uint8)
        self.places[at] = (array.nbytes, array.dtype, array.shape)
        return at

    def empty(self, shape, dtype, name: str = "", skew: int = 0) -> int:
        """Space for results, all NaN."""
        dtype = np.dtype(dtype)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = int(np.prod(shape)) * dtype.itemsize
        at = self.memory.allocate(size, name, True, skew=skew)
        self.memory.bytes[at - BASE : at - BASE + size] = 0xFF
        self.places[at] = (size, dtype, shape)
        return at

    def get(self, at: int) -> np.ndarray:
        size, dtype, shape = self.places[at]
        return self.memory.bytes[at - BASE : at - BASE + size].copy().view(dtype).reshape(shape)

    def reset(self, at: int) -> None:
        size, _, _ = self.places[at]
        self.memory.bytes[at - BASE : at - BASE + size] = 0xFF

    def red_zones_whole(self) -> bool:
        return bool((self.memory.bytes[self.memory.owner == 0] == 0xFF).all())

    def launch(
        self,
        kernel: Kernel,
        grid,
        block,
        params,
        *,
        shared: int = 0,
        cluster: int | None = None,
        schedule: Schedule | int = 0,
        shared_start: int = 1024,
        label: str = "",
    ) -> Result:
        """`params` are ints, floats, bytes, Structs and TensorMaps, in order; `schedule` may be a seed."""
        grid = tuple(grid) if isinstance(grid, (tuple, list)) else (grid,)
        block = tuple(block) if isinstance(block, (tuple, list)) else (block,)
        grid, block = ((*grid, 1, 1, 1))[:3], ((*block, 1, 1, 1))[:3]
        if isinstance(schedule, int):
            schedule = Schedule.of(schedule)
        if cluster is None:
            cluster = kernel.directives.get("reqnctapercluster", (1,))[0]
        program, size, start = self._program(kernel, shared, shared_start)
        raw = np.zeros(max(kernel.param_bytes, 1), np.uint8)
        if len(params) != len(kernel.params):
            sizes = [p.size for p in kernel.params]
            raise ValueError(f"{kernel.name} has {len(sizes)} parameters of {sizes} bytes; {len(params)} were given")
        maps = {}
        for value, param in zip(params, kernel.params, strict=True):
            if isinstance(value, TensorMap):
                maps[param.offset] = value
                value = bytes(param.size)
                self._check_map(maps[param.offset])
            elif isinstance(value, (int, np.integer)):
                value = (int(value) & ((1 << 8 * param.size) - 1)).to_bytes(param.size, "little")
            elif isinstance(value, float):
                value = struct.pack("<d" if param.size == 8 else "<f", value)
            value = bytes(value)
            if len(value) != param.size:
                raise ValueError(f"parameter {param.name} of {kernel.name} has {param.size} bytes, not {len(value)}")
            raw[param.offset : param.offset + param.size] = np.frombuffer(value, np.uint8)
        if grid[0] % cluster:
            raise ValueError(f"a grid of {grid} has no whole clusters of {cluster} CTAs")
        simulation = Simulation(self, program, grid, block, cluster, size, shared, raw, schedule, maps)
        simulation.shared_base = start
        began = time.perf_counter()
        try:
            result = simulation.run()
        except Fault as fault:
            fault.kernel, fault.label, fault.schedule = kernel.name, label, schedule
            raise
        result.seconds = time.perf_counter() - began
        return result

    def _check_map(self, described: TensorMap) -> None:
        first = described.base - BASE
        owner = self.memory.owner
        if not owner[first : first + described.extent].all():
            raise ValueError(f"a tensor map reaches out of {self.memory.describe(described.base)}: {described}")

    def _program(self, kernel: Kernel, dynamic: int, start: int):
        """The program for these sizes and these addresses of the module's variables, translated once."""
        variables = {v.name: self._place(v) for v in kernel.module.globals.values() if not v.external}
        key = dynamic, start, *variables.values()
        if key in kernel.programs:
            return kernel.programs[key]
        symbols, at = {p.name: p.offset for p in kernel.params}, start
        shared = {**kernel.shared, **kernel.module.shared}.values()
        for variable in shared:
            if not variable.external:
                at = -(-at // variable.align) * variable.align
                symbols[variable.name] = at
                at += variable.size
        at = -(-at // 16) * 16
        symbols |= {variable.name: at for variable in shared if variable.external}
        local = 0
        for variable in kernel.local.values():
            local = -(-local // variable.align) * variable.align
            symbols[variable.name] = local
            local += variable.size
        symbols |= variables
        kernel.programs[key] = Program(kernel, symbols), at + dynamic, start
        return kernel.programs[key]

    def _place(self, variable: Variable) -> int:
        """A variable of a module: zeros, or what it is initialised with (ISA, "Initializers")."""
        if variable not in self.variables:
            at = self.memory.reserve(max(variable.size, 1), variable.name, variable.space == "global")
            data = variable.data.ljust(variable.size, b"\0")
            self.memory.bytes[at - BASE : at - BASE + len(data)] = np.frombuffer(data, np.uint8)
            self.variables[variable] = at
        return self.variables[variable]
