"""PyTorch's own functions and methods, told from what somebody put in their place before fastbp was imported.

What is put there later is seen by who compares with what ``stock`` found.
"""

from __future__ import annotations

import math
from functools import reduce
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_HOME = {"F": F, "math": math, "nn": nn, "torch": torch}
_C: Any = torch._C
_NATIVE = (_C._nn, _C._VariableFunctions, _C._special, math)
_ALIASES = {"__call__": "_wrapped_call_impl", "expit": "special_expit"}


class Replaced:
    """Stands for what PyTorch has under a name that is somebody else's now: nothing is equal to it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"fastbp: {self.name} was not PyTorch's own when fastbp was imported")


def stock(owner: Any, name: str) -> Any:
    """What PyTorch has under this name of a module or a class; a ``Replaced`` where it is somebody else's."""
    found = getattr(owner, name)
    if not isinstance(owner, type):
        mine = is_defined_in(found, name, "torch") or _is_native(found, name)
    else:
        owner = next(kind for kind in owner.__mro__ if name in kind.__dict__)
        path = owner.__module__, f"{owner.__name__}.{_ALIASES.get(name, name)}"
        mine = is_defined_in(found, name, "torch") and (found.__module__, found.__qualname__) == path
    return found if mine else Replaced(name)


def named(path: str) -> Any:
    """The same of a path such as ``F.gelu`` or ``math.pi``; what is no function is taken as it is."""
    home, *names = path.split(".")
    owner = reduce(getattr, names[:-1], _HOME[home])
    found = getattr(owner, names[-1])
    return stock(owner, names[-1]) if callable(found) else found


def own(paths: str) -> tuple[Any, ...]:
    """Those of the functions of some paths that are PyTorch's own."""
    return tuple(found for found in map(named, paths.split()) if not isinstance(found, Replaced))


def is_defined_in(function: Any, name: str, package: str) -> bool:
    """Whether a function has this name and was written in a file of the package, by what nobody sets in passing."""
    names = {function.__name__, function.__code__.co_name} if type(function) is FunctionType else {""}
    if names != {_ALIASES.get(name, name)}:  # a decorator's has another name than it shows
        return False
    module = function.__globals__.get("__name__", "")
    file, path = function.__code__.co_filename.replace("\\", "/"), module.replace(".", "/")
    return str(module).partition(".")[0] == package and file.endswith((f"/{path}.py", f"/{path}/__init__.py"))


def _is_native(function: Any, name: str) -> bool:
    name = _ALIASES.get(name, name)
    return type(function) is BuiltinFunctionType and any(getattr(place, name, None) is function for place in _NATIVE)
