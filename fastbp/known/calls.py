"""One fused call on children of a module: what it needs of them, asked at each call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._C import _is_any_autocast_enabled as any_autocast
from torch.compiler import is_compiling
from torch.nn.modules.dropout import Dropout
from torch.nn.modules.linear import Identity
from torch.nn.modules.linear import Linear as StockLinear

from fastbp import functional, saving, sharding
from fastbp.activations import Bound
from fastbp.casts import cast_all, cast_weight
from fastbp.copies import base_of
from fastbp.foreign import CONV1D, foreign, has_own_forward, imported
from fastbp.forms import Form
from fastbp.known_acts import KnownAct, WrittenAct
from fastbp.linear import Linear
from fastbp.modules import PLAIN_TENSORS, plain_parts
from fastbp.problem import DTYPES, check
from fastbp.recognition import has_hooks
from fastbp.stock import stock

Parts = tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]

_LINEAR = stock(F, "linear"), stock(StockLinear, "forward"), Linear.forward
_IDLE = stock(F, "dropout"), stock(Dropout, "forward"), stock(Identity, "forward")


@dataclass(frozen=True, eq=False)
class Transposed:
    """The class of transformers' Conv1D, whose weight is (in, out)."""

    kind: type[nn.Module]
    found: tuple[Any, ...]

    @staticmethod
    def look(kind: Any) -> tuple[Any, ...]:
        """What a call of the class runs."""
        return kind.forward, kind.__call__, torch.addmm

    def parts(self, linears: Sequence[nn.Module | None]) -> Parts | None:
        """The weights as (out, in), cast where autocast is on, and the biases, if all are of the class and plain."""
        if self.look(self.kind) != self.found or plain_parts(()) is None:
            return None
        weights: tuple[Any, ...] = ()
        biases: tuple[Any, ...] = ()
        for linear in linears:
            if linear is None or base_of(linear) is not self.kind or has_hooks(linear):
                return None
            weight: Any = linear.weight
            if type(weight) not in PLAIN_TENSORS:
                return None
            if linear.bias is None or linear.nf != weight.shape[1]:
                return None  # its own forward raises
            weights, biases = (*weights, cast_weight(weight).mT), (*biases, linear.bias)
        return weights, biases


def transposed() -> Transposed | None:
    """transformers' Conv1D, where somebody has imported it."""
    kind = imported(CONV1D)
    own = kind is not None and has_own_forward(kind)
    rest = stock(nn.Module, "__call__"), stock(torch, "addmm")
    return Transposed(kind, (kind.forward, *rest)) if own else None


def may_idle(child: nn.Module | None) -> bool:
    """Whether a child is of a kind that can be idle."""
    return base_of(child) in (Identity, Dropout)


def is_idle(child: nn.Module | None, x: Any) -> bool:
    """Whether a child hands on the tensor x: an nn.Identity, or a dropout that does not drop now."""
    if child is None or not may_idle(child) or has_hooks(child) or not isinstance(x, (Tensor, fx.Proxy)):
        return False
    now = F.dropout, Dropout.forward, Identity.forward
    if now != _IDLE or not isinstance(child, Dropout):
        return now == _IDLE
    p = child.p
    drops = child.training or type(x) is fx.Proxy  # a graph drops when its module trains
    return type(p) in (int, float) and (p == 0 or (not drops and 0 <= p <= 1))


def _calls_now() -> tuple[Any, ...]:
    """How modules are called, and how they find their attributes."""
    module, kinds = nn.Module, (StockLinear.__call__, Linear.__call__, Dropout.__call__, Identity.__call__)
    return module.__call__, module._call_impl, module.__getattr__, *kinds


_CALLS = tuple(stock(nn.Module, name) for name in ("__call__", "_call_impl", "__getattr__", *["__call__"] * 4))


def _is_wide(x: Any) -> bool:
    return getattr(x, "dtype", None) is torch.float64


