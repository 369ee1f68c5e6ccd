"""The Gluon ping-pong kernel of the forward product from its PTX, as ``triton_products`` runs the others."""

from __future__ import annotations

from collections.abc import Iterator

from support import OTHER_PARAMS

from emulated import triton_products
from emulated.jobs import Job
from emulated.triton_products import run as run
from fastbp.activations import ROWS
from fastbp.backends.triton import configs

NUMBER = next(i for i, tile in enumerate(configs.tiles("forward", "sm_90")) if tile.pingpong)


def case_of(
    m: int, n: int, k: int, dtype: str = "bfloat16", activation: str = "gelu", params: tuple[float, ...] = (),
    programs: int = 1, bias: bool = True, keep: bool = True,
) -> triton_products.Case:  # fmt: skip
    """A product by its tile."""
    return triton_products.Case(
        "forward", "sm_90", NUMBER, m, n, k, activation, params, dtype, programs, bias=bias, keep=keep
    )


SHAPES = [  # m, n, k, programs
    (128, 128, 64, 1), (128, 128, 384, 1), (1, 8, 8, 1), (300, 200, 328, 1), (256, 256, 448, 1), (700, 392, 264, 2),
    (384, 640, 640, 2), (128, 256, 200, 3), (1300, 136, 136, 2), (256, 264, 1032, 1),
]  # fmt: skip


def campaign() -> Iterator[Job]:
    """Every shape in both dtypes, with and without z; every activation on a small one."""
    for m, n, k, programs in SHAPES:
        for i, dtype in enumerate(("bfloat16", "float16")):
            for keep in (True, False):
                yield triton_products.job(case_of(m, n, k, dtype, programs=programs, bias=i == 0, keep=keep), 1.0)
    for name in ROWS:
        for params in ((), *OTHER_PARAMS.get(name, ())):
            yield triton_products.job(case_of(200, 136, 136, activation=name, params=params))
