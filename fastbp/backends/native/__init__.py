"""The C++ and CUDA kernels as a backend: one op call forward and one backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastbp.backends.native import library, meta
from fastbp.backends.native.library import (
    CUDA_ROUTES,
    LIBRARY,
    OVERWRITE,
    capability,
    codes,
    cpu_routes,
    cuda_architectures,
    load,
    rebuild_command,
    unavailable,
)
from fastbp.problem import Config, Problem

__all__ = [  # what others take from here
    "CUDA_ROUTES",
    "LIBRARY",
    "capability",
    "cuda_architectures",
    "library",
    "load",
    "meta",
    "rebuild_command",
    "unavailable",
]

CHECKS_TENSORS = True  # in C++, so that a good call need not be checked in Python


def supports(problem: Problem) -> str | None:
    """Why this backend cannot serve the problem, or None."""
    device = problem.device
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip:
        return (
            f"the C++ kernels run on CPUs and NVIDIA GPUs, and x is on {'an AMD GPU' if torch.version.hip else device}"
        )
    if not cuda_architectures():
        return f"{LIBRARY.name} was built without CUDA kernels; `{rebuild_command('cuda')}` builds them, with nvcc"
    return cuda_refusal(torch.cuda.current_device() if device.index is None else device.index)


def identity(device: torch.device) -> str:
    """What a measurement of this backend depends on: what the kernels were built from, and for."""
    return f"{library.BUILT} {library.ARCHITECTURES if device.type == 'cuda' else library.CAPABILITY}"


def routes(problem: Problem, rows: int | None) -> tuple[str, ...]:
    """The ways to compute that a call may ask for: of so many rows, or with None of any.

    On a GPU not the fused products: their warps wait for each other, and until that has run on a GPU nobody knows that
    none waits for ever, which no check can catch (docs/gpu-status.md).
    """
    if problem.device.type == "cuda":
        return tuple(route for route in CUDA_ROUTES if route != "fused")
    unserved = {"row"} if rows not in (1, None) else set()
    if problem.dtype != torch.bfloat16 or capability() != "avx512_bf16":
        unserved.add("narrow_pairs")
    if problem.config.form.given:
        unserved |= {"narrow", "narrow_pairs"}
    return tuple(route for route in cpu_routes() if route not in unserved)


@contextmanager
def forced(route: str) -> Iterator[None]:
    """Every call on a GPU takes this route where it can: library, fused or cublaslt. For tests and measurements."""
    library.ops().set_cuda_route(route)
    try:
        yield
    finally:
        library.ops().set_cuda_route("")


@lru_cache(maxsize=64)
def cuda_refusal(index: int) -> str | None:
    """Why the CUDA kernels that are there cannot serve a GPU; None if they can. Launches nothing."""
    return library.ops().cuda_refusal(index) or None


def forward(config: Config, x: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """y and the residuals of the policy."""
    present: list[Any] = []
    for tensor in tensors:  # no comprehension, which is a frame of its own before Python 3.12
        present.append(ABSENT if tensor is None else tensor)
    return _forward(x, present, *codes(config, torch.float64, x.is_cuda))  # type: ignore[no-any-return]


def backward(
    config: Config, dy: Tensor, saved: Sequence[Tensor | None], needs: tuple[bool, ...], overwrite: bool = False
) -> list[Tensor | None]:
    """The gradients of the inputs, of every weight and of every bias; None where ``needs`` does not ask.

    With ``overwrite`` the residuals of policy preact are used up.
    """
    present: list[Any] = []
    for tensor in saved:
        present.append(ABSENT if tensor is None else tensor)
    settings, params = codes(config, dy.dtype, dy.is_cuda)
    found = _backward(dy, present, settings + OVERWRITE * overwrite, params, needs)
    if len(found) == len(needs):
        return found  # type: ignore[no-any-return]
    grads = iter(found)
    return [next(grads) if need else None for need in needs]


def passes_over(config: Config, z: Tensor) -> bool:
    """Whether ``activate`` serves: numbers that lie side by side on a CPU, where our pass over them is the faster, and
    no other backend is named."""
    ours = config.backend in ("auto", "native")
    lies = z.is_cpu and z.dim() > 0 and z.is_contiguous() and not z._is_zerotensor()
    return ours and lies and config.row.cpu_pass in _PASSES


def goes_with(dy: Tensor, z: Tensor) -> bool:
    """Whether ``activate_backward`` serves this gradient: an ordinary one, that lies as z does."""
    return type(dy) is type(z) and dy.dtype is z.dtype and dy.is_contiguous() and not dy._is_zerotensor()


def activate(config: Config, z: Tensor) -> Tensor:
    """f(z) of a contiguous z."""
    return _activate(z, *codes(config, torch.float64, False))  # type: ignore[no-any-return]


def activate_backward(config: Config, dy: Tensor, z: Tensor) -> Tensor:
    """dz = dy · f'(z) of contiguous dy and z."""
    return _activate_backward(dy, z, *codes(config, torch.float64, False))  # type: ignore[no-any-return]


_PASSES: frozenset[str] = frozenset()  # what of ``Activation.cpu_pass`` this CPU has
if unavailable is None:
    ABSENT = library.ABSENT
    # What OpOverload.__call__ calls: one Python frame less.
    _forward, _backward = library.ops().forward.default._op, library.ops().backward.default._op
    _activate, _activate_backward = library.ops().activate.default._op, library.ops().activate_backward.default._op
    _PASSES = frozenset({"avx2": ("avx2",), "generic": ()}.get(library.CAPABILITY, ("avx2", "avx512")))