@dataclass(frozen=True, eq=False)
class FusedCall:
    """Children of a module as one fused call."""

    form: Form
    linears: tuple[str, ...]
    activation: Bound
    acts: tuple[tuple[str, KnownAct], ...]  # the children that are the activation; none where a function is
    idle: tuple[str, ...]  # the children that have to be idle
    transposed: Transposed | None
    written: tuple[WrittenAct, ...] = ()  # functions that are the activation

    @property
    def words(self) -> tuple[tuple[str, ...], str]:
        """The names of the linears, and the call."""
        return self.linears, f"{self.form.name}, {self.activation!r}"

    def refuses(self, save: str) -> str | None:
        """Why a policy cannot serve, or None."""
        return None if save == "auto" else saving.POLICIES[save].illegal(self.activation, self.form)

    def run(self, children: Mapping[str, nn.Module | None], x: Any, save: str, backend: str | None) -> Tensor | None:
        """y, or None where children, tensors or surroundings are not what the call needs."""
        for name, act in self.acts:
            if not act.holds(children.get(name)) or (act.narrow and _is_wide(x)):
                return None
        for written in self.written:
            if written.narrow and _is_wide(x):
                return None
        for name in self.idle:
            if not is_idle(children.get(name), x):
                return None
        if (F.linear, StockLinear.forward, Linear.forward) != _LINEAR:
            return None
        if not is_compiling() and type(x) is not fx.Proxy and _calls_now() != _CALLS:
            return None  # somebody watches every call, who is none of PyTorch's tracers
        on_mesh = type(x) not in PLAIN_TENSORS
        linears: Any = [children.get(name) for name in self.linears]
        parts = self.transposed.parts(linears) if self.transposed else plain_parts(linears, on_mesh)
        if parts is None or (on_mesh and not sharding.applies(x, (*parts[0], *parts[1]))):
            return None
        if not _only_known_modes() or (any_autocast() and self._widened):
            return None
        try:
            return functional.call(self.form, x, *parts, self.activation, save, backend)
        except (TypeError, ValueError):
            try:
                check(self.form, *_as_autocast(x, *parts))
            except (TypeError, ValueError):
                return None  # PyTorch speaks, of a call that is wrong or that only it can make
            raise

    @property
    def _widened(self) -> bool:
        """Whether under autocast PyTorch gives the result in float32, where fastbp gives it as a linear does."""
        spelled = any(act.spelled for act in self.written) or any(act.spelled for _, act in self.acts)
        return not self.form.projected and (self.activation.name == "softplus" or spelled)


# A default device, and what torch.export watches with: they leave the functions that are called as they are.
_MODES = frozenset(("torch.utils._device", "torch._export.non_strict_utils", "torch.fx.experimental.proxy_tensor"))


def _as_autocast(x: Tensor, weights: tuple[Any, ...], biases: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """The tensors of a call as it sees them."""
    device = x.device.type
    if any_autocast() and torch.is_autocast_enabled(device):
        x, *cast = cast_all((x, *weights, *biases), torch.get_autocast_dtype(device), device)
        weights, biases = tuple(cast[: len(weights)]), tuple(cast[len(weights) :])
    return x, weights, biases


def _only_known_modes() -> bool:
    """Whether no mode looks at the functions that are called, but for some of PyTorch's own."""
    for i in range(torch._C._len_torch_function_stack()):
        mode = type(torch._C._get_function_stack_at(i))
        if mode.__module__ not in _MODES and not getattr(mode, "only_watches", False):
            return False
    return True


def looks_linear(child: nn.Module | None) -> bool:
    """Whether a child is a linear layer, or what somebody put around one."""
    like = hasattr(child, "in_features") and hasattr(child, "out_features")
    return isinstance(child, StockLinear) or like or (child is not None and foreign(base_of(child)) is not None)


def make_call(
    form: Form,
    children: Mapping[str, nn.Module | None],
    names: Sequence[str],
    activation: Bound,
    acts: tuple[tuple[str, KnownAct], ...],
    idle: tuple[str, ...],
    written: tuple[WrittenAct, ...] = (),
) -> FusedCall | str:
    linears: Any = [children[name] for name in names]
    kind = transposed()
    parts = plain_parts(linears, on_mesh=True)
    if parts is None and kind is not None:
        parts = kind.parts(linears)
    else:
        kind = None
    if parts is None:
        return f"{', '.join(names)} are not all plain nn.Linears (a subclass, hooks, or a wrapped weight)"
    kinds = {(t.dtype, t.device, t.layout) for t in (*parts[0], *parts[1]) if t is not None}
    if len(kinds) > 1 or kinds.pop()[0] not in DTYPES or parts[0][0].layout is not torch.strided:
        return "its weights are on several devices, of several dtypes, or no dense floating-point numbers"
    return FusedCall(form, tuple(names), activation, acts, idle, kind, written)
