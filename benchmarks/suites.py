"""What is measured: one table of cases for each suite."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """A block of linears: what it is made of, and the rows it is given."""

    kind: str  # layer, gated, mlp, gated_mlp
    rows: int
    features: tuple[int, ...]  # in, hidden ..., out; a gated block has one hidden size
    activation: str = "gelu"
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        sizes = "→".join(map(str, self.features))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind} {self.rows}×{sizes} {self.activation} {dtype}"


FLOAT, BFLOAT = torch.float32, torch.bfloat16
LAYER_SHAPES = ((2048, (768, 3072)), (512, (768, 3072)), (4096, (256, 256)), (8192, (64, 64)))
EDGES = (
    *((rows, (width, width)) for rows in (1, 16, 64) for width in (8, 64, 256, 1024, 4096)),
    *((rows, (width, width)) for rows in (1024, 65536) for width in (8, 64, 256)),
    *((1, (768, 3072)), (128, (3072, 768)), (1024, (1024, 1024)), (256, (4096, 4096)), (4096, (8, 1024))),
)

SUITES: dict[str, tuple[Case, ...]] = {
    "layers": tuple(
        Case("layer", rows, features, activation, dtype)
        for dtype in (FLOAT, BFLOAT)
        for rows, features in LAYER_SHAPES
        for activation in ("gelu", "gelu_tanh", "silu", "relu")
    ),
    "edges": tuple(Case("layer", *edge, dtype=dtype) for dtype in (FLOAT, BFLOAT) for edge in EDGES),
    "blocks": tuple(
        Case(*block, dtype=dtype)
        for dtype in (FLOAT, BFLOAT)
        for block in (
            ("mlp", 2048, (768, 3072, 768), "gelu"),
            ("mlp", 2048, (768, 3072, 768), "relu"),
            ("mlp", 512, (768, 3072, 768), "gelu"),
            ("gated_mlp", 2048, (512, 1408, 512), "silu"),
            ("gated", 2048, (512, 1408), "silu"),
        )
    ),
    "small": tuple(
        Case("mlp", rows, (64,) * 6 if width == 64 else (width,) * 4, activation, dtype)
        for dtype in (FLOAT, BFLOAT)
        for width, rows, activation in (
            *((64, rows, name) for rows in (8192, 65536) for name in ("gelu", "relu", "silu")),
            (128, 8192, "relu"),
            (256, 8192, "gelu"),
        )
    ),
    "overhead": tuple(
        Case(kind, 4, (8,) * sizes, activation)
        for kind, sizes in (("layer", 2), ("mlp", 3))
        for activation in ("gelu", "silu", "relu")
    ),
}

# For benchmarks/memory.py: an activation of which z is kept, and one of which y is enough.
MEMORY: tuple[Case, ...] = tuple(
    Case(*block, dtype=dtype)
    for dtype in (FLOAT, BFLOAT)
    for block in (
        *(("layer", rows, features, "gelu") for rows, features in LAYER_SHAPES),
        ("layer", 2048, (768, 3072), "relu"),
        ("mlp", 2048, (768, 3072, 768), "gelu"),
        ("mlp", 2048, (768, 3072, 768), "relu"),
        ("mlp", 512, (768, 3072, 768), "gelu"),
        ("gated_mlp", 2048, (512, 1408, 512), "silu"),
        ("mlp", 65536, (64,) * 6, "gelu"),
    )
)
