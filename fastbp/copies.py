"""Copies and pickles of modules whose class was swapped for one of ours.

A pickle is what the class that the module came with would write, so that it loads without fastbp, and with
``weights_only`` where that class is allowed. A copy is made as that class makes it: ``__getstate__``, ``__setstate__``,
``__reduce__`` and their kin are asked.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from abc import ABCMeta
from collections.abc import Collection
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

_Module = TypeVar("_Module", bound=nn.Module)


BASE = "_fastbp_base"  # of a class that was put in place of a module's own: that one


def base_of(module: Any) -> Any:
    """The class that a module came with."""
    return getattr(type(module), BASE, type(module))


def can_derive(kind: type) -> bool:
    """Whether a class can be made of this one without anybody's code: neither its metaclass's nor of who registers
    classes made of his own."""
    plain = inspect.getattr_static(kind, "__init_subclass__") is inspect.getattr_static(object, "__init_subclass__")
    return type(kind) in (type, ABCMeta) and plain


class _Shown(threading.local):
    """The module that is being pickled, and the class that it is pickled as."""

    module: weakref.ref[nn.Module] | None = None
    base: type | None = None


_shown = _Shown()


def _get_class(module: nn.Module) -> type:
    if _shown.module is not None and _shown.module() is module:
        base, _shown.module, _shown.base = _shown.base, None, None
        assert base is not None
        return base
    return type(module)


# For the class that is put in place of a module's own. Pickle refuses to write a new object of another class than
# ``module.__class__``, which it reads right behind ``__reduce_ex__``: this one time the answer is the module's own.
# Setting it works as ever, for fully_shard does.
shown_class = property(_get_class, lambda module, kind: object.__dict__["__class__"].__set__(module, kind))


def stock_reduce(module: nn.Module, base: type[nn.Module], protocol: Any, leave_out: Collection[str] = ()) -> Any:
    """What ``__reduce_ex__`` of a ``base`` with the module's attributes returns, those in ``leave_out`` excepted.

    The module's class must have ``shown_class`` as its ``__class__``.
    """
    reduced = stock_twin(module, base, leave_out).__reduce_ex__(protocol)
    if not isinstance(reduced, str) and getattr(reduced[0], "__name__", "") in ("__newobj__", "__newobj_ex__"):
        _shown.module, _shown.base = weakref.ref(module), base
    return reduced


def stock_copy(
    module: nn.Module, base: type[_Module], memo: dict[int, Any] | None, leave_out: Collection[str] = ()
) -> _Module:
    """A copy of the module as a ``base``: shallow, or with a memo as of ``copy.deepcopy`` a deep one."""
    reduced = stock_twin(module, base, leave_out).__reduce_ex__(4)
    if isinstance(reduced, str):  # by its name: there is only one
        return module  # type: ignore[return-value]
    # Not copy.deepcopy of the stock twin: what refers to the module in its own attributes must find the copy.
    return copy._reconstruct(module, memo, *reduced)  # type: ignore[attr-defined, no-any-return]


def derived_copy(module: nn.Module, memo: dict[int, Any] | None) -> Any:
    """A copy of a module whose class others have derived of one of ours since: of that class, as if it had no method
    for copying. Of a parametrized module PyTorch allows a deep copy alone, of its attributes."""
    if memo is None or not is_parametrized(module):
        reduced: Any = object.__reduce_ex__(module, 4)
        return copy._reconstruct(module, memo, *reduced)  # type: ignore[attr-defined]
    replica = object.__new__(type(module))
    memo[id(module)] = replica
    replica.__dict__.update(copy.deepcopy(module.__dict__, memo))
    return replica


def stock_twin(module: nn.Module, base: type[_Module], leave_out: Collection[str]) -> _Module:
    """A ``base`` with the module's attributes."""
    twin = object.__new__(base)
    twin.__dict__.update({name: value for name, value in module.__dict__.items() if name not in leave_out})
    for kind in base.__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__") and hasattr(module, slot):
                object.__setattr__(twin, slot, getattr(module, slot))
    return twin
