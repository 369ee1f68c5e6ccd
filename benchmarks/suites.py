"""What is measured: one table of suites, each with its cases for a CPU and for a GPU, its modes and its rivals.

Of the cases those that say most come first, because time on a GPU may be short.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.cases import Case as Case
from benchmarks.cases import Model, name_of
from fastbp.activations import TABLE, bind
from fastbp.forms import MLP
from fastbp.saving import POLICIES, legal_policies

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
# fwd_bwd: forward and backward. fwd: a forward pass of which nothing is kept. bwd: the backward pass of a forward one
# that is not timed. train: both by way of a cross entropy, and a step of AdamW.
MODES = ("fwd_bwd", "fwd", "bwd", "train")


@dataclass(frozen=True)
class Suite:
    """A table of cases, and how they are measured where nothing else is asked for.

    ``rivals`` by device; under a device and a dtype (``cpu float32``) those that only such cases have beside them.
    """

    about: str
    cases: Mapping[str, tuple[Case, ...]]
    rivals: Mapping[str, tuple[str, ...]]
    modes: tuple[str, ...] = ("fwd_bwd",)
    quick: tuple[Case, ...] = ()  # what --quick takes; if nothing, the case of least arithmetic
    module: str = ""  # what measures it in place of benchmarks.measure
    takes: tuple[str, ...] = ()  # of --case, --mode, --dtype and --rival those that such a module knows

    def rivals_of(self, case: Case, device: str) -> tuple[str, ...]:
        """Who runs unasked, eager first."""
        return (*self.rivals.get(device, ()), *self.rivals.get(f"{device} {name_of(case.dtype)}", ()))


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
BLOCKS = (
    ("mlp", 2048, (768, 3072, 768), "gelu"),
    ("mlp", 2048, (768, 3072, 768), "relu"),
    ("mlp", 512, (768, 3072, 768), "gelu"),  # BERT base
    ("mlp", 8 * 197, (768, 3072, 768), "gelu"),  # ViT-B, eight pictures
    ("mlp", 1024, (768, 3072, 768), "gelu_tanh"),  # GPT-2, one context
    ("gated_mlp", 256, (2048, 5632, 2048), "silu"),  # as Llama of 1B
    ("gated_mlp", 2048, (512, 1408, 512), "silu"),
    ("gated", 2048, (512, 1408), "silu"),
)
SMALL = (
    *((64, rows, name) for rows in (1 << 13, 1 << 16) for name in ("gelu", "relu", "silu")),
    *((64, 1 << power, "gelu") for power in (8, 10, 18)),
    *((128, 1 << 13, "relu"), (128, 1 << 8, "gelu"), (128, 1 << 16, "silu")),
    *((256, 1 << power, "gelu") for power in (13, 8, 16)),
)
# Of a fastbp.Linear behind an activation: the bytes of its input from little to much.
READING = tuple(
    (kind, rows, (width, hidden, width), name)
    for kind, name in (("mlp", "gelu"), ("gated_mlp", "silu"))
    for rows, width, hidden in (
        *((4, 8, 8), (64, 256, 256), (256, 256, 1024), (1024, 256, 1024), (4096, 256, 256)),
        *((1024, 512, 2048), (2048, 768, 3072)),
    )
)
# Of every activation with a module whose kernel is exchanged, and of one whose is not.
ALONE = tuple(
    ("activation", rows, (width,), row.name)
    for rows, width in ((1024, 3072), (512, 512), (64, 256))
    for row in TABLE
    if row.module is not None and (row.cpu_pass or row.name == "relu")
)
OVERHEAD = tuple((kind, 4, (8,) * sizes) for kind, sizes in (("layer", 2), ("mlp", 3), ("gated_mlp", 3)))

FLAGS = (
    "torch.compile, ban_recompute_materialized_backward=False",
    "torch.compile, activation_memory_budget=0.5",
)
PLAIN = ("eager", "eager again", "linears alone", "fastbp")
COMPILED = ("eager", "eager again", "linears alone", "torch.compile", "fastbp")
ROUTES = ("fastbp library", "fastbp fused", "fastbp native library")
ON_GPU = (*COMPILED[:-1], "torch.compile max-autotune", "fastbp", *ROUTES)
OUTSIDE = ("quack", "liger", "transformer-engine", "flash-attn")
ADDMM = ("torch addmm_activation",)
OF_POLICIES = ("eager", *(f"fastbp {save}" for save in POLICIES))
OF_MODELS = ("eager", "eager again", "torch.compile", *FLAGS, "fastbp", "fastbp recompute")
STEPS = ("eager", "fastbp", "fastbp recompute")  # a process each
SAVERS = ("eager", "torch.compile", *FLAGS, *OF_POLICIES[1:])

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
# For benchmarks/accuracy.py: an MLP with each activation that a compressed policy serves.
ACCURACY: tuple[Case, ...] = tuple(
    Case("mlp", 512, (256, 1024, 1024, 256), row.name, dtype)
    for row in TABLE
    if any(POLICIES[save].compressed for save in legal_policies(bind(row.name), MLP))
    for dtype in (FLOAT, BFLOAT, HALF)
)


def model(kind: str, dtype: torch.dtype, batch: int, length: int, width: int, hidden: int, **sizes: int) -> Model:
    activation = {"vit": "gelu", "gpt2": "gelu_tanh", "llama": "silu"}[kind]
    return Model(kind, batch * length, (width, hidden, width), activation, dtype, batch, **sizes)


MODELS: dict[str, tuple[Model, ...]] = {
    "cpu": (  # with a step of training of some tenths of a second
        model("vit", FLOAT, 4, 197, 192, 768, depth=12, heads=3, classes=1000),  # ViT-Ti
        model("gpt2", FLOAT, 4, 256, 256, 1024, depth=6, heads=8, classes=1024),
        model("llama", FLOAT, 4, 256, 256, 688, depth=6, heads=8, classes=1024),
    ),
    "cuda": (
        model("gpt2", BFLOAT, 8, 1024, 768, 3072, depth=12, heads=12, classes=50304),  # GPT-2 of 124M
        model("vit", BFLOAT, 64, 197, 768, 3072, depth=12, heads=12, classes=1000),  # ViT-B
        model("llama", BFLOAT, 8, 1024, 2048, 5632, depth=16, heads=32, classes=32000),  # 0.95B
    ),
}
TINY = tuple(
    model(kind, FLOAT, 2, length, 32, hidden, depth=2, heads=2, classes=10)
    for kind, length, hidden in (("vit", 17, 128), ("gpt2", 16, 128), ("llama", 16, 88))
)


def _each(blocks: tuple[tuple[object, ...], ...], *dtypes: torch.dtype) -> tuple[Case, ...]:
    return tuple(Case(*block, dtype=dtype) for dtype in dtypes for block in blocks)  # type: ignore[arg-type, misc]


_SMALL = tuple(("mlp", rows, (64,) * 6 if width == 64 else (width,) * 4, name) for width, rows, name in SMALL)
_OVERHEAD = tuple((*block, name) for block in OVERHEAD for name in ("gelu", "silu", "relu"))

SUITES: dict[str, Suite] = {
    "layers": Suite(
        "single layers of model sizes and of narrow ones, by activation",
        {
            "cpu": _each(
                tuple(("layer", *shape, name) for shape in LAYER_SHAPES for name in ACTIVATIONS), FLOAT, BFLOAT
            ),
            "cuda": tuple(
                Case("layer", rows, (width, 4 * width), activation, dtype)
                for dtype in (BFLOAT, HALF)
                for rows in (8192, 16384)
                for activation in ACTIVATIONS
                for width in WIDTHS
            ),
        },
        {"cpu": (*COMPILED, *ADDMM), "cuda": (*ON_GPU, *ADDMM, *OUTSIDE)},
        modes=("fwd_bwd", "fwd", "bwd"),
    ),
    "blocks": Suite(
        "the MLPs and gated MLPs of transformers; on a CPU the compiler's two memory flags in float32 only",
        {
            "cpu": _each(BLOCKS, FLOAT, BFLOAT),
            "cuda": (
                *(
                    Case("mlp", 8192, (width, 4 * width, width), name, BFLOAT)
                    for width in WIDTHS
                    for name in ("gelu", "gelu_tanh")
                ),
                *(Case("gated_mlp", 8192, (width, hidden, width), "silu", BFLOAT) for width, hidden in GATED_WIDTHS),
            ),
        },
        {"cpu": COMPILED, "cpu float32": FLAGS, "cuda": (*ON_GPU, *FLAGS, *OUTSIDE)},
        modes=("fwd_bwd", "fwd", "bwd"),
        quick=(Case("mlp", 64, (128, 512, 128)), Case("gated_mlp", 64, (128, 352, 128), "silu")),
    ),
    "small": Suite(
        "narrow networks of several layers, by the rows they are given",
        dict.fromkeys(("cpu", "cuda"), _each(_SMALL, FLOAT, BFLOAT)),
        {"cpu": PLAIN, "cuda": ON_GPU},
    ),
    "edges": Suite(
        "shapes at the edges: one row, odd sizes, much longer than wide",
        {
            "cpu": _each(tuple(("layer", *edge) for edge in EDGES), FLOAT, BFLOAT),
            "cuda": _each(GPU_EDGES, BFLOAT, FLOAT),
        },
        {"cpu": PLAIN, "cuda": ON_GPU},
    ),
    "overhead": Suite(
        "a call on next to nothing, whose time is the host's",
        dict.fromkeys(("cpu", "cuda"), _each(_OVERHEAD, FLOAT)),
        {"cpu": PLAIN, "cuda": ON_GPU},
    ),
    "reading": Suite(
        "blocks as people write them, with a fastbp.Linear behind the activation",
        dict.fromkeys(("cpu", "cuda"), _each(READING, FLOAT, BFLOAT)),
        dict.fromkeys(("cpu", "cuda"), ("eager", "eager again", "fastbp.Linear", "fastbp.Linear preact")),
    ),
    "activations": Suite(
        "modules of activations alone, whose kernel fuse exchanges on a CPU",
        {"cpu": _each(ALONE, FLOAT, BFLOAT), "cuda": _each(ALONE[:1], BFLOAT)},  # a GPU's are PyTorch's
        dict.fromkeys(("cpu", "cuda"), ("eager", "eager again", "fastbp.fuse")),
        modes=("fwd_bwd", "fwd"),
    ),
    "policies": Suite(
        "every save policy; on a CPU without the largest in bfloat16, where one may have no products of it",
        {
            "cpu": tuple(
                Case(*block, dtype=dtype)
                for dtype, shapes in ((FLOAT, LAYER_SHAPES), (BFLOAT, LAYER_SHAPES[1:]))
                for block in (
                    *(("layer", *shape, name) for shape in shapes for name in ("gelu", "silu")),
                    ("mlp", 512, (768, 3072, 768), "gelu"),
                    ("mlp", 8192, (64, 64, 64), "gelu"),
                    ("gated_mlp", 512, (512, 1408, 512), "silu"),
                )
            ),
            "cuda": (
                *(Case("layer", 8192, (1024, 4096), name, BFLOAT) for name in ("gelu", "silu")),
                Case("mlp", 8192, (1024, 4096, 1024), dtype=BFLOAT),
                Case("gated_mlp", 8192, (2048, 5632, 2048), "silu", BFLOAT),
            ),
        },
        {"cpu": OF_POLICIES, "cuda": OF_POLICIES},
    ),
    "models": Suite(
        "a ViT, a GPT-2 and a Llama in plain PyTorch: small ones on a CPU, of known sizes on a GPU",
        MODELS,
        {"cpu": OF_MODELS, "cuda": (*OF_MODELS, "torch.compile max-autotune")},
        modes=("fwd_bwd", "fwd", "train"),
        quick=TINY,
    ),
    "memory": Suite(
        "the bytes of a step: kept for backward, and the most in use",
        {"cpu": (*MEMORY, *MODEL_BLOCKS.values()), "cuda": tuple(MODEL_BLOCKS.values())},
        {"cpu": SAVERS, "cuda": SAVERS},
        module="benchmarks.memory",
        takes=("case", "rival"),
    ),
    "accuracy": Suite(
        "the errors of every save policy: slopes, and the gradients of an MLP",
        dict.fromkeys(("cpu", "cuda"), ACCURACY),
        {"cpu": OF_POLICIES, "cuda": OF_POLICIES},
        module="benchmarks.accuracy",
    ),
}
