"""Plain linears made into ones that read what their input was made of, and back: the object stays, its class changes.

A reader of nn.Linear is a ``fastbp.Linear``, one of transformers' Conv1D a Conv1D. Pickles and names are those of the
class that was found; copies read too.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastbp import linear, producers
from fastbp.casts import cast_weight
from fastbp.copies import shown_class, stock_copy, stock_reduce
from fastbp.linear import OUTCOME, READABLE_TENSORS, SETTINGS, Linear, Settings

BASE = "_fastbp_found"  # of a reader's class: the class that it was made of
_OWN = (SETTINGS, OUTCOME)


def reads(module: nn.Module) -> bool:
    """Whether a module reads in every call what its input was made of."""
    return (isinstance(module, Linear) or hasattr(type(module), BASE)) and module.__dict__.get(SETTINGS, ()) is not None


def base_of(module: nn.Module) -> type[nn.Module]:
    """The class that a linear was found with."""
    return getattr(type(module), BASE, type(module))


def reader_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class that plain linears of this class become; None for what is none."""
    if kind is nn.Linear:
        return ReadingLinear
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return _conv1d_reader(kind) if kind is conv1d else None


def swap_in(module: nn.Module, settings: Settings) -> None:
    """Make the linear read its input, or change the settings of one that does."""
    reader = reader_of(type(module))
    if reader is not None:
        module.__class__ = reader
    module.__dict__[SETTINGS] = settings


def swap_out(module: nn.Module) -> bool:
    """Make it what fuse found, and say whether there was something to do.

    Where others have made a class of their own of it since, as fully_shard does, theirs stays, and PyTorch computes.
    """
    for name in _OWN:
        module.__dict__.pop(name, None)
    base = base_of(module)
    if base is type(module):
        return False
    if type(module) is reader_of(base):
        module.__class__ = base
    else:
        module.__dict__[SETTINGS] = None
    return True


def _reduce(self: nn.Module, protocol: Any) -> Any:
    base = base_of(self)
    if type(self) is not reader_of(base):  # a class that others made of the reader
        return base.__reduce_ex__(self, protocol)
    return stock_reduce(self, base, protocol, _OWN)


def _copied(self: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    new = stock_copy(self, base_of(self), memo, _OWN)
    swap_in(new, self.__dict__.get(SETTINGS, ("auto", None)))
    return new


def _body(base: type[nn.Module]) -> dict[str, Any]:
    """What the class of a reader has besides its forward."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, BASE: base, "__class__": shown_class}
    return {**names, "__reduce_ex__": _reduce, "__copy__": _copied, "__deepcopy__": _copied}


ReadingLinear: type[Linear] = type("Linear", (Linear,), _body(nn.Linear))


def _product(h: Tensor, weight: Tensor, bias: Any) -> Tensor:
    """y as Conv1D computes it, y = x W + b with W (in, out); ``weight`` is its transposed."""
    y = torch.addmm(bias, h.view(-1, h.size(-1)), weight.mT)
    return y.view(*h.shape[:-1], y.size(-1))


@cache
def _conv1d_reader(base: type[nn.Module]) -> type[nn.Module]:
    stock: Any = base.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        if is_compiling() or base.forward is not stock:
            return base.forward(self, x)  # type: ignore[no-any-return]
        node = x.grad_fn if type(x) in READABLE_TENSORS else None
        if node is not None and producers.is_near(node):
            # Of the cast, where autocast makes one: that of a view would be made in every call.
            return linear.run(self, _product, x, node, cast_weight(self.weight).mT, self.bias)
        self.__dict__[OUTCOME] = None
        return stock(self, x)  # type: ignore[no-any-return]

    return type(base.__name__, (base,), {"forward": forward, **_body(base)})
