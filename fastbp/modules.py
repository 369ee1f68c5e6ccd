"""The nn.Modules: an nn.Linear, a linear with its activation, and the MLP and gated blocks."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.linear import Linear as StockLinear
from torch.nn.modules.module import _has_any_global_hook

from fastbp import backends, functional, main_grad, recognition, saving, sharding
from fastbp.activations import Bound
from fastbp.capture import refuse_script
from fastbp.forms import GATED_LINEAR_ACT, GATED_MLP, LINEAR_ACT, Form
from fastbp.forms import MLP as MLP_FORM
from fastbp.linear import Linear
from fastbp.readers import ReadingLinear
from fastbp.recognition import has_hooks

_LINEARS = frozenset((StockLinear, Linear, ReadingLinear))
PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor, fx.Proxy, fx.proxy.ParameterProxy)


def is_plain(module: nn.Module) -> bool:
    """Whether calling this module means ``x Wᵀ + b`` with two dense tensors and nothing else.

    False for a subclass (LoRA, quantised, parametrised), with hooks, and for weights that are tensor subclasses
    (sharded, quantised): then the module has to be called as it is.
    """
    return plain_parts((module,)) is not None


def plain_parts(
    linears: Sequence[nn.Module], on_mesh: bool = False
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]] | None:
    """The weights and the biases of linears that are all plain in the sense of ``is_plain``; None if one is not.

    ``on_mesh`` lets DTensors pass too, which the functions take. Blocks ask on every call, so this looks where
    parameters are registered first: ``nn.Module.__getattr__`` costs as much as everything else here.
    """
    weights: tuple[Any, ...] = ()
    biases: tuple[Any, ...] = ()
    for linear in linears:
        if type(linear) not in _LINEARS or has_hooks(linear):
            return None
        own = linear._parameters
        set_apart = linear.__dict__
        lent = (
            "weight" not in own or "bias" not in own or "weight" in set_apart or "bias" in set_apart
        )  # plain attributes, as wrappers set that shard parameters
        weight, bias = (linear.weight, linear.bias) if lent else (own["weight"], own["bias"])
        if type(weight) not in PLAIN_TENSORS and not (on_mesh and sharding.is_dtensor(weight)):
            return None
        weights, biases = (*weights, weight), (*biases, bias)
    return None if _has_any_global_hook() else (weights, biases)


def run_chain(
    linears: Sequence[nn.Module],
    activation: Bound,
    save: str,
    backend: str | None,
    input: Tensor,
    accumulates: bool = False,
    *,
    projected: bool,
) -> Tensor:
    """Linears with the activation between them, and after the last too unless ``projected``.

    One fused call where all are plain; else each linear is called as it is, with its activation where it is plain.
    """
    if projected or len(linears) == 1:
        parts = plain_parts(linears, on_mesh=True)
        if parts is not None:
            form = MLP_FORM if projected else LINEAR_ACT
            return functional.call(form, input, *parts, activation, save, backend, accumulates)
    main_grad.refuse_apart(accumulates, MLP_FORM if projected else LINEAR_ACT, linears)
    h = input
    for linear in linears[: -1 if projected else None]:
        h = (
            run_chain((linear,), activation, save, backend, h, projected=False)
            if is_plain(linear)
            else activation(linear(h))
        )
    return linears[-1](h) if projected else h


def run_gated(
    linears: Sequence[nn.Module],
    activation: Bound,
    save: str,
    backend: str | None,
    input: Tensor,
    accumulates: bool = False,
) -> Tensor:
    """Gate and up, and down if there is a third linear; fused as far as they are plain."""
    parts = plain_parts(linears, on_mesh=True)
    if parts is not None and len(linears) == 3:
        return functional.call(GATED_MLP, input, *parts, activation, save, backend, accumulates)
    if parts is None:
        main_grad.refuse_apart(accumulates, GATED_MLP if len(linears) == 3 else GATED_LINEAR_ACT, linears)
        parts = plain_parts(linears[:2], on_mesh=True)
    if parts is not None:
        h = functional.call(GATED_LINEAR_ACT, input, *parts, activation, save, backend, accumulates)
    else:
        h = activation(linears[0](input)) * linears[1](input)
    return linears[2](h) if len(linears) == 3 else h


class _Settings(nn.Module):
    """The settings that all layers and blocks share, checked when they are made."""

    form: Form
    __prepare_scriptable__ = refuse_script

    def __init__(self, activation: Any, save: str, backend: str | None, accumulates: bool) -> None:
        super().__init__()
        where = f"fastbp.{type(self).__name__}"
        self.activation = recognition.resolve(activation, where)
        saving.resolve(save, self.activation, self.form, where)
        backends.check_name(backend, where)
        self.save = save
        self.backend = backend
        self.gradient_accumulation_fusion = main_grad.check_flag(accumulates, where)

    def _settings_repr(self) -> str:
        text = f"activation={self.activation!r}"
        if self.save != "auto":
            text += f", save={self.save!r}"
        if self.backend is not None:
            text += f", backend={self.backend!r}"
        return text + ", gradient_accumulation_fusion=True" if self.gradient_accumulation_fusion else text


class LinearAct(_Settings):
    """``y = f(x Wᵀ + b)``: nn.Linear and its activation as one layer.

    ``weight`` (out_features, in_features) and ``bias`` (out_features,) are made and initialised as nn.Linear's, so a
    state_dict moves both ways. ``activation``, ``save``, ``backend`` and ``gradient_accumulation_fusion`` as in
    ``fastbp.linear_act``; unknown or illegal ones raise ValueError here. Not a subclass of nn.Linear on purpose: tools
    that look for StockLinear (LoRA, quantisers) compute ``W x`` themselves and would drop the activation.
    """

    form = LINEAR_ACT

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Any = "gelu",
        save: str = "auto",
        backend: str | None = None,
        gradient_accumulation_fusion: bool = False,
    ) -> None:
        super().__init__(activation, save, backend, gradient_accumulation_fusion)
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty((out_features, in_features), device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as nn.Linear does."""
        StockLinear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in_features) to y (..., out_features)."""
        own = self._parameters  # looking there first spares nn.Module's __getattr__, as in plain_parts
        try:
            weight, bias = own["weight"], own["bias"]
        except KeyError:
            weight, bias = self.weight, self.bias
        flag = self.gradient_accumulation_fusion
        return functional.call(LINEAR_ACT, input, (weight,), (bias,), self.activation, self.save, self.backend, flag)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            + self._settings_repr()
        )


class _Block(_Settings):
    """A block of plain nn.Linear children, called fused while they are plain and as they are otherwise."""

    def _children(self) -> list[nn.Module]:
        own = self._modules
        return [own[name] for name in self._names]  # type: ignore[misc]

    def _add_linears(self, sizes: dict[str, tuple[int, int]], bias: bool, device: Any, dtype: Any) -> None:
        self._names = tuple(sizes)
        for name, (size_in, size_out) in sizes.items():
            setattr(self, name, StockLinear(size_in, size_out, bias=bias, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return self._settings_repr()


class GatedLinear(_Block):
    """``y = f(x Wgᵀ + bg) · (x Wuᵀ + bu)``, children ``gate_proj``, ``up_proj``; see ``fastbp.gated_linear_act``."""

    form = GATED_LINEAR_ACT

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Any = "silu",
        save: str = "auto",
        backend: str | None = None,
        gradient_accumulation_fusion: bool = False,
    ) -> None:
        super().__init__(activation, save, backend, gradient_accumulation_fusion)
        size = (in_features, out_features)
        self._add_linears({"gate_proj": size, "up_proj": size}, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in_features) to y (..., out_features)."""
        flag = self.gradient_accumulation_fusion
        return run_gated(self._children(), self.activation, self.save, self.backend, input, flag)


