"""What PTX text is parsed into: modules, kernels, variables, instructions and their operands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .coverage import Coverage

SIZES = {"pred": 1}
for _bits in (8, 16, 32, 64, 128):
    for _kind in "busf":
        SIZES[f"{_kind}{_bits}"] = _bits // 8
SIZES |= {"bf16": 2, "f16x2": 4, "bf16x2": 4}


@dataclass(frozen=True)
class Reg:
    number: int  # in the register file of a warp
    type: str  # as declared: pred, b16, f32, ...
    name: str


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Imm:
    value: int | float
    bits: int | None = None  # of 0f.. and 0d.. literals


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Not:
    of: object


@dataclass(frozen=True)
class Vector:
    parts: tuple


@dataclass(frozen=True)
class Address:
    base: object  # Reg, Symbol or Imm
    offset: int = 0
    coordinates: tuple = ()


@dataclass(frozen=True)
class Pair:
    """a|b: two results."""

    first: object
    second: object


def registers_of(args):
    """All registers among operands, those inside of others too."""
    for arg in args:
        if isinstance(arg, Reg):
            yield arg
        elif isinstance(arg, Not):
            yield from registers_of((arg.of,))
        elif isinstance(arg, Vector):
            yield from registers_of(arg.parts)
        elif isinstance(arg, Address):
            yield from registers_of((arg.base, *arg.coordinates))
        elif isinstance(arg, Pair):
            yield from registers_of((arg.first, arg.second))


@dataclass
class Instr:
    op: str  # the first part of the opcode
    mods: tuple[str, ...]
    args: list
    guard: object | None  # Reg or Not(Reg)
    line: int
    text: str
    target: int = -1  # of a branch, an index
    index: int = -1  # in its kernel
    source: tuple[str, ...] = ()  # "file:line" of its .loc, the innermost first; then the outermost it is inlined at

    @property
    def name(self) -> str:
        return ".".join((self.op, *self.mods))

    def __str__(self) -> str:
        text = self.text if len(self.text) <= 160 else f"{self.text[:157]}..."
        source = f" [{', inlined at '.join(self.source)}]" if self.source else ""
        return f"line {self.line}: {text}{source}"

    def has(self, *mods: str) -> bool:
        return all(mod in self.mods for mod in mods)


@dataclass(eq=False)
class Variable:
    name: str
    space: str
    align: int
    size: int
    offset: int = 0
    external: bool = False
    data: bytes = b""


@dataclass
class Kernel:
    name: str
    params: list[Variable]
    param_bytes: int
    instrs: list[Instr]
    labels: dict[str, int]
    registers: list[Reg]
    shared: dict[str, Variable]
    local: dict[str, Variable]
    tables: dict[str, list[str]]
    directives: dict[str, tuple[int, ...]]
    module: Module = None

    def __post_init__(self):
        self.leaders = set(self.labels.values())
        self.programs: dict = {}  # by the sizes and the device that they are for

    def coverage(self) -> Coverage:
        """What all launches in this process have met."""
        from .coverage import Coverage

        found = Coverage(self, np.zeros(len(self.instrs), bool))
        for program, _, _ in self.programs.values():
            found |= program.coverage()
        return found


@dataclass
class Module:
    source: str
    target: str
    kernels: dict = field(default_factory=dict)  # by name; how to parse one, until somebody asks for it
    globals: dict[str, Variable] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # .file directives, by number
    shared: dict[str, Variable] = field(default_factory=dict)

    def find(self, *parts: str) -> Kernel:
        """The one kernel whose (mangled) name has all of these parts."""
        found = [name for name in self.kernels if all(part in name for part in parts)]
        if len(found) != 1:
            names = [name for name in self.kernels if all(part in name for part in parts)]
            raise KeyError(f"{len(found)} kernels have {parts}: {names[:9]}")
        name = found[0]
        if not isinstance(self.kernels[name], Kernel):
            self.kernels[name] = self.kernels[name]()
            self.kernels[name].module = self
        return self.kernels[name]


class ParseError(Exception):
    pass
