"""The backends in order of preference, and the choice among them with its reasons."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastbp import cache
from fastbp.activations import nearest
from fastbp.backends import measured, native, reference, triton
from fastbp.backends.measured import EAGER, Choice
from fastbp.problem import Config, Problem, configure
from fastbp.saving import check_dtype

AUTO = "auto"
REFERENCE = "reference"

# Fastest first. A backend is a module with
#   supports(problem)                    the reason why not, or None
#   forward(config, x, tensors)          y and the residuals; tensors are the inputs after x, the weights, then the
#                                        biases or None
#   backward(config, dy, saved, needs, overwrite)
#                                        the gradients; saved is the inputs, y, weights, biases, residuals, None where
#                                        not kept;
#                                        overwrite says that z is nobody else's and dz may be written over it
#   identity(device)                     in words, what a measurement of it depends on besides the device
#   routes(problem, rows)                the ways to compute that a call may ask for by its config, beside its own rule
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


def choose(
    config: Config, data: Tensor, tensors: Sequence[Tensor | None] = (), weights: Sequence[Tensor] = ()
) -> Config:
    """The same call with the backend that serves it in place of ``auto``.

    That is the fastest where calls of these sizes were measured on this machine (``measured``), else the first that
    supports the problem. ``data`` is x or dy, ``tensors`` what else the call has, its ``weights`` among them.

    Tensor subclasses (sharded, quantised, fake, functional ones) know PyTorch's operations and no others, so only the
    reference, which is made of those, takes them.

    ValueError where the call names a backend that does not support it. Ending with the reference on a GPU warns once
    for each set of reasons.
    """
    return choose_settled(config, lambda given: given, data, tensors, weights)


def choose_settled(
    settings: Any,
    settle: Callable[[Any], Config],
    data: Tensor,
    tensors: Sequence[Tensor | None],
    weights: Sequence[Tensor],
) -> Config:
    """``choose`` for the config that ``settle`` makes of settings, asked for where those were not seen yet."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN_OR_NONE:
            return _choose_for_subclass(settle(settings), data, tensor)
    if type(data) not in _PLAIN:
        return _choose_for_subclass(settle(settings), data, data)
    try:
        choice = _chosen[settings, data.device, data.dtype]
    except (KeyError, TypeError):  # TypeError: not hashable, and so about to be refused
        choice = _chosen[settings, data.device, data.dtype] = _chosen_for(settle(settings), data.device, data.dtype)
    return choice if type(choice) is Config else choice(data, tensors, weights)  # type: ignore[operator]


def _chosen_for(config: Config, device: torch.device, dtype: torch.dtype) -> Config | BySizes:
    choice = _chosen.get((config, device, dtype))
    if choice is None:
        check_dtype(config.save, dtype, config.form)
        choice = _chosen[config, device, dtype] = _find(Problem(config, device, dtype))
    return choice


_PLAIN = frozenset((Tensor, nn.Parameter, nn.Buffer))
_PLAIN_OR_NONE = _PLAIN | {type(None)}
BySizes = Callable[[Tensor, Sequence[Tensor | None], Sequence[Tensor]], Config]
Table = dict[tuple[Any, ...], Config | BySizes]  # by config or what it is made of, device and dtype
_chosen: Table = {}  # grows with the settings a program uses, not with its calls
_watcher: Callable[[Config, Tensor, Sequence[Tensor | None]], None] | None = None


def _find(problem: Problem) -> Config | BySizes:
    """What ``choose`` gives for a problem, or what gives it by the sizes of the call."""
    config = problem.config
    named = _named(problem)
    unmeasured = with_choice(config, Choice(named or _first_that_supports(problem)))
    if _watcher is not None:
        return _watched(_watcher, config, unmeasured)
    if named is not None:
        return unmeasured
    found = measured.recall(measured.subject_of(config, problem.dtype), environment(problem.device))
    usable = {sizes: with_choice(config, choice) for sizes, choice in found.items() if _is_there(choice, problem)}
    return measured.by_sizes(unmeasured, usable) if usable else unmeasured


