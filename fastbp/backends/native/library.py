"""The shared library of C++ and CUDA kernels: where it is, whether it serves, and how a call is written for it.

``unavailable`` is None, or why there is no library to call: not built, not loadable, or built from other sources.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbp.activations import TABLE, Activation, rounded
from fastbp.forms import FORMS, Form
from fastbp.problem import Config, configure
from fastbp.saving import POLICIES
from fastbp.version import __version__, fingerprint

# FASTBP_NATIVE_LIBRARY names another build of the same sources: `make sanitize` uses it.
LIBRARY = Path(os.environ.get("FASTBP_NATIVE_LIBRARY") or Path(__file__).parents[2] / "_native.abi3.so")
SOURCES = Path(__file__).parents[3] / "csrc"  # there in a checkout, not in an installed package
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps"
OVERWRITE, _ROUTE, _GIVEN = 2048, 4096, 32768  # in a call's settings, csrc/ops.cpp
CUDA_ROUTES = ("library", "fused", "cublaslt")  # the order of csrc/cuda/route.h
_SAVES = tuple(POLICIES)  # the order of csrc/cpu/call.h


def rebuild_command(kernels: str = "cpu") -> str:
    """What to type to get the library that belongs to this package."""
    command = f"FASTBP_BUILD={kernels} {REBUILD}"
    return f"{command} -e {SOURCES.parent}" if SOURCES.is_dir() else f"{command} fastbp"


def load(library: Path = LIBRARY, sources: Path = SOURCES) -> str | None:
    """Load the library; None, or in a line why it cannot serve and what to do about it."""
    if not library.is_file():
        return f"the C++ kernels were not built; `{rebuild_command()}` builds them and says what is missing"
    try:
        torch.ops.load_library(library)
        info = ops().build_info()
    except (OSError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        return f"{library.name} does not load into torch {torch.__version__}: {reason}; `{rebuild_command()}`"
    version, built_from, *names = info.split()
    if version != __version__ or names != [row.name for row in TABLE]:
        return f"{library.name} belongs to fastbp {version}, and this is {__version__}; `{rebuild_command()}`"
    if sources.is_dir() and built_from != fingerprint(sources):
        return f"{library.name} was built from other sources than {sources.name}/ holds; `{rebuild_command()}`"
    try:
        capability()
    except RuntimeError as error:  # FASTBP_CPU_CAPABILITY names what this CPU does not have
        return str(error).strip().splitlines()[0]
    return None


def capability() -> str:
    """The instruction set that the loaded kernels use."""
    return ops().capability()  # type: ignore[no-any-return]


def ops() -> Any:
    """The ops of the library."""
    return torch.ops.fastbp_native


def cuda_architectures() -> str:
    """What the CUDA kernels are compiled for; empty where the library has none."""
    return ops().cuda_architectures() if hasattr(ops(), "cuda_architectures") else ""


@lru_cache(maxsize=1)
def cpu_routes() -> tuple[str, ...]:
    """The ways to compute of a CPU."""
    return tuple(ops().routes().split())


@lru_cache(maxsize=4096)
def codes(config: Config, dtype: torch.dtype, cuda: bool) -> tuple[int, list[float]]:
    """A config as the ops take it (csrc/ops.cpp), with the parameters as y of this dtype shows them."""
    params = rounded(config.params, dtype) if config.save == "output" and config.row.limits else config.params
    route = 1 + (CUDA_ROUTES if cuda else cpu_routes()).index(config.route) if config.route else 0
    return _code_of(config.form) + 4 * _SAVES.index(config.save) + 32 * TABLE.index(config.row) + _ROUTE * route, list(
        params
    )


def _code_of(form: Form) -> int:
    return form.gated + 2 * form.projected + _GIVEN * form.given


def decoded(settings: int) -> tuple[Form, str, Activation, str]:
    """Form, policy, activation and way of computing of a call, from what ``_codes`` makes of them on a CPU."""
    code = settings % 4 + (settings & _GIVEN)
    (form,) = [f for f in FORMS.values() if _code_of(f) == code]
    route = settings % _GIVEN // _ROUTE
    return (
        form,
        _SAVES[settings // 4 % 8],
        TABLE[settings % OVERWRITE // 32],
        cpu_routes()[route - 1] if 0 < route <= len(cpu_routes()) else "",
    )


def is_absent(tensor: Tensor) -> bool:
    """Whether it stands for none, as csrc/cpu/absent.h has it; of copies and fakes of ``ABSENT`` too."""
    return tensor.dtype is torch.bool and tensor.shape == ABSENT.shape


def config_of(settings: int, params: list[float]) -> Config:
    """The call that the ops were given, for PyTorch to compute."""
    form, save, row, _ = decoded(settings)
    return configure(form.name, row.name, tuple(params), save, "reference")


def present(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """None for what stands for it."""
    return [None if t is None or is_absent(t) else t for t in tensors]


unavailable = load()
if unavailable is None:
    ABSENT = ops().absent()  # what the ops take for None
    # Asked once and not by a call that is about to be refused.
    BUILT = " ".join(ops().build_info().split()[:2])
    CAPABILITY, ARCHITECTURES = capability(), cuda_architectures()
