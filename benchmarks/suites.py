"""What is measured: one table of cases for each suite. A suite named gpu_... is for a GPU, and runs nowhere else.

Of those the cases that say most come first, because time on a GPU may be short.
"""

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


FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")
WIDTHS = (768, 1024, 2048, 4096)  # of models, with a hidden layer four times as wide
GATED_WIDTHS = ((4096, 14336), (2048, 5632))  # of models with SwiGLU, and their hidden layers
LAYER_SHAPES = ((2048, (768, 3072)), (512, (768, 3072)), (4096, (256, 256)), (8192, (64, 64)))
EDGES = (
    *((rows, (width, width)) for rows in (1, 16, 64) for width in (8, 64, 256, 1024, 4096)),
    *((rows, (width, width)) for rows in (1024, 65536) for width in (8, 64, 256)),
    *((1, (768, 3072)), (128, (3072, 768)), (1024, (1024, 1024)), (256, (4096, 4096)), (4096, (8, 1024))),
)
GPU_EDGES = (
    *(("layer", 1, (width, width)) for width in (8, 1024, 4096)),
    *(("layer", 64, (width, 4 * width)) for width in (64, 1024, 4096)),
    ("layer", 1000, (1000, 1001)),
    ("layer", 4097, (769, 3001)),
    ("layer", 8192, (4096, 64)),
    ("layer", 1 << 18, (64, 64)),
    ("mlp", 4, (8, 8, 8)),
    ("mlp", 1024, (256,) * 4),
    ("mlp", 65536, (64,) * 6),
    ("gated_mlp", 333, (500, 1300, 500)),
)

SUITES: dict[str, tuple[Case, ...]] = {
    "layers": tuple(
        Case("layer", rows, features, activation, dtype)
        for dtype in (FLOAT, BFLOAT)
        for rows, features in LAYER_SHAPES
        for activation in ACTIVATIONS
    ),
    "edges": tuple(Case("layer", *edge, dtype=dtype) for dtype in (FLOAT, BFLOAT) for edge in EDGES),
    "blocks": tuple(
        Case(*block, dtype=dtype)  # type: ignore[misc]
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
    "policies": tuple(
        Case(*block, dtype=dtype)
        for dtype in (FLOAT, BFLOAT)
        for block in (
            # Without the largest in bfloat16: where a CPU has no products of it, eager is very slow.
            *(
                ("layer", *shape, name)
                for shape in (LAYER_SHAPES if dtype == FLOAT else LAYER_SHAPES[1:])
                for name in ("gelu", "silu")
            ),
            ("mlp", 512, (768, 3072, 768), "gelu"),
            ("mlp", 8192, (64, 64, 64), "gelu"),
            ("gated_mlp", 512, (512, 1408, 512), "silu"),
        )
    ),
    "gpu_layers": tuple(
        Case("layer", rows, (width, 4 * width), activation, dtype)
        for dtype in (BFLOAT, HALF)
        for rows in (8192, 16384)
        for activation in ACTIVATIONS
        for width in WIDTHS
    ),
    "gpu_blocks": (
        *(Case("mlp", 8192, (width, 4 * width, width), dtype=BFLOAT) for width in WIDTHS),
        *(Case("gated_mlp", 8192, (width, hidden, width), "silu", BFLOAT) for width, hidden in GATED_WIDTHS),
    ),
    "gpu_policies": (
        *(Case("layer", 8192, (1024, 4096), name, BFLOAT) for name in ("gelu", "silu")),
        Case("mlp", 8192, (1024, 4096, 1024), dtype=BFLOAT),
        Case("gated_mlp", 8192, (2048, 5632), "silu", BFLOAT),
    ),
    "gpu_edges": tuple(Case(*edge, dtype=dtype) for dtype in (BFLOAT, FLOAT) for edge in GPU_EDGES),
}

POLICY_SUITES = ("policies", "gpu_policies")  # in which the save policies are the rivals


def suites_of(device: str) -> list[str]:
    """The suites that are for this kind of device."""
    return [suite for suite in SUITES if suite.startswith("gpu_") == (device == "cuda")]


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

# For benchmarks/model_memory.py: the feed-forward blocks of models people know.
MODEL_BLOCKS: dict[str, Case] = {
    "t5": Case("mlp", 8192, (1024, 4096, 1024), "relu", BFLOAT),  # T5 large
    "bert": Case("mlp", 8192, (768, 3072, 768), "gelu", BFLOAT),  # BERT base
    "vit": Case("mlp", 8192, (1024, 4096, 1024), "gelu", BFLOAT),  # ViT-L
    "gpt2": Case("mlp", 8192, (1600, 6400, 1600), "gelu_tanh", BFLOAT),  # GPT-2 XL
    "llama": Case("gated_mlp", 8192, (4096, 11008, 4096), "silu", BFLOAT),  # Llama-7B
}
