"""Modules whose class is changed for one that keeps less for backward, and back: the object stays what it is.

nn.Linear and what transformers has in its place (Conv1D, FalconLinear) read what their input was made of. A dropout
keeps a byte a number of its mask. An activation written in several operations keeps z alone, and most take less time
on a CPU. Pickles and names are those of the class that was found; copies are changed as the module is.
"""

from __future__ import annotations

import functools
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled, nn
from torch._C import _is_any_autocast_enabled as any_autocast
from torch._C import _is_tracing as is_tracing
from torch.compiler import is_compiling
from torch.nn.modules.dropout import Dropout
from torch.nn.modules.linear import Linear as StockLinear

from fastbp import elementwise, linear, producers
from fastbp.copies import BASE, base_of, can_derive, derived_copy, shown_class, stock_copy, stock_reduce, stock_twin
from fastbp.foreign import Foreign, foreign, has_own_forward
from fastbp.known_acts import KnownAct, read_act
from fastbp.linear import OUTCOME, READABLE_TENSORS, SETTINGS, Linear, Settings
from fastbp.problem import DTYPES
from fastbp.settings import defaults
from fastbp.stock import stock

_ACT = "_fastbp_activation"  # of a module's __dict__: the activation that it was read as
_OWN = (SETTINGS, OUTCOME, _ACT)


def is_linear(module: nn.Module) -> bool:
    """Whether a module reads in every call what its input was made of, or can be made to."""
    kind = base_of(module)
    return isinstance(module, Linear) or kind is StockLinear or foreign(kind) is not None


def reads(module: nn.Module) -> bool:
    """Whether a linear reads in every call what its input was made of."""
    swapped = isinstance(module, Linear) or (hasattr(type(module), BASE) and foreign(base_of(module)) is not None)
    return swapped and module.__dict__.get(SETTINGS, ()) is not None


def swap_in(module: nn.Module, settings: Settings) -> None:
    """Let a module of a kind that is known here keep less, or change the settings of a linear that does."""
    reader, act = _reader_for(module)
    if reader is not None and type(module) is not reader:
        module.__class__ = reader
    if act is not None:
        module.__dict__[_ACT] = act
    if reader is not None or is_linear(module):
        module.__dict__[SETTINGS] = settings


def swap_out(module: nn.Module) -> bool:
    """Make it what fuse found, and say whether there was something to do.

    Where others have made a class of their own of it since, as fully_shard does, theirs stays, and PyTorch computes.
    """
    for name in _OWN:
        module.__dict__.pop(name, None)
    base: Any = base_of(module)
    if base is type(module):
        return False
    made: Any = type(module).__dict__.get(BASE)
    if made is base:
        module.__class__ = base
    else:
        module.__dict__[SETTINGS] = None
    return True


def _reader_for(module: nn.Module) -> tuple[type[nn.Module] | None, KnownAct | None]:
    """The class that serves a module, and what it is read as if it is an activation; None for what is left alone."""
    kind: Any = base_of(module)
    if kind is StockLinear:
        return ReadingLinear, None
    if kind is Dropout:
        return ThriftyDropout, None
    known = foreign(kind)
    if known is not None:
        own = has_own_forward(kind) or hasattr(type(module), BASE)
        return (_foreign_reader(kind, known) if own else None), None
    act = None if next(module.children(), None) or not can_derive(kind) else read_act(module)
    if isinstance(act, KnownAct) and not act.writes and (act.spelled or act.activation.row.cpu_pass):
        return (_thrifty_activation if act.spelled else _faster_activation)(kind), act
    return None, None


def _reduce(self: Any, protocol: Any) -> Any:
    base: Any = base_of(self)
    made: Any = type(self).__dict__.get(BASE)
    if made is not base:  # a class that others made of it
        return base.__reduce_ex__(self, protocol)
    return stock_reduce(self, base, protocol, _OWN)


_PREPARE = "__prepare_scriptable__"


def _scriptable(self: Any) -> Any:
    """What ``torch.jit.script`` compiles in its place: the module as it came."""
    return stock_twin(self, base_of(self), _OWN)


def _copied(self: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    made: Any = type(self).__dict__.get(BASE)
    if made is None:
        return derived_copy(self, memo)  # type: ignore[no-any-return]
    new: nn.Module = stock_copy(self, base_of(self), memo, _OWN)
    swap_in(new, self.__dict__.get(SETTINGS) or ("auto", None))
    return new


def _body(base: type[nn.Module]) -> dict[str, Any]:
    """What a class has besides its forward."""
    names: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        BASE: base,
        "__class__": shown_class,
    }
    if not hasattr(base, _PREPARE):
        names[_PREPARE] = _scriptable
    return {**names, "__reduce_ex__": _reduce, "__copy__": _copied, "__deepcopy__": _copied}


