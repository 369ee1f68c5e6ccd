"""One call, checked once. All that a user can hand over wrongly is refused here, in the user's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbp.activations import ROWS, Activation, one_pass
from fastbp.forms import FORMS, MLP, Form

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DTYPES, _STRIDED = frozenset(DTYPES), torch.strided  # as check asks for them on every call


Names = tuple[str, str, tuple[float, ...], str, str]  # form, activation, its parameters, policy, backend


@dataclass(frozen=True, eq=False, slots=True)
class Config:
    """What a call is, apart from its tensors. Equal settings give the same object, by ``configure``."""

    form: Form
    row: Activation
    params: tuple[float, ...]
    save: str
    backend: str
    # The activation in PyTorch's own kernels, for the backends and routes that are made of them.
    value: Callable[[Tensor], Tensor]
    grad: Callable[[Tensor, Tensor], Tensor]
    grad_from_output: Callable[[Tensor, Tensor], Tensor] | None
    route: str = ""  # by which way of its the backend is to compute; "" for what its own rule says

    def __repr__(self) -> str:
        return f"Config{self.names}"

    @property
    def names(self) -> Names:
        """The same in plain values, for graphs and ops."""
        return self.form.name, self.row.name, self.params, self.save, self.backend


@lru_cache(maxsize=4096)
def configure(form: str, activation: str, params: tuple[float, ...], save: str, backend: str) -> Config:
    """The config of these canonical names."""
    row = ROWS[activation]
    from_output = row.grad_from_output and one_pass(row.aten_grad_from_output, row.grad_from_output, params)
    value, grad = one_pass(row.aten_value, row.value, params), one_pass(row.aten_grad, row.grad, params)
    return Config(FORMS[form], row, params, save, backend, value, grad, from_output)


class Problem(NamedTuple):
    """What a backend is asked to compute; ``supports(problem)`` answers from this alone."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    accumulates: bool = False  # weight gradients are added to tensors of the caller's


def check(
    form: Form,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    others: Sequence[Tensor] = (),
) -> None:
    """Raise ValueError or TypeError unless these tensors make a call of this form; ``others`` are inputs after the
    first.

    The common case costs a handful of comparisons; the words are found only when one fails.
    """
    try:
        features, dtype, device = x.size(-1), x.dtype, x.device
        fine = dtype in _DTYPES and not x.is_nested and x.layout is _STRIDED and len(weights) == len(biases) > 0
        gated = form.gated
        for i, w in enumerate(weights):
            out, into = w.shape
            b = biases[i]
            fine = (
                fine
                and (into == features and w.dtype is dtype and w.layout is _STRIDED and w.device == device)
                and (
                    b is None
                    or (b.shape == (out,) and b.dtype is dtype and b.layout is _STRIDED and b.device == device)
                )
            )
            if not gated or i == 1:  # up takes the input of gate
                fine = fine and (not gated or out == weights[0].size(0))
                features = out
        for t in others:
            same = t.shape == x.shape and t.dtype is dtype and t.device == device
            fine = fine and same and t.layout is _STRIDED and not t.is_nested
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # nested tensors raise RuntimeError
        fine = False
    if not fine:
        _explain(form, (x, *others), weights, biases)
        raise AssertionError(f"fastbp.{form.name}: refused without a reason; please report this")


