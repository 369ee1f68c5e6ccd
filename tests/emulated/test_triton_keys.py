"""Batches of other sizes do not make Triton compile again."""

import pytest
from support import each

pytest.importorskip("triton")

from emulated import triton_keys
from fastbp.backends.triton import configs

ELEMENTWISE = ("activation", "gated_activation", "chain_rule", "gated_chain_rule", "column_sum")
TILES = [(kind, i) for kind in configs.KINDS for i, _ in enumerate(configs.tiles(kind, "sm_90"))]
COMPRESSED = [
    ("compress", None, "output_bits"), ("gated_compress", None, "fp8"), ("chain_rule", None, "output_lsb"),
    ("chain_rule", None, "fp8"), ("forward", 1, "output_bits"), ("dgrad", 1, "fp8"),
]  # fmt: skip


def once(child, *arguments):
    found = child(triton_keys.distinct, *arguments)
    assert len(found) == 1, "\n".join(found)


@each("n", [4096, 2730])
@each("dtype", ["bfloat16", "float64"])
@each("kernel", ELEMENTWISE)
def test_elementwise(child, kernel, dtype, n):
    once(child, kernel, None, dtype, "preact", n)


@each("n", [4096, 2728])
@each(("kernel", "tile"), TILES)
def test_products(child, kernel, tile, n):
    once(child, kernel, tile, "bfloat16", "preact", n)


@each("n", [4096, 2728])
@each(("kernel", "tile", "save"), COMPRESSED)
def test_compressed(child, kernel, tile, save, n):
    once(child, kernel, tile, "bfloat16", save, n)
