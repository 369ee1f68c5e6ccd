"""The fundamental types of PTX (ISA, "Types") as numpy's, and the windows of generic addresses."""

from __future__ import annotations

import numpy as np

LANES = 32
u1, i1, u2, i2, u4, i4, u8, i8 = (np.dtype(x) for x in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"))
f2, f4, f8 = (np.dtype(x) for x in ("f2", "f4", "f8"))
NUMPY = {
    f"{k}{8 * n}": np.dtype(f"{'u' if k == 'b' else k if k != 's' else 'i'}{n}") for k in "bus" for n in (1, 2, 4, 8)
}
NUMPY |= {"f16": f2, "f32": f4, "f64": f8, "bf16": u2, "f16x2": u4, "bf16x2": u4, "s16x2": u4, "u16x2": u4}
NAME = {u1: "u1", i1: "i1", u2: "u2", i2: "i2", u4: "u4", i4: "i4", u8: "u8", i8: "i8", f2: "f2", f4: "f4", f8: "f8"}

SHARED_WINDOW = 0x1000_0000_0000
LOCAL_WINDOW = 0x2000_0000_0000
PARAM_WINDOW = 0x3000_0000_0000
