"""First calls of kernels while a CUDA graph is captured, with a driver that stands in for the GPU's.

Imported where Triton compiles (``compiled.py``).
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.static import Case, Tile, configs, make_launch

KERNELS = ("activation", "compress", "chain_rule", "gated_chain_rule", "column_sum", *configs.KINDS, "pingpong")


def launch_of(name: str) -> Any:
    """A launch of a kernel on tensors without memory."""
    kind, save = ("forward" if name == "pingpong" else name), "output_bits" if name == "compress" else "preact"
    tiles = configs.tiles(kind, "sm_90") if kind in configs.KINDS else ()
    tile: Tile | None = next((t for t in tiles if t.pingpong == (name == "pingpong")), None)
    return make_launch(Case("sm_90", kind, tile, "gelu", torch.bfloat16, save, 128, 128))


@contextmanager
def standin(capturing: list[bool], launched: list[str]) -> Any:
    """A driver that loads and launches nothing, and a stream that is captured where ``capturing`` says so."""
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_active_torch_device=lambda: torch.device("cpu"),
    )

    class Compiled:
        function = packed_metadata = None

        def __init__(self, name: str):
            self.name = name

        def launch_metadata(self, *arguments: Any) -> None:
            return None

        def run(self, *arguments: Any) -> None:
            launched.append(self.name)

    def compile_kernel(source: Any, target: Any, options: Any) -> Compiled:
        return Compiled(source.fn.__name__)

    active = mock.patch.object(type(triton.runtime.driver), "active", driver)
    asked = mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    with active, asked, mock.patch.object(triton.runtime.jit.JITFunction, "compile", compile_kernel, create=True):
        yield


def first_calls(name: str) -> tuple[str, list[str]]:
    """What a first call inside of a capture says, and what then runs: in the capture, before it, in it again."""
    capturing, launched = [True], list[str]()
    made = launch_of(name)
    with standin(capturing, launched):
        make = made.kernel.create_binder

        def binder() -> Any:
            found = make()
            made.kernel.compile = triton.runtime.jit.JITFunction.compile
            return found

        made.kernel.device_caches.clear()
        with mock.patch.object(made.kernel.device_caches, "default_factory", binder):
            said = ""
            try:
                made()
            except RuntimeError as error:
                said = str(error)
            launched.append("warm-up")
            for capturing[0] in (False, True):
                made()
        made.kernel.device_caches.clear()
    return said, launched
