"""How the kernels are cut into blocks on each architecture: tables, and pure functions of sizes that choose from them.

``python -m fastbp.backends.triton.configs`` prints the tables. What is in them compiles without spills for every
activation (``python -m benchmarks.static``); which of them is the fastest only a measurement says (``tuning``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fastbp.compression import BLOCK

KINDS = ("forward", "gated_forward", "dgrad", "gated_dgrad")  # the products with an epilogue of ours


@dataclass(frozen=True)
class Tile:
    """The block of a product that one program computes, and how.

    ``parts``: the epilogue runs on so many parts of the columns, one after the other, for registers.
    ``persistent``: as many programs as the GPU holds, which take one tile after another. ``blocks_per_sm``: so many
    programs on a multiprocessor have room in its registers.
    ``pingpong``: the kernel of ``pingpong.py``, which has no other tile than its own.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    parts: int = 1
    tma: bool = False
    persistent: bool = False
    pingpong: bool = False
    blocks_per_sm: int = 1
    group_m: int = 8

    @property
    def options(self) -> dict[str, Any]:
        """How it is compiled.

        FP fusion is said aloud, because its default changes with Triton 3.10. So are the registers that a thread may
        have: told nothing, ptxas spills a few where it reckons that more blocks would then fit.
        """
        options = dict(num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=True)
        registers = 65536 // (32 * self.warps * self.blocks_per_sm) // 8 * 8
        return options if self.pingpong else options | dict(maxnreg=min(255, registers))

    @property
    def name(self) -> str:
        """Short and unique, for tables and for the cache."""
        traits = ("tma", "persistent", "pingpong")
        numbers = f"{self.warps}w", f"{self.stages}s", f"{self.parts}p", f"{self.blocks_per_sm}b"
        words = [f"{self.block_m}x{self.block_n}x{self.block_k}", *numbers]
        return " ".join([*words, *(trait for trait in traits if getattr(self, trait))])

    def count(self, m: int, n: int) -> int:
        """Tiles of a result of this size."""
        return -(-m // self.block_m) * -(-n // self.block_n)


@dataclass(frozen=True)
class Strip:
    """The part of a matrix that one program of an elementwise kernel with column sums walks through.

    ``registers``: what a thread may have, where ptxas, told nothing, spills a few.
    """

    block_m: int
    block_n: int
    rows: int
    warps: int = 4
    registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        options = dict(num_warps=self.warps, enable_fp_fusion=True)
        return options if self.registers is None else options | dict(maxnreg=self.registers)

    def grid(self, m: int, n: int) -> tuple[int, int]:
        return -(-n // self.block_n), self.strips(m)

    def strips(self, m: int) -> int:
        """How many programs share a column: the rows of partial sums."""
        return -(-m // self.rows)


# For each family of architectures and each product: the tile for large results first, then smaller ones.
# Ampere, Ada, consumer Blackwell (48 to 72 of at least 99 KB of shared memory); and whatever TMA cannot describe.
_POINTERS: dict[str, tuple[Tile, ...]] = {
    "forward": (
        Tile(128, 128, 32, 4, 4, parts=4, blocks_per_sm=2),
        Tile(128, 64, 32, 4, 4, blocks_per_sm=2),
        Tile(64, 64, 32, 4, 4, blocks_per_sm=4),
    ),
    "gated_forward": (Tile(128, 64, 32, 4, 4, parts=2, blocks_per_sm=2), Tile(64, 64, 32, 4, 4, blocks_per_sm=3)),
    "dgrad": (
        Tile(128, 128, 32, 8, 4, parts=4),
        Tile(128, 64, 32, 8, 4),
        Tile(64, 64, 32, 4, 4, parts=2, blocks_per_sm=2),
    ),
    "gated_dgrad": (Tile(128, 64, 32, 8, 4, parts=2), Tile(64, 64, 32, 4, 4, parts=4, blocks_per_sm=2)),
}
# Hopper. 128x256 has the most arithmetic for each byte of shared memory; two blocks of a smaller tile on a
# multiprocessor hide one's epilogue behind the other's product, which counts where K is short.
_HOPPER: dict[str, tuple[Tile, ...]] = {
    "forward": (
        Tile(128, 256, 64, 8, 3, parts=4, tma=True, persistent=True),
        Tile(128, 128, 64, 4, 3, parts=2, tma=True, blocks_per_sm=2),
        Tile(128, 64, 64, 4, 3, tma=True, blocks_per_sm=2),
    ),
    "gated_forward": (
        Tile(128, 128, 64, 8, 3, parts=2, tma=True, persistent=True),
        Tile(128, 64, 64, 4, 3, parts=2, tma=True, blocks_per_sm=2),
    ),
    "dgrad": (
        Tile(128, 256, 64, 8, 3, parts=8, tma=True, persistent=True),
        Tile(128, 128, 64, 8, 3, parts=2, tma=True),
        Tile(128, 64, 64, 4, 3, parts=2, tma=True, blocks_per_sm=2),
    ),
    "gated_dgrad": (
        Tile(128, 128, 64, 8, 3, parts=4, tma=True, persistent=True),
        Tile(128, 64, 64, 4, 3, parts=2, tma=True, blocks_per_sm=2),
    ),
}
# Datacenter Blackwell: what Triton makes of the same text, with accumulators in tensor memory.
_BLACKWELL: dict[str, tuple[Tile, ...]] = {
    "forward": (
        Tile(128, 256, 64, 8, 3, parts=4, tma=True),
        Tile(128, 128, 64, 8, 3, tma=True),
        Tile(128, 64, 64, 4, 3, tma=True),
    ),
    "gated_forward": (
        Tile(128, 128, 64, 8, 3, parts=2, tma=True, persistent=True),
        Tile(128, 64, 64, 4, 3, parts=2, tma=True),
    ),
    "dgrad": (
        Tile(128, 256, 64, 8, 3, parts=8, tma=True),
        Tile(128, 128, 64, 8, 3, parts=4, tma=True),
        Tile(128, 64, 64, 8, 3, parts=2, tma=True),
    ),
    "gated_dgrad": (
        Tile(128, 128, 64, 8, 3, parts=4, tma=True, persistent=True),
        Tile(128, 64, 64, 8, 3, tma=True),
    ),
}
# What TMA cannot describe, because rows do not begin at 16 bytes or columns are not adjacent, comes number by number
# through registers, of which larger tiles then have too few: they spill up to 800 bytes a thread.
ODD = Tile(64, 64, 32, 8, 2, parts=2)
FAMILIES = {"sm_80": _POINTERS, "sm_90": _HOPPER, "sm_100": _BLACKWELL}
# Taken where a measurement says so, and never by rule.
ONLY_MEASURED = {
    ("sm_90", "forward"): (Tile(128, 128, 64, 4, 6, parts=4, tma=True, persistent=True, pingpong=True),),
}
OLDEST = (8, 0)


def family_of(capability: tuple[int, int]) -> str:
    """The family that an architecture (major, minor) belongs to."""
    return {9: "sm_90", 10: "sm_100"}.get(capability[0], "sm_80")


def tiles(kind: str, family: str) -> tuple[Tile, ...]:
    """Every tile of a product that an architecture may run: its own, those that read by pointers, those by request."""
    found = (*FAMILIES[family][kind], *_POINTERS[kind], ODD, *ONLY_MEASURED.get((family, kind), ()))
    return tuple(dict.fromkeys(found))


def every_tile(kind: str) -> list[Tile]:
    """The shipped tiles of a product on every architecture, each once."""
    return list(dict.fromkeys(tile for family in FAMILIES for tile in tiles(kind, family)))


def for_code(tile: Tile, kind: str, code: str) -> Tile | None:
    """The tile as a compressed policy takes it (codes.py): 32 columns at a time, which share a scale of e4m3.

    None where the kernel of the tile does not serve. lsb asks for no registers, and takes the tile as it is.
    """
    if tile.pingpong:
        return None  # its epilogue stores 16-bit numbers by TMA, and nothing else
    if code == "lsb":
        return tile
    wide, writes = tile.block_n >= BLOCK, kind.endswith("forward")
    if code == "fp8" and writes and not wide:
        return None
    least = tile.block_n // BLOCK if wide else tile.parts
    tile = replace(tile, parts=least if writes else max(tile.parts, least))
    if code == "fp8" and writes:  # which asks for more registers than z does, and twice as many of a gated layer
        if kind == "gated_forward" or tile.block_m > 16 * tile.warps:
            return replace(tile, warps=max(8, tile.warps), blocks_per_sm=1)
        return replace(tile, blocks_per_sm=min(2, tile.blocks_per_sm))
    return tile


def rule(kind: str, family: str, m: int, n: int, processors: int) -> Tile:
    """The tile for an unmeasured size: the largest of which there are enough for every multiprocessor."""
    shipped = FAMILIES[family][kind]
    return next((tile for tile in shipped if tile.count(m, n) >= processors), shipped[-1])


def worthwhile(kind: str, m: int, n: int, k: int, family: str, processors: int) -> bool:
    """Whether an unmeasured product is likely to gain by an epilogue of ours over PyTorch's product and one pass more.

    What is gained is the pass, m n numbers in and out; what may be lost is some percent of the product. So K decides:
    up to 2048 the pass is at least 13 % of the product on Hopper (arithmetic, not a measurement). And the tiles must
    fill the GPU, for the library cuts K where they do not.
    """
    return 64 <= k <= 2048 and rule(kind, family, m, n, processors).count(m, n) >= processors


def flat_block(itemsize: int) -> int:
    """Numbers of a program of the flat elementwise kernel: 8 for each of 128 threads, 4 in float64, for registers."""
    return 512 if itemsize == 8 else 1024


def strip(m: int, n: int, itemsize: int, processors: int) -> Strip:
    """The strips of an m by n matrix: 16 bytes for each of 32 threads in a row, four programs for each processor."""
    block_n, block_m = 512 // itemsize if itemsize > 2 else 256, 8
    wanted = max(1, 4 * processors // -(-n // block_n))
    rows = -(-max(m, 1) // wanted)
    registers = 128 if itemsize == 8 else None  # of float64 ptxas gives less by itself, and spills
    return Strip(block_m, block_n, -(-rows // block_m) * block_m, registers=registers)


def table() -> str:
    """Every shipped tile, a line each."""
    lines = [
        f"{family:7} {kind:14} {tile.name}"
        for family, kinds in FAMILIES.items()
        for kind in kinds
        for tile in tiles(kind, family)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
