"""The register file of a warp: in which numpy type each register is kept, and what it holds before it is written."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .dtypes import LANES, NUMPY, f4, u2, u4, u8
from .ir import Kernel, Reg, Vector

POISON = {
    "pred": np.zeros(LANES, bool),
    2: np.full(LANES, 0xFFFF, u2), 4: np.full(LANES, 0xFFFFFFFF, u4), 8: np.full(LANES, 0xFFFFFFFFFFFFFFFF, u8),
}  # fmt: skip
for _array in POISON.values():
    _array.flags.writeable = False


def bits_of(reg_type: str) -> int:
    return 0 if reg_type == "pred" else NUMPY[reg_type].itemsize


def storages(kernel: Kernel) -> list[np.dtype]:
    """The numpy type in which each register is kept."""
    votes = [Counter() for _ in kernel.registers]
    for instr in kernel.instrs:
        kinds = [mod for mod in instr.mods if mod in NUMPY]
        if not kinds or instr.op in ("cvt", "ld", "st", "mov", "wgmma"):
            if instr.op == "wgmma" and instr.args and isinstance(instr.args[0], Vector):
                for reg in instr.args[0].parts:
                    votes[reg.number][f4] += 1
            continue
        kind = NUMPY[kinds[-1]]
        for arg in instr.args:
            if isinstance(arg, Reg) and bits_of(arg.type) == kind.itemsize:
                votes[arg.number][kind] += 1
    out = []
    for reg, vote in zip(kernel.registers, votes, strict=True):
        if reg.type == "pred":
            out.append(np.dtype(bool))
        elif reg.type in ("f32", "f64"):
            out.append(NUMPY[reg.type])
        else:
            best = vote.most_common(1)
            out.append(best[0][0] if best else NUMPY[f"u{8 * bits_of(reg.type)}"])
    return out
