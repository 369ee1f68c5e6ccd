"""``fastbp.Linear``: an nn.Linear that reads in each call what its input was made of, and keeps less for it.

What is not understood is computed by ``F.linear``, and the module's ``OUTCOME`` says why.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled, nn
from torch._C import _are_functorch_transforms_active as functorch_active
from torch._C import _is_any_autocast_enabled as any_autocast
from torch._C import _is_torch_function_mode_enabled as function_mode
from torch._C import _is_tracing as is_tracing
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C._autograd import _top_saved_tensors_default_hooks as top_hooks
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling
from torch.nn.modules.linear import Linear as StockLinear
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fastbp import producers, rebuilt
from fastbp.activations import NODES, Bound
from fastbp.backends import REFERENCE, choose_settled, with_backend
from fastbp.backends.measured import EAGER
from fastbp.casts import cast_all
from fastbp.problem import DTYPES
from fastbp.producers import Node, Producer
from fastbp.rebuilt import Product
from fastbp.settings import configure_settled, defaults
from fastbp.stock import stock
from fastbp.unpacking import hooks_allow

READABLE_TENSORS = frozenset((Tensor, FakeTensor))
_WEIGHTS = frozenset((Tensor, nn.Parameter, FakeTensor))
_DTYPES = frozenset(DTYPES)
# Bytes of h. Below, on a CPU, what Python does takes more time than all that is saved:
# docs/decisions/2026-11-29-small-calls-stay-pytorchs.md.
_SMALLEST = 2 << 20
# Numbers of an activation's input, from which on our own pass over them pays for the Python around it:
# docs/decisions/2026-11-30-activation-modules.md.
_FEWEST = 1 << 18


class _Size(threading.local):
    smallest, fewest = _SMALLEST, _FEWEST


size = _Size()


@contextmanager
def of_any_size() -> Iterator[None]:
    """In this thread small calls too: for tests, and to see what a model would do with larger inputs."""
    size.smallest = size.fewest = 0
    try:
        yield
    finally:
        size.smallest, size.fewest = _SMALLEST, _FEWEST


class Outcome(NamedTuple):
    """What became of one call of a linear whose input an activation made."""

    fused: bool | None  # None where there is nothing to gain
    what: str  # the call in words where it is fused, else why it is not
    unkept: int = 0  # bytes that PyTorch would have kept of its input


OUTCOME, SETTINGS = "_fastbp_outcome", "_fastbp_settings"  # of a module's __dict__
_OWN = (OUTCOME, SETTINGS)
Settings = tuple[str, str | None]  # save policy and backend
UNSET: Settings = ("auto", None)


def is_small(x: Tensor, settings: Settings) -> bool:
    """Whether a Function of ours takes more time on x than its bytes are worth, to who names no policy."""
    small = x.numel() * x.element_size() < size.smallest
    return small and settings[0] == "auto" and defaults.both[0] is None


_Found = tuple[Tensor | None, Outcome | None]  # y, or None where PyTorch is to compute it; and what to say of it


def run(module: nn.Module, product: Product, x: Tensor, latest: bool, weight: Any, bias: Any) -> Tensor:
    """y = x Wᵀ + b of an x that has a node, and in the module's ``OUTCOME`` what was done.

    The other arguments are those of F.linear, and not checked: ``product``, which computes y, refuses what it would.
    ``latest`` as ``producers.is_latest`` has it of the node, before anything was done with the weight. The caller must
    not hold the node: with it f(g) would live on.
    """
    own = module.__dict__
    settings = own.get(SETTINGS, UNSET)
    if settings is None:  # unfused, of a class that others have made since
        return product(x, weight, bias)
    if is_small(x, settings):
        own[OUTCOME] = _SMALL
        return product(x, weight, bias)
    y, own[OUTCOME] = _linear(product, x, latest, weight, bias, settings)
    return product(x, weight, bias) if y is None else y


def _linear(product: Product, x: Tensor, latest: bool, weight: Any, bias: Any, settings: Settings) -> _Found:
    if not is_grad_enabled() or is_inference_mode_enabled():  # which records nothing, whatever is within it
        return None, None
    device = x.device.type
    if any_autocast() and torch.is_autocast_enabled(device):
        x, weight, bias = cast_all((x, weight, bias), torch.get_autocast_dtype(device), device)
        torch.set_autocast_enabled(device, False)
        try:
            y, outcome = _linear(product, x, latest, weight, bias, settings)
            return product(x, weight, bias) if y is None else y, outcome
        finally:
            torch.set_autocast_enabled(device, True)
    node = x.grad_fn
    name = type(node).__name__
    if name not in producers.READABLE and producers.own(node) is None:
        return None, _unread(node)
    reason = _obstacle(x, weight, bias)
    if reason is not None:
        return None, Outcome(False, reason)
    free = hooks_allow(node)
    if free is None:
        return None, Outcome(False, "there are saved-tensor hooks, of which nobody knows what unpacking twice does")
    try:
        found = producers.read_whole(x, node) if free and not dispatch_modes() else None
    except RuntimeError:  # PyTorch minds that in backward only, if that comes there
        return None, Outcome(False, "what its input was made of was written to in place")
    if found is not None:
        del node
        return _of_producer(product, x, latest, weight, bias, settings, found)
    if not producers.can_rebuild(node):
        return None, _unread(node)
    return _of_node(product, x, node, weight, bias)


def _of_producer(
    product: Product,
    x: Tensor,
    latest: bool,
    weight: Any,
    bias: Any,
    settings: Settings,
    producer: Producer,
) -> _Found:
    """``_linear`` of f(z), or of f(g) · u."""
    bound, form, inputs, activated, *_ = producer
    save, backend = settings
    if save == "auto":
        save = defaults.both[0] or save
    save = save if save == "fp8" else "preact"
    try:
        asked = (form, bound, save, backend, defaults.both)
        config = choose_settled(asked, configure_settled, inputs[0], (*inputs[1:], weight, bias), (weight,))
        if config.backend == EAGER:  # of PyTorch's operations the linear is made anyway
            config = with_backend(config, REFERENCE)
    except ValueError as error:
        return None, Outcome(False, str(error))
    unkept = _bytes_of(x)
    trains = weight.requires_grad
    anew = activated is not None or (save == "fp8" and producers.own(x.grad_fn) is None)
    # Who read x before sends its gradient to the old node, where hooks on x would not see it.
    if anew and (not latest or x._backward_hooks is not None or x.retains_grad or x._is_view()):
        return _of_node(product, x, x.grad_fn, weight, bias)
    if not anew and not trains:
        return None, None
    kept = rebuilt.codes_of(config, inputs) if save == "fp8" else ()
    if anew:
        hooks = top_hooks(True)
        if hooks is not None:
            hooks[1].__self__._let_go(*inputs, *activated or ())  # type: ignore[attr-defined]
        producer = rebuilt.make_anew(config, x, producer, kept)
        if not trains:
            return None, Outcome(True, f"{_said(form.name, bound)}; the weight is frozen", unkept)
        unkept *= 2 if producer.seen is producers.nobody else 1  # f(g) lives where somebody holds it
    y = rebuilt.act_linear(product, config, x, weight, bias, producer, kept)
    return y, Outcome(True, _said(form.name, bound), unkept)


@lru_cache(maxsize=1024)
def _said(form: str, bound: Bound) -> str:
    """The words for a call; looked up, for to find them takes longer than all else that is done with them."""
    return f"{form}, {bound!r}"


def _of_node(product: Product, x: Tensor, node: Node, weight: Any, bias: Any) -> _Found:
    """``_linear`` of what is made again by its node."""
    if not weight.requires_grad:
        return None, None
    y = rebuilt.rebuilt_linear(product, node, x, weight, bias)
    return y, Outcome(True, f"linear of {producers.operation(node)}", _bytes_of(x))


def _bytes_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


_SMALL = Outcome(
    False, f"its input has less than {_SMALLEST >> 20} MiB, which is not worth the time; a named save policy takes it"
)

_SMALL_ELSEWHERE = Outcome(None, "")  # of a small call behind no activation; in a report it has no row
_SMALL_ONES = (_SMALL, _SMALL_ELSEWHERE)


def _obstacle(x: Tensor, weight: Any, bias: Any) -> str | None:
    """Why PyTorch is to compute a linear whose input could be made again, or None."""
    if type(weight) not in _WEIGHTS or (bias is not None and type(bias) not in _WEIGHTS):
        return f"its weight is a {type(weight).__name__}"
    if weight.dim() != 2 or (bias is not None and (bias.dim() != 1 or bias.dtype is not weight.dtype)):
        return "its weight or its bias has another shape or dtype than a linear's"
    if x.is_nested or x.layout is not torch.strided:
        return "its input is nested or sparse"
    if x._version:
        return "its input was written to in place"
    if x.dtype not in _DTYPES or weight.dtype is not x.dtype or weight.layout is not torch.strided:
        return f"its input is {x.dtype}, its weight {weight.dtype} and {weight.layout}"
    if weight.device != x.device:
        return f"its input is on {x.device}, its weight on {weight.device}"
    return surroundings()


def surroundings() -> str | None:
    """What is at work around a call that has to see PyTorch's own operations, or None."""
    if functorch_active() or forward_ad._current_level >= 0:
        return "a transform or forward-mode differentiation is at work"
    if function_mode() and not all(map(_only_watches, _get_current_function_mode_stack())):
        return "a TorchFunctionMode is active"
    return None