class MLP(_Block):
    """Linears ``fc1`` ... ``fcL`` with the activation between them and none after the last; see ``fastbp.mlp``.

    ``hidden_features`` is an int or a sequence of ints, ``out_features`` is ``in_features`` where not given.
    """

    form = MLP_FORM

    def __init__(
        self,
        in_features: int,
        hidden_features: int | Sequence[int],
        out_features: int | None = None,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Any = "gelu",
        save: str = "auto",
        backend: str | None = None,
        gradient_accumulation_fusion: bool = False,
    ) -> None:
        super().__init__(activation, save, backend, gradient_accumulation_fusion)
        widths = (in_features, *_hidden_sizes(hidden_features), in_features if out_features is None else out_features)
        sizes = {f"fc{i}": pair for i, pair in enumerate(pairwise(widths), start=1)}
        self._add_linears(sizes, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in_features) to y (..., out_features)."""
        flag = self.gradient_accumulation_fusion
        return run_chain(self._children(), self.activation, self.save, self.backend, input, flag, projected=True)


def _hidden_sizes(given: Any) -> tuple[int, ...]:
    try:
        return (operator.index(given),)
    except TypeError:
        pass
    try:
        return tuple(operator.index(size) for size in given)
    except TypeError:
        raise TypeError(
            f"fastbp.MLP: hidden_features must be an int or a sequence of ints, got {type(given).__name__} {given!r}"
        ) from None


class GatedMLP(_Block):
    """``down(f(gate(x)) · up(x))``, children ``gate_proj``, ``up_proj``, ``down_proj``; see ``fastbp.gated_mlp``."""

    form = GATED_MLP

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Any = "silu",
        save: str = "auto",
        backend: str | None = None,
        gradient_accumulation_fusion: bool = False,
    ) -> None:
        super().__init__(activation, save, backend, gradient_accumulation_fusion)
        into = (in_features, hidden_features)
        out = (hidden_features, in_features if out_features is None else out_features)
        self._add_linears({"gate_proj": into, "up_proj": into, "down_proj": out}, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """x (..., in_features) to y (..., out_features)."""
        flag = self.gradient_accumulation_fusion
        return run_gated(self._children(), self.activation, self.save, self.backend, input, flag)


LAYERS = (LinearAct, GatedLinear, MLP, GatedMLP)  # what has settings of its own
