"""Which kernels ``static.py`` compiles: every tile, activation, dtype and policy, and sizes at odd places."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch

from fastbp import compression
from fastbp.activations import ROWS, bind
from fastbp.backends.triton import configs, launch
from fastbp.backends.triton.configs import Tile
from fastbp.forms import FORMS
from fastbp.problem import DTYPES
from fastbp.saving import POLICIES, legal_policies

SIXTEEN = tuple(dtype for dtype in DTYPES if dtype.itemsize == 2)
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TYPES |= {torch.uint8: "u8"}
QUICK = ("gelu", "softplus", "mish", "gelu_tanh")  # a table look-up would not do: these need the most registers
M, N, K = 8192, 4096, 1024
# Rows, columns, and numbers by which matrices miss 16 bytes: what TMA cannot describe, and what it can but just.
UNDESCRIBED, DESCRIBED = ((M, 2730, 0), (M, 77, 0), (M, N, 1), (1, 2730, 0)), ((M, 2728, 0), (1, N, 0))


class Case(NamedTuple):
    """One compilation."""

    family: str
    kernel: str
    tile: Tile | None  # None for the elementwise kernels
    activation: str
    dtype: torch.dtype
    save: str = "preact"
    m: int = M
    n: int = N
    skew: int = 0  # numbers by which matrices miss the alignment of 16 bytes

    @property
    def odd(self) -> bool:
        return (self.m, self.n, self.skew) != (M, N, 0)

    def __str__(self) -> str:
        tile, size = self.tile.name if self.tile else "", f"{self.m}x{self.n}" + "+" * self.skew if self.odd else ""
        words = f"{self.family:7} {self.kernel:17} {tile:41} {self.activation:12} {TYPES[self.dtype]:5} {self.save:11}"
        return f"{words} {size:9}"


def cases(families: list[str], activations: list[str], quick: bool) -> Iterator[Case]:
    """Every case, or for ``quick`` those most likely to fail."""
    for family in families:
        for kernel in configs.KINDS:
            for tile in configs.tiles(kernel, family):
                for activation in activations:
                    if kernel == "dgrad" and not ROWS[activation].grad_reads_output:
                        continue  # identity: its dz is dh, and no kernel runs
                    for dtype in SIXTEEN[:1] if quick and activation != "gelu" else SIXTEEN:
                        yield Case(family, kernel, tile, activation, dtype)
                        if not quick and kernel == "dgrad" and ROWS[activation].grad_from_output:
                            yield Case(family, kernel, tile, activation, dtype, "output")
        for activation in activations[:1] if quick else activations:
            for dtype in DTYPES:
                yield Case(family, "activation", None, activation, dtype)
                yield Case(family, "gated_activation", None, activation, dtype)
                yield Case(family, "chain_rule", None, activation, dtype)
                yield Case(family, "gated_chain_rule", None, activation, dtype)
        for dtype in DTYPES:
            yield Case(family, "column_sum", None, activations[0], dtype)


def compressed_cases(families: list[str], activations: list[str], quick: bool) -> Iterator[Case]:
    """The kernels that write or read codes. fp8 reads z as any policy does, so a few activations serve for it.

    For ``quick`` the smallest tile of each product, whose threads have the fewest registers.
    """
    for family, activation in product(families, activations[:1] if quick else activations):
        served = {form: legal_policies(bind(activation), FORMS[form]) for form in ("mlp", "gated_mlp")}
        for kernel in (*configs.KINDS, "compress", "chain_rule", "gated_compress", "gated_chain_rule"):
            policies = [p for p in served["gated_mlp" if "gated" in kernel else "mlp"] if POLICIES[p].compressed]
            fused = kernel in configs.KINDS
            for save in policies:
                if (save == "fp8" and activation not in QUICK) or (save == "output_lsb" and quick):
                    continue
                every = configs.tiles(kernel, family) if fused else ()
                shipped = (configs.for_code(tile, kernel, launch.CODES[save]) for tile in every)
                tiles = list(dict.fromkeys(tile for tile in shipped if tile is not None)) if fused else [None]
                for tile in tiles[-1:] if quick else tiles:
                    for dtype in SIXTEEN[:1] if quick else SIXTEEN if fused else compression.DTYPES:
                        yield Case(family, kernel, tile, activation, dtype, save)


def odd_cases(families: list[str], activations: list[str], quick: bool) -> Iterator[Case]:
    """Sizes and places that are no multiples of 16 bytes, and one row, with the tiles that calls of them take."""
    plain, dtype = activations[:1] if quick else activations, SIXTEEN[0]
    for family, activation, kernel in product(families, plain, configs.KINDS):
        if kernel == "dgrad" and not ROWS[activation].grad_reads_output:
            continue
        for size in UNDESCRIBED[::2] if quick else UNDESCRIBED:
            yield Case(family, kernel, configs.ODD, activation, dtype, "preact", *size)
        for tile in configs.FAMILIES[family][kernel][: 1 if quick else None]:
            for size in DESCRIBED[:1] if quick else DESCRIBED:
                if tile.tma:
                    yield Case(family, kernel, tile, activation, dtype, "preact", *size)
    for family, activation, size in product(families, plain, UNDESCRIBED[::2] if quick else UNDESCRIBED):
        for kernel in ("gated_activation", "chain_rule", "gated_chain_rule"):
            for dtype in SIXTEEN[:1] if quick else DTYPES:
                yield Case(family, kernel, None, activation, dtype, "preact", *size)
