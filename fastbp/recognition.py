"""From what a user passes as an activation to its row: a name, PyTorch's module or function, or a stranger's."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fastbp.activations import ROWS, TABLE, Activation, Bound, bind, nearest
from fastbp.copies import base_of

_DEFAULTS = {name: bind(name) for name in ROWS}
_BY_FUNCTION = {function: row for row in TABLE for function in row.functions}
_BY_MODULE: dict[type[nn.Module], list[Activation]] = {}
for _row in TABLE:
    if _row.module is not None:
        _BY_MODULE.setdefault(_row.module, []).append(_row)


def resolve(activation: Any, where: str = "fastbp") -> Bound:
    """The row and parameters that a name, an ``nn.Module`` or a function stands for.

    A module or function that is not in the table is evaluated on a grid and taken for the activation it computes.
    Raises ValueError where it computes none of them, TypeError where it is no activation at all; ``where`` begins the
    message.
    """
    if isinstance(activation, str):
        bound = _DEFAULTS.get(activation)
        if bound is None:
            names = list(ROWS)
            raise ValueError(
                f"{where}: unknown activation {activation!r};{nearest(activation, names)} known: {', '.join(names)}"
            )
        return bound
    if isinstance(activation, Bound):
        return activation
    if isinstance(activation, nn.Module):
        return _resolve_module(activation, where)
    if isinstance(activation, type):
        name = activation.__name__
        raise TypeError(
            f"{where}: activation must be a name, an nn.Module or a function, got the class {name}; try {name}()"
        )
    if callable(activation):
        return _resolve_function(activation, where)
    raise TypeError(
        f"{where}: activation must be a name, an nn.Module or a function, got {type(activation).__name__} "
        f"{activation!r}; use 'identity' for none"
    )


def _checked(row: Activation, params: tuple[Any, ...], where: str) -> Bound:
    try:
        values = tuple(float(p) for p in params)
    except (TypeError, ValueError):
        raise TypeError(f"{where}: the parameters of {row.name} must be numbers, got {params!r}") from None
    reason = row.invalid(*values) if all(math.isfinite(v) for v in values) else f"parameters must be finite: {values}"
    if reason:
        raise ValueError(f"{where}: {row.name}: {reason}")
    return Bound(row, values)


def _resolve_module(module: nn.Module, where: str) -> Bound:
    name = type(module).__name__
    state = [n for n, _ in (*module.named_parameters(), *module.named_buffers())]
    if state:
        raise ValueError(
            f"{where}: activation {name} has parameters or buffers of its own ({', '.join(state)}), which a fused "
            "kernel would not train; apply it after a plain layer instead"
        )
    if any(has_hooks(m) for m in module.modules()):
        raise ValueError(
            f"{where}: activation {name} has hooks or a forward of its own that a fused kernel would not run"
        )
    return of_known_module(module, where) or _recognised_module(module, name, where)


def _recognised_module(module: nn.Module, name: str, where: str) -> Bound:
    """By its values, which must be the same in training and evaluating."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        found = [_recognised(module.train(training), name, where) for training in (True, False)]
    finally:
        for m, training in modes:
            m.training = training
    if found[0] != found[1]:
        raise ValueError(
            f"{where}: activation {name} computes {found[0]!r} in training and {found[1]!r} in evaluating; apply it "
            "after a plain layer"
        )
    return found[0]


def of_known_module(module: nn.Module, where: str = "fastbp") -> Bound | None:
    """The activation of one of PyTorch's activation modules, by its class and attributes; None for other modules."""
    for row in _BY_MODULE.get(base_of(module), ()):
        if all(getattr(module, k) == v for k, v in row.module_attributes):
            return _checked(row, tuple(getattr(module, n) for n, _ in row.params), where)
    return None


def of_known_call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Bound | None:
    """The activation of a call of one of PyTorch's activation functions, by its arguments after the input.

    None for other functions, and for arguments that are no numbers or mean no activation. ``inplace`` is passed over.
    """
    if not is_known_function(function):
        return None
    try:
        names = list(inspect.signature(function).parameters)[1:]
    except ValueError:  # a builtin: its arguments are the row's parameters
        names = [name for name, _ in _BY_FUNCTION[function].params]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(args) > len(names) or not {int, float, str, bool}.issuperset(map(type, given.values())):
        return None
    try:
        return of_known_function(function, given)
    except (TypeError, ValueError):
        return None