def _is_there(choice: Choice, problem: Problem) -> bool:
    """Whether a remembered choice can be taken: the cache is a file, and anybody may have written into it."""
    if choice == (EAGER, ""):
        return True
    entry = BACKENDS.get(choice.backend)
    if not isinstance(entry, ModuleType) or refusal(entry, problem):
        return False
    return not choice.route or choice.route in entry.routes(problem, None)


def _watched(
    watcher: Callable[[Config, Tensor, Sequence[Tensor | None]], None], config: Config, unmeasured: Config
) -> BySizes:
    def choice(data: Tensor, tensors: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Config:
        if tensors and tensors[config.form.inputs - 1] is weights[0]:  # the forward call: a backward one has all inputs
            watcher(config, data, tensors)
        return unmeasured

    return choice


@contextmanager
def watching(watcher: Callable[[Config, Tensor, Sequence[Tensor | None]], None]) -> Iterator[None]:
    """Tell ``watcher`` of every call meanwhile: its config, x, and its other tensors. What was measured is not
    used, so that a call takes what it would without."""
    global _watcher
    _watcher = watcher
    _chosen.clear()
    try:
        yield
    finally:
        _watcher = None
        _chosen.clear()


def environment(device: torch.device) -> measured.Environment:
    """What a measurement on this device belongs to."""
    if device.type == "cuda":
        facts = cache.gpu_facts(device)
    else:
        facts = {"device": measured.cpu_facts().get("model name", "unknown")}
    threads = [("threads", str(torch.get_num_threads()))] if device.type == "cpu" else []
    kernels = [(key, e if isinstance(e, str) else e.identity(device)) for key, e in BACKENDS.items()]
    return (*facts.items(), ("torch", torch.__version__), *threads, *kernels)


def remember(device: torch.device, problem: str, entry: dict[str, Any]) -> bool:
    """``measured.remember`` for this device; calls take it from now on."""
    written = measured.remember(environment(device), problem, entry)
    forget()
    return written


def choose_from(table: Table) -> None:
    """Let calls take what this table says, and note in it what it does not: to measure choices beside each other."""
    global _chosen
    _chosen = table


def forget() -> None:
    """Look again at what was measured."""
    measured.forget()
    _chosen.clear()


@lru_cache(maxsize=4096)
def choose_accumulating(config: Config, device: torch.device, dtype: torch.dtype) -> Config:
    """``choose`` for plain tensors, among the backends that add weight gradients to tensors of the caller's.

    The weights have been checked: none is of float64, which compressed policies do not serve either.
    """
    problem = Problem(config, device, dtype, accumulates=True)
    return with_backend(config, _named(problem) or _first_that_supports(problem))


def _choose_for_subclass(config: Config, data: Tensor, tensor: Tensor | None) -> Config:
    if isinstance(data, Tensor):  # what is none is refused with its name, by whoever looks at all arguments
        check_dtype(config.save, data.dtype, config.form)
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
    reason = refusal(module_of(config), problem)
    if reason:
        raise ValueError(f"fastbp.{config.form.name}: backend {config.backend!r} cannot take this call: {reason}")
    return config.backend


def refusal(module: ModuleType, problem: Problem) -> str | None:
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
    """The same config with another backend, which computes by its own rule."""
    return configure(*config.names[:-1], backend)


@lru_cache(maxsize=4096)
def with_choice(config: Config, choice: Choice) -> Config:
    """The same config with a backend and its way of computing."""
    chosen = with_backend(config, choice.backend)
    return replace(chosen, route=choice.route) if choice.route else chosen


_warned: set[str] = set()


def _first_that_supports(problem: Problem) -> str:
    reasons: list[str] = []
    for name, entry in BACKENDS.items():
        reason = entry if isinstance(entry, str) else refusal(entry, problem)
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