def _explain(form: Form, inputs: tuple[Any, ...], weights: Any, biases: Any) -> None:
    """Raise what is wrong with a call that ``check`` found wanting."""
    where, (first, *_) = f"fastbp.{form.name}", form.names_of_inputs
    named = dict(zip(form.names_of_inputs, inputs, strict=True))
    x = inputs[0]
    for name, t in named.items():
        _expect_tensor(where, name, t)
    if form is MLP:
        _explain_lists(where, weights, biases)
    for i, w in enumerate(weights):
        _expect_tensor(where, form.argument("weight", i), w)
        if biases[i] is not None:
            _expect_tensor(where, form.argument("bias", i), biases[i], or_none=True)
    if x.dim() == 0:
        raise ValueError(f"{where}: {first} must have at least one dimension, (..., in_features), got a 0-d tensor")
    _explain_dtype(where, first, x, None)
    for name, t in named.items():
        like = (first, x)
        _explain_dtype(where, name, t, like)
        _explain_device(where, name, t, like)
        if t.shape != x.shape:
            raise ValueError(
                f"{where}: {' and '.join(named)} must have the same shape, got "
                f"{' and '.join(str(tuple(t.shape)) for t in inputs)}"
            )
    features, source = x.shape[-1], f"{first} {tuple(x.shape)}"
    for i, w in enumerate(weights):
        name = form.argument("weight", i)
        _explain_dtype(where, name, w, (first, x))
        _explain_device(where, name, w, (first, x))
        _explain_weight(where, name, w, features, source)
        if biases[i] is not None:
            bias_name = form.argument("bias", i)
            _explain_dtype(where, bias_name, biases[i], (first, x))
            _explain_device(where, bias_name, biases[i], (first, x))
            _explain_bias(where, bias_name, biases[i], name, w)
        if form.gated and i == 1 and w.shape[0] != weights[0].shape[0]:
            raise ValueError(
                f"{where}: gate_weight and up_weight must have the same shape, got {tuple(weights[0].shape)} and "
                f"{tuple(w.shape)}"
            )
        if not form.gated or i == 1:
            features, source = w.shape[0], f"{name} {tuple(w.shape)}"


def _explain_lists(where: str, weights: Any, biases: Any) -> None:
    if len(weights) == 0:
        raise ValueError(f"{where}: weights must hold at least one weight, got none")
    if len(biases) != len(weights):
        raise ValueError(
            f"{where}: biases must hold one bias or None for each of the {len(weights)} weights, got {len(biases)}"
        )


def _expect_tensor(where: str, name: str, value: Any, or_none: bool = False) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{where}: {name} must be a torch.Tensor{' or None' if or_none else ''}, got {type(value).__name__}"
        )
    if value.is_nested or value.layout is not torch.strided:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{where}: {name} must be a dense tensor, got {kind}; try {name}.to_dense() or a padded tensor")


def _explain_dtype(where: str, name: str, tensor: Tensor, like: tuple[str, Tensor] | None) -> None:
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        hint = "; complex layers are not supported" if tensor.dtype.is_complex else f"; try {name}.float()"
        raise TypeError(f"{where}: {name} must be one of {known}, got {tensor.dtype}{hint}")
    if like is not None and tensor.dtype != like[1].dtype:
        raise TypeError(
            f"{where}: {name} must have the dtype of {like[0]}, {like[1].dtype}, got {tensor.dtype}; cast one of them, "
            f"or run under torch.autocast({tensor.device.type!r})"
        )


def _explain_device(where: str, name: str, tensor: Tensor, like: tuple[str, Tensor]) -> None:
    if tensor.device != like[1].device:
        raise ValueError(
            f"{where}: {name} must be on the device of {like[0]}, {like[1].device}, got {tensor.device}; move one of "
            "them with .to()"
        )


def _explain_weight(where: str, name: str, weight: Tensor, features: int, source: str) -> None:
    shape = tuple(weight.shape)
    if weight.dim() == 2 and shape[1] == features:
        return
    hint = ""
    if weight.dim() == 2 and shape[0] == features:
        hint = f"; did you mean {name}.T?"
    raise ValueError(f"{where}: {name} must be (out_features, {features}) to match {source}, got {shape}{hint}")


def _explain_bias(where: str, name: str, bias: Tensor, weight_name: str, weight: Tensor) -> None:
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{where}: {name} must be ({weight.shape[0]},) to match {weight_name} {tuple(weight.shape)}, got "
            f"{tuple(bias.shape)}"
        )