def _only_watches(mode: Any) -> bool:
    return type(mode) is DeviceContext or getattr(type(mode), "only_watches", False)


_BETWEEN = 4  # nodes that are looked at for an activation, to say why it is of no use


def _unread(node: Node) -> Outcome | None:
    """Why the input of a linear cannot be made again, where an activation is near."""
    if producers.keeps_output(node):
        keeps = f"{producers.operation(node)} keeps its output"
        return Outcome(None, f"{keeps}, which is this linear's input, and it is kept once")
    passed, below = [node], node
    for _ in range(_BETWEEN):
        below = next((n for n, _ in below.next_functions if n is not None), None)
        if below is None:
            return None
        found = type(below).__name__
        ours = producers.own(below)
        if found in producers.KEEPS_OUTPUT or found in NODES or (ours is not None and ours.activation):
            activation, *between = map(producers.operation, (below, *reversed(passed)))
            return Outcome(False, f"between {activation} and this linear there is {', '.join(between)}")
        passed.append(below)
    return None


class Linear(StockLinear):
    """An ``nn.Linear``, ``y = x Wᵀ + b``, that does not keep its input where an activation made it.

    x (..., in_features), weight (out_features, in_features), bias (out_features,) or None; y (..., out_features), by
    ``F.linear`` and equal to it to the bit. Where autograd's graph says that x is f(z) or f(g) · u, perhaps after a
    dropout, a constant factor or a cast, what that graph keeps anyway (z; g and u) serves backward, and x is made
    again for dW: half of the bytes of an MLP are kept, and half of a gated block's. All else is as nn.Linear has it,
    and so is an x of less than 2 MiB, unless ``fastbp.use`` or ``fuse`` names a save policy: that takes less time.
    Parameters, state_dict and initialisation are nn.Linear's. ``fastbp.report`` says what each linear of a model did
    last.
    """

    def __prepare_scriptable__(self) -> StockLinear:
        """What ``torch.jit.script`` compiles in its place: an nn.Linear with the same parameters."""
        stock = StockLinear.__new__(StockLinear)
        stock.__dict__.update({name: value for name, value in self.__dict__.items() if name not in _OWN})
        return stock

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in_features) to y (..., out_features); errors as ``F.linear``."""
        if is_compiling() or (StockLinear.forward, F.linear, nn.Module.__getattr__) != _STOCK:
            return StockLinear.forward(self, input)
        its = self._parameters  # looking there first spares nn.Module's __getattr__
        own = self.__dict__
        plain = "weight" in its and "bias" in its and "weight" not in own and "bias" not in own
        weight, bias = (its["weight"], its["bias"]) if plain else (self.weight, self.bias)
        small = type(input) is Tensor and is_small(input, own.get(SETTINGS) or UNSET)
        # What makes the input of a small call is looked at once: the look costs more than the rest of it.
        seen = small and own.get(OUTCOME) in _SMALL_ONES and input.requires_grad and not input.is_leaf
        if not seen:
            node = input.grad_fn if type(input) in READABLE_TENSORS else None
            if node is not None and producers.is_near(node) and not is_tracing():
                latest = producers.is_latest(node)
                del node
                return run(self, _STOCK_LINEAR, input, latest, weight, bias)
            own[OUTCOME] = _SMALL_ELSEWHERE if small and node is not None else None
        return _STOCK_LINEAR(input, weight, bias)  # type: ignore[no-any-return]


_STOCK_LINEAR = stock(F, "linear")
_STOCK = stock(StockLinear, "forward"), _STOCK_LINEAR, stock(nn.Module, "__getattr__")
