"""The Triton backend, for NVIDIA GPUs of compute capability 8.0 and newer.

Of the products of a call, those with an activation beside them may run as kernels of ours with the elementwise work in
the epilogue (``gemm.py``); the others are PyTorch's, and so are all where nothing of ours is known to be faster, with
one elementwise kernel each way (``elementwise.py``). Which it is, is the business of ``choice.py``.

``unavailable`` is None, or why there is no Triton to call. Triton itself is imported when a first call arrives.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fastbp.problem import Config, Problem
from fastbp.version import fingerprint

ACCUMULATES = True
CHECKS_TENSORS = False  # the products are PyTorch's, which broadcast and promote what a call must refuse
OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)
INSTALL = f'pip install "triton>={OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}"'


def find_unavailable(version: str | None) -> str | None:
    """Why Triton of this version (None: not installed) cannot serve, and what to do about it; None if it can."""
    needed = ".".join(map(str, OLDEST_TRITON))
    if version is None:
        return f"Triton is not installed, and {needed} or newer is needed; `{INSTALL}`"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TRITON:
        return f"Triton {version} is too old, {needed} or newer is needed; `{INSTALL}`"
    return None


def _installed() -> str | None:
    for distribution in ("triton", "pytorch-triton"):  # the latter comes with nightly builds of torch
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


unavailable = find_unavailable(_installed())


def interpreting() -> bool:
    """Whether kernels are interpreted on the CPU, as Triton itself decides when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def supports(problem: Problem) -> str | None:
    """Why this backend cannot serve the problem, or None."""
    device = problem.device
    if interpreting():
        if device.type != "cpu":
            return f"TRITON_INTERPRET interprets the kernels on the CPU, and x is on {device}; unset it"
        if problem.config.backend != "triton":
            return "interpreted kernels are for tests, and serve calls that name them only"
        return _loaded()
    if device.type == "cpu":
        return (
            "the Triton kernels run on NVIDIA GPUs, and x is on the CPU; move x and the weights to 'cuda', or set "
            "TRITON_INTERPRET=1 before Python starts to have them interpreted"
        )
    if device.type != "cuda" or torch.version.hip:
        return f"the Triton kernels run on NVIDIA GPUs, and x is on {'an AMD GPU' if torch.version.hip else device}"
    old = refusal(torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
    return old or _loaded() or builds()


@lru_cache(maxsize=8)
def identity(device: torch.device) -> str:
    """What a measurement of this backend depends on: Triton and the kernels."""
    return f"{_installed()} {fingerprint(Path(__file__).parent, ('.py',))}"


def routes(problem: Problem, rows: int | None) -> tuple[str, ...]:
    """The ways to compute that a call may ask for, beside what was measured of its products."""
    return ("library",)


def refusal(capability: tuple[int, int], name: str) -> str | None:
    """Why a GPU is not served, or None."""
    if capability >= OLDEST_GPU:
        return None
    found, needed = ".".join(map(str, capability)), ".".join(map(str, OLDEST_GPU))
    return f"{name} has compute capability {found}, and the Triton kernels need {needed} or newer"


@lru_cache(maxsize=1)
def _loaded() -> str | None:
    """Import what needs Triton; None, or why that fails."""
    try:
        _calls()
    except ImportError as error:
        return f"Triton does not load: {error}; `{INSTALL}`"
    return None


@lru_cache(maxsize=1)
def builds() -> str | None:
    """Why Triton cannot launch what it compiles, or None."""
    from fastbp.backends.triton import toolchain

    return toolchain.unable()


def _calls() -> ModuleType:
    from fastbp.backends.triton import calls

    return calls


def forward(config: Config, x: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """y and the residuals of the policy."""
    return _calls().forward(config, x, tensors)  # type: ignore[no-any-return]


def backward(
    config: Config,
    dy: Tensor,
    saved: Sequence[Tensor | None],
    needs: tuple[bool, ...],
    overwrite: bool = False,
    into: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """The gradients of the inputs, of every weight and of every bias; None where ``needs`` does not ask.

    With ``overwrite`` the residuals of policy preact are used up. ``into`` as in ``reference.backward``.
    """
    return _calls().backward(config, dy, saved, needs, overwrite, into)  # type: ignore[no-any-return]