def _resolve_function(function: Callable[..., Tensor], where: str) -> Bound:
    if isinstance(function, Hashable) and function in _DEFAULT_FUNCTIONS:
        return _DEFAULT_FUNCTIONS[function]
    if isinstance(function, functools.partial) and not function.args:
        bound = of_known_function(function.func, function.keywords, where)
        if bound is not None:
            return bound
    return _recognised(function, getattr(function, "__name__", repr(function)), where)


def of_known_function(function: object, keywords: Mapping[str, Any], where: str = "fastbp") -> Bound | None:
    """The activation of one of PyTorch's functions called with these keywords; None for other functions or keywords."""
    if not is_known_function(function) or not _takes(function, tuple(keywords)):
        return None
    row = _BY_FUNCTION[function]
    # Rows of one module class differ in an attribute, which is the function's keyword too.
    attributes = {k: keywords.get(k, v) for k, v in row.module_attributes}
    found = next((r for r in TABLE if r.module is row.module and dict(r.module_attributes) == attributes), None)
    rest = {k: v for k, v in keywords.items() if k not in attributes and k != "inplace"}
    if found is None or not set(rest) <= {n for n, _ in found.params}:
        return None
    return _checked(found, tuple(rest.get(n, default) for n, default in found.params), where)


def is_known_function(function: object) -> TypeGuard[Callable[..., Tensor]]:
    """Whether this is one of PyTorch's activation functions, as they were when fastbp was imported."""
    return callable(function) and isinstance(function, Hashable) and function in _BY_FUNCTION


@functools.lru_cache(maxsize=256)
def _takes(function: Callable[..., Tensor], keywords: tuple[str, ...]) -> bool:
    """Whether a function of the table has these keywords."""
    try:
        inspect.signature(function).bind(None, **dict.fromkeys(keywords))
    except ValueError:  # a function of C++, none of which works in place on request
        return "inplace" not in keywords
    except TypeError:
        return False
    return True


_DEFAULT_FUNCTIONS = {function: _DEFAULTS[row.name] for function, row in _BY_FUNCTION.items()}


def _recognised(function: Callable[..., Tensor], name: str, where: str) -> Bound:
    bound = recognise(function)
    if bound is None:
        raise ValueError(
            f"{where}: activation {name} computes none of the known activations; use one of {', '.join(ROWS)}, or "
            "apply it after a plain layer"
        )
    return bound


def recognise(function: Callable[..., Any]) -> Bound | None:
    """The activation, with default parameters, that a function computes, by its values and gradients on a float64 grid.

    None where there is none: where it fails on the grid, is not elementwise, or answers differently when asked twice.
    """
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        # The points miss the kinks, where implementations differ in their gradient. Far out is where clamps show.
        grid = torch.cat(
            [torch.linspace(-12.01, 12.02, 480), torch.tensor([-601.0, -101.0, -30.0, 30.0, 101.0, 601.0])]
        )
        z = grid.double()
        try:
            y, slope = _value_and_slope(function, z)
            again = function(z.flip(0).view(2, -1)).reshape(-1).flip(0)
        except Exception:  # whatever a stranger's function raises, it is not one of ours
            return None
        if y.shape != z.shape or y.dtype != z.dtype or not _close(y, again, 1e-12):
            return None
        for bound in _DEFAULTS.values():
            row, dy = bound.row, torch.ones_like(z)
            # 1e-6: other libraries' constants are often float32; the closest pair here, the two GELUs, differ by 5e-4.
            if _close(y, row.value(z, *bound.params), 1e-6) and _close(slope, row.grad(dy, z, *bound.params), 1e-6):
                return bound
    return None


def _value_and_slope(function: Callable[..., Any], z: Tensor) -> tuple[Tensor, Tensor]:
    try:
        y, pullback, *_ = torch.func.vjp(lambda z: function(z.clone()), z)  # a clone, for what works in place
        (slope,) = pullback(torch.ones_like(z))
    except RuntimeError:  # an autograd.Function of the old kind, which torch.func does not take
        z = z.detach().requires_grad_()
        y = function(z.clone())
        (slope,) = torch.autograd.grad(y, z, torch.ones_like(z))
    return y.detach(), slope


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling this module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