ReadingLinear: type[Linear] = type("Linear", (Linear,), _body(StockLinear))


@cache
def _foreign_reader(base: type[nn.Module], known: Foreign) -> type[nn.Module]:
    theirs: Any = base.forward

    @functools.wraps(theirs)  # what reads the signature sees the module's
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = base.forward is theirs and not is_compiling() and not (any_autocast() and not known.autocasts)
        if not own or kwargs or len(args) != 1:
            return base.forward(self, *args, **kwargs)
        (x,) = args
        node = x.grad_fn if type(x) in READABLE_TENSORS else None
        if node is not None and producers.is_near(node) and not is_tracing():
            latest = producers.is_latest(node)
            del node
            return linear.run(self, known.product, x, latest, known.weight(self), self.bias)
        self.__dict__[OUTCOME] = None
        return theirs(self, x)

    return type(base.__name__, (base,), {"forward": forward, **_body(base)})


def _is_recorded(x: Any) -> bool:
    """Whether what is done with x is recorded for backward."""
    return type(x) in READABLE_TENSORS and x.requires_grad and is_grad_enabled() and not is_inference_mode_enabled()


def _can_replace(x: Tensor, *, widened: bool) -> bool:
    """Whether an operation of ours may stand for a module's on x, seen by nobody.

    ``widened``: whether autocast has the module's operations give float32.
    """
    return (
        x.dtype in DTYPES
        and not x.is_nested
        and x.layout is torch.strided
        and not (x.requires_grad and x.is_inference())
        and not is_tracing()
        and not (widened and any_autocast())
        and linear.surroundings() is None
    )


_DROPOUT, _F_DROPOUT = stock(Dropout, "forward"), stock(F, "dropout")


def _drop(self: Any, input: Tensor) -> Any:
    p = self.p
    if not self.training or is_compiling() or Dropout.forward is not _DROPOUT or F.dropout is not _F_DROPOUT:
        return Dropout.forward(self, input)
    if self.inplace or not 0.0 < p < 1.0 or not _is_recorded(input) or not input.is_cpu:
        return Dropout.forward(self, input)  # on a GPU the mask is a byte a number already
    if linear.is_small(input, self.__dict__.get(SETTINGS) or linear.UNSET) or not _can_replace(input, widened=True):
        return Dropout.forward(self, input)
    return elementwise.dropped(input, p)


ThriftyDropout: type[nn.Module] = type("Dropout", (Dropout,), {"forward": _drop, **_body(Dropout)})


@cache
def _thrifty_activation(base: type[nn.Module]) -> type[nn.Module]:
    """A class for an activation that is written in several operations."""

    @functools.wraps(base.forward)  # what reads the signature sees the module's
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_compiling() or is_tracing() or kwargs or len(args) != 1:
            return base.forward(self, *args, **kwargs)
        (z,) = args
        own = self.__dict__
        if not _is_passed(own, z):
            small = type(z) in READABLE_TENSORS and linear.is_small(z, own.get(SETTINGS) or linear.UNSET)
            if small or not _is_recorded(z):
                return base.forward(self, z)
        return _activated(self, base, z)

    return type(base.__name__, (base,), {"forward": forward, **_body(base)})


@cache
def _faster_activation(base: type[nn.Module]) -> type[nn.Module]:
    """A class for an activation of which our own pass over z takes less time than PyTorch's."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen = is_compiling() or is_tracing()
        if seen or kwargs or len(args) != 1 or not _is_passed(self.__dict__, args[0]):
            return base.forward(self, *args, **kwargs)
        return _activated(self, base, args[0])

    return type(base.__name__, (base,), {"forward": forward, **_body(base)})


def _is_passed(own: dict[str, Any], z: Any) -> bool:
    """Whether our own pass over z is the faster one, of the activation in a module's ``__dict__``."""
    if type(z) is not Tensor or z.numel() < linear.size.fewest:  # first, for that is nearly all that small calls pay
        return False
    act: KnownAct | None = own.get(_ACT)
    return act is not None and z.layout is torch.strided and elementwise.is_faster(act.activation, _backend_of(own), z)


def _backend_of(own: dict[str, Any]) -> str | None:
    return (own.get(SETTINGS) or linear.UNSET)[1] or defaults.both[1]


def _activated(self: Any, base: Any, z: Tensor) -> Any:
    """f(z) by an operation of ours where that may stand for the module's."""
    act: KnownAct | None = self.__dict__.get(_ACT)
    fine = (
        act is not None
        and not getattr(self, "inplace", False)
        and _can_replace(z, widened=act.widened)
        and act.holds(self)
    )
    if not fine or (act.narrow and z.dtype is torch.float64):  # type: ignore[union-attr]
        return base.forward(self, z)
    return elementwise.activated(act.activation, _backend_of(self.__dict__), z)  # type: ignore[union-attr]
