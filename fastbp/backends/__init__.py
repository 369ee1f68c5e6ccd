"""The backends in order of preference, and the choice among them with its reasons."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from fastbp import reference
from fastbp.activations import nearest
from fastbp.problem import Config, Problem, describe

# Fastest first. A backend is a module with supports(problem) -> reason or None, forward and backward; one that is not
# there stands here as the reason.
BACKENDS: dict[str, ModuleType | str] = {
    "native": "this version has no C++ or CUDA kernels",
    "triton": "this version has no Triton kernels, only their activations",
    "reference": reference,
}
AUTO = "auto"


def available_backends() -> dict[str, str]:
    """Each backend, fastest first: ``"available"``, or why it is not."""
    return {name: entry if isinstance(entry, str) else "available" for name, entry in BACKENDS.items()}


def check_name(backend: object, where: str) -> str:
    """The name of a backend that is there, or ``auto`` for None; ValueError or TypeError otherwise."""
    if backend is None:
        return AUTO
    if not isinstance(backend, str):
        raise TypeError(f"{where}: backend must be a name or None, got {type(backend).__name__} {backend!r}")
    if backend == AUTO:
        return AUTO
    known = [AUTO, *BACKENDS]
    if backend not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {backend!r};{nearest(backend, known)} there are {', '.join(known)}")
    entry = BACKENDS[backend]
    if isinstance(entry, str):
        here = [name for name, other in BACKENDS.items() if not isinstance(other, str)]
        raise ValueError(f"{where}: backend {backend!r} is not available: {entry}; available: {', '.join(here)}")
    return backend


def choose(config: Config, x: Tensor, weights: Sequence[Any], biases: Sequence[Any]) -> ModuleType:
    """The backend that serves this call: the one named, or the first that supports the problem.

    ValueError where the one named does not support it. Ending with the reference on a GPU warns once for each set of
    reasons.
    """
    named = None if config.backend == AUTO else BACKENDS[config.backend]
    if named is reference:
        return reference
    if named is None and x.device.type == "cpu" and _ONLY_REFERENCE:
        return reference
    problem = describe(config, x, weights, biases)
    if isinstance(named, ModuleType):
        reason = named.supports(problem)
        if reason:
            raise ValueError(f"fastbp.{config.form.name}: backend {config.backend!r} cannot take this call: {reason}")
        return named
    return _first_that_supports(problem)


_ONLY_REFERENCE = all(isinstance(entry, str) or entry is reference for entry in BACKENDS.values())
_warned: set[str] = set()


def _first_that_supports(problem: Problem) -> ModuleType:
    reasons: list[str] = []
    for name, entry in BACKENDS.items():
        reason = entry if isinstance(entry, str) else entry.supports(problem)
        if reason is None and isinstance(entry, ModuleType):
            if entry is reference and problem.device.type == "cuda":
                _warn_once("; ".join(reasons))
            return entry
        reasons.append(f"{name}: {reason}")
    raise AssertionError("the reference backend supports everything")


def _warn_once(reasons: str) -> None:
    if reasons not in _warned:
        _warned.add(reasons)
        warnings.warn(f"fastbp runs plain PyTorch on this GPU, because {reasons}", RuntimeWarning, stacklevel=4)
