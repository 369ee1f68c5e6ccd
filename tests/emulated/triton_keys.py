"""How often Triton compiles a kernel for calls that differ in their rows alone.

Imported where Triton compiles (``compiled.py``).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import static
from benchmarks.static import Case, GPUTarget, make_launch

# Odd and even, multiples of 16 and of none, one, and what strips of rows make of them.
ROWS = (1, 2, 3, 15, 16, 17, 31, 32, 48, 77, 100, 128, 255, 1000, 1024, 4095, 4096, 8191, 8192, 12345)


@lru_cache
def _backend() -> Any:
    return make_backend(GPUTarget("cuda", 90, 32))


def key(case: Case) -> tuple[Any, ...]:
    """What Triton looks a compiled kernel up by, of the launch of a case."""
    made = make_launch(case)
    bind = create_function_from_signature(made.kernel.signature, made.kernel.params, _backend())
    _, specialization, options = bind(**made.arguments, **made.options)
    return made.kernel.fn.__qualname__, str(specialization), str(options)


def distinct(kernel: str, tile: int | None, dtype: str, save: str, n: int, skew: int = 0) -> list[str]:
    """The different specialisations over all ``ROWS``, as text."""
    tiles = static.configs.tiles(kernel, "sm_90") if tile is not None else ()
    found = None if tile is None else tiles[tile]
    if found is not None and save != "preact":
        found = static.configs.for_code(found, kernel, static.launch.CODES[save])
    cases = (Case("sm_90", kernel, found, "gelu", getattr(torch, dtype), save, m, n, skew) for m in ROWS)
    return sorted({str(key(case)) for case in cases})
