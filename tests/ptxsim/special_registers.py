"""Special registers (ISA, "Special Registers")."""

from __future__ import annotations

import re

import numpy as np

from .dtypes import LANES

KNOWN = re.compile(
    r"(tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.[xyz]|cluster_(n?ctarank)|laneid|warpid|"
    r"nwarpid|dynamic_smem_size|total_smem_size|lanemask_(eq|lt|le|gt|ge)|smid|nsmid|clock|clock_hi|clock64|globaltimer|"
    r"gridid"
)
MULTIPROCESSORS = 132


def known(name: str) -> bool:
    return KNOWN.fullmatch(name) is not None


def special_register(warp, name: str) -> np.ndarray:
    sim, cta = warp.sim, warp.cta
    base, _, axis = name.partition(".")
    at = {"x": 0, "y": 1, "z": 2}.get(axis, 0)
    flat = np.arange(LANES) + warp.number * LANES
    x, y, _ = sim.block_size
    one = lambda value: np.full(LANES, value & 0xFFFFFFFF, np.uint32)  # noqa: E731
    if base == "tid":
        return [flat % x, flat // x % y, flat // (x * y)][at].astype(np.uint32)
    if base == "ntid":
        return one(sim.block_size[at])
    if base == "ctaid":
        return one(cta.index[at])
    if base == "nctaid":
        return one(sim.grid[at])
    if base == "laneid":
        return np.arange(LANES, dtype=np.uint32)
    if base == "warpid":
        return one(warp.number)
    if base in ("cluster_ctarank", "cluster_ctaid"):
        return one(cta.rank if at == 0 else 0)
    if base in ("cluster_nctarank", "cluster_nctaid"):
        return one(sim.cluster_size if at == 0 else 1)
    if base == "clusterid":
        return one(cta.index[at] // (sim.cluster_size if at == 0 else 1))
    if base == "nclusterid":
        return one(sim.grid[at] // (sim.cluster_size if at == 0 else 1))
    if base == "dynamic_smem_size":
        return one(sim.dynamic)
    if base.startswith("lanemask"):
        bit = np.uint64(1) << np.arange(LANES, dtype=np.uint64)
        low = bit - np.uint64(1)
        value = {"eq": bit, "lt": low, "le": low | bit, "gt": ~(low | bit), "ge": ~low}[base[9:]]
        return (value & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    if base == "nwarpid":
        return one(len(cta.warps))
    if base == "total_smem_size":
        return one(sim.shared_bytes)
    # All CTAs on one multiprocessor at one time: a kernel that depends on these is not checked.
    return one(MULTIPROCESSORS if base == "nsmid" else 0)
