"""A case of a Hopper product: its sizes and options, the launch that they ask for, and its operands.

Operands have few digits, so every z and dh is exact in float32 in whatever order it is added up, and is to be had to
the last bit; what comes after it is rounded once.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from emulated import ptx
from emulated import reference as ref

TILE = 128
PROCESSORS = 2  # of a device on which one cluster fits


@dataclass(frozen=True)
class Case:
    kind: str
    m: int
    n: int
    k: int
    dtype: str = "bfloat16"
    activation: str = "gelu"
    policy: str = "preact"
    processors: int = PROCESSORS
    bias: bool = True
    keep: bool = True  # forward: z is written too
    h: bool = True  # backward: h is written too
    sums: bool = True
    over: bool = False  # backward: dz over what was kept
    special: float = 0.0  # backward: inf or NaN in one number of W

    @property
    def family(self) -> str:
        return ptx.HOPPER

    @property
    def backward(self) -> bool:
        return "dgrad" in self.kind

    @property
    def gated(self) -> bool:
        return self.kind.startswith("gated")

    @property
    def reads(self) -> str:
        found = {"output": "y", "output_bits": "side", "output_lsb": "side"}
        return found.get(self.policy, "z") if self.kind == "dgrad" else "z"

    @property
    def tiles(self) -> int:
        columns = TILE // 2 if self.kind == "gated_forward" else TILE
        return -(-self.m // (2 * TILE)) * -(-self.n // columns)

    @property
    def clusters(self) -> int:
        return max(1, min(self.tiles, self.processors // 2))

    @property
    def shape(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    def __str__(self) -> str:
        special = [name for name in ("bias", "keep", "h", "sums") if not getattr(self, name)]
        words = [self.kind, self.shape, f"{self.clusters} clusters", self.dtype, self.activation, self.policy]
        words += [f"no {name}" for name in special] + ["over its operand"] * self.over
        return " ".join([*words, f"{self.special} in W"] if self.special else words)


class Operands(NamedTuple):
    a: Tensor
    b: Tensor
    b2: Tensor | None
    biases: list[Tensor | None]
    gate: Tensor | None
    up: Tensor | None


@functools.lru_cache(maxsize=4)
def operands(case: Case) -> Operands:
    dtype, generator = ref.TORCH[case.dtype], ref.generator_of(case)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def powers(size: int) -> Tensor:
        """Rows and columns of different sizes: a scale or a sum that is not its own shows."""
        return 2.0 ** torch.randint(-2, 2, (size,), generator=generator).double()

    def weight() -> Tensor:
        shrink = 2.0 ** -round(math.log2(2 * math.sqrt(case.k)))
        if case.backward:
            return (normal(case.k, case.n) * 2).round() * shrink * powers(case.n)
        return (normal(case.n, case.k) * 2).round() * shrink * powers(case.n)[:, None]

    a = (normal(case.m, case.k) * 4).round() / 4 * powers(case.m)[:, None]
    b, b2 = weight(), weight() if case.kind == "gated_forward" else None
    gate = normal(case.m, case.n) * 2 if case.backward else None
    up = normal(case.m, case.n) if case.kind == "gated_dgrad" else None
    if case.special:
        assert case.backward and gate is not None
        step, column = case.k // 2, case.n // 2 + 1
        a[:, step] = 1.0
        b[step, column] = case.special
        gate[:, column] = 3.0
        if up is not None:
            up[:, column] = 1.0
    biases = [(normal(case.n) * 8).round() / 8 if case.bias and not case.backward else None for _ in range(2)]
    pack = torch.arange(case.n) // 8 % 5
    if not case.backward:  # z is 0 in every place of a pack, and of each pass that a lane has at a time
        a[5::16], a[6::16] = 0.0, 0.0
    for bias in biases:
        if bias is not None:  # and far to the left and to the right, where f has ended
            bias[pack == 0] = 0.0
            bias[pack == 1], bias[pack == 3] = -128.0, 128.0
    given = [None if t is None else t.to(dtype) for t in (a, b, b2, *biases, gate, up)]
    return Operands(given[0], given[1], given[2], given[3:5], *given[5:])
