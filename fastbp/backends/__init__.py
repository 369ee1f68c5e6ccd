"""The backends in order of preference, and the choice among them with its reasons."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastbp.activations import nearest
from fastbp.backends import native, reference, triton
from fastbp.problem import Config, Problem, configure
from fastbp.saving import check_dtype

AUTO = "auto"
REFERENCE = "reference"

# Fastest first. A backend is a module with
#   supports(problem)                    the reason why not, or None
#   forward(config, x, tensors)          y and the residuals; tensors are the weights, then the biases or None
#   backward(config, dy, saved, needs, overwrite)
#                                        the gradients; saved is x, y, weights, biases, residuals, None where not kept;
#                                        overwrite says that z is nobody else's and dz may be written over it
#   CHECKS_TENSORS                       whether forward refuses every tensor that a call must refuse
#   ACCUMULATES                          whether backward takes one argument more, into: for each weight the float32
#                                        tensor to add its gradient to, or None; a backend without it does not
# One that is not there stands here as the reason.
BACKENDS: dict[str, ModuleType | str] = {
    "native": native.unavailable or native,
    "triton": triton.unavailable or triton,
    REFERENCE: reference,
}


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


def choose(config: Config, data: Tensor, tensors: Sequence[Tensor | None] = ()) -> Config:
    """The same call with the backend that serves it in place of ``auto``: the first that supports the problem.

    ``data`` is x or dy, ``tensors`` what else the call has. Tensor subclasses (sharded, quantised, fake, functional
    ones) know PyTorch's operations and no others, so only the reference, which is made of those, takes them.

    ValueError where the call names a backend that does not support it. Ending with the reference on a GPU warns once
    for each set of reasons.
    """
    for tensor in tensors:
        if type(tensor) not in _PLAIN_OR_NONE:
            return _choose_for_subclass(config, data, tensor)
    if type(data) not in _PLAIN:
        return _choose_for_subclass(config, data, data)
    try:
        return _chosen[config, data.device, data.dtype]
    except KeyError:
        check_dtype(config.save, data.dtype, f"fastbp.{config.form.name}")
        problem = Problem(config, data.device, data.dtype)
        choice = with_backend(config, _named(problem) or _first_that_supports(problem))
        _chosen[config, data.device, data.dtype] = choice
        return choice


_PLAIN = frozenset((Tensor, nn.Parameter, nn.Buffer))
_PLAIN_OR_NONE = _PLAIN | {type(None)}
_chosen: dict[tuple[Any, ...], Config] = {}  # grows with the settings a program uses, not with its calls


@lru_cache(maxsize=4096)
def choose_accumulating(config: Config, device: torch.device, dtype: torch.dtype) -> Config:
    """``choose`` for plain tensors, among the backends that add weight gradients to tensors of the caller's.

    The weights have been checked: none is of float64, which compressed policies do not serve either.
    """
    problem = Problem(config, device, dtype, accumulates=True)
    return with_backend(config, _named(problem) or _first_that_supports(problem))


def _choose_for_subclass(config: Config, data: Tensor, tensor: Tensor | None) -> Config:
    if isinstance(data, Tensor):  # what is none is refused with its name, by whoever looks at all arguments
        check_dtype(config.save, data.dtype, f"fastbp.{config.form.name}")
    if config.backend not in (AUTO, REFERENCE):
        raise ValueError(
            f"fastbp.{config.form.name}: backend {config.backend!r} takes plain tensors only, got a "
            f"{type(tensor).__name__}; backend='reference' takes it"
        )
    return with_backend(config, REFERENCE)


def _named(problem: Problem) -> str | None:
    """The backend that a call names, which must support it; None for ``auto``."""
    config = problem.config
    if config.backend == AUTO:
        return None
    reason = _reason(module_of(config), problem)
    if reason:
        raise ValueError(f"fastbp.{config.form.name}: backend {config.backend!r} cannot take this call: {reason}")
    return config.backend


def _reason(module: ModuleType, problem: Problem) -> str | None:
    """Why a backend that is there cannot serve the problem, or None."""
    if problem.accumulates and not getattr(module, "ACCUMULATES", False):
        return "it does not add weight gradients to main_grad; leave out the backend or gradient_accumulation_fusion"
    return module.supports(problem)  # type: ignore[no-any-return]


def module_of(config: Config) -> ModuleType:
    """The backend that a config names, once it is chosen."""
    entry = BACKENDS.get(config.backend)
    if isinstance(entry, ModuleType):
        return entry
    raise ValueError(
        f"fastbp.autograd: the config of a Function must name a backend, got {config.backend!r} in {config}"
    )


@lru_cache(maxsize=4096)
def with_backend(config: Config, backend: str) -> Config:
    """The same config with another backend."""
    return configure(*config.names[:-1], backend)


_warned: set[str] = set()


def _first_that_supports(problem: Problem) -> str:
    reasons: list[str] = []
    for name, entry in BACKENDS.items():
        reason = entry if isinstance(entry, str) else _reason(entry, problem)
        if reason is None:
            if name == REFERENCE and problem.device.type == "cuda":
                _warn_once("; ".join(reasons))
            return name
        reasons.append(f"{name}: {reason}")
    raise AssertionError("the reference backend supports everything")


def _warn_once(reasons: str) -> None:
    if reasons not in _warned:
        _warned.add(reasons)
        warnings.warn(f"fastbp runs plain PyTorch on this GPU, because {reasons}", RuntimeWarning, stacklevel=4)
