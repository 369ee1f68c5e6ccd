"""The ops ``torch.ops.fastbp.*`` with fakes, beneath autograd; and the same calls without a dispatcher in between.

One forward and one backward op for each form, named after it, with the tensors of the function of that name:

    linear_act(Tensor x, Tensor weight, Tensor? bias, <config>) -> (Tensor y, Tensor[] residuals)
    linear_act_backward(Tensor dy, Tensor? x, Tensor? y, Tensor weight, Tensor? bias, Tensor?[] residuals, <config>,
                        bool[] needs) -> Tensor[]          one gradient for each true entry of needs

where x is z, or gate and up, in the forms that are given these.

Graphs (torch.compile, torch.export) hold the ops, whose derivative is in ``capture``. Eager calls go straight to the
backend: the detour through the dispatcher into Python and back costs about 40 µs a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastbp import flops, reference, shapes
from fastbp.backends import REFERENCE, choose, module_of, with_backend
from fastbp.backends.measured import EAGER
from fastbp.forms import FORMS, Form
from fastbp.problem import Config, Names, configure
from fastbp.reference import Saved

_CONFIG = "str activation, float[] params, str save, str backend"
_library = torch.library.Library("fastbp", "DEF")
_plain: dict[Any, Callable[..., Any]] = {}

# Of an op: its kernel, its fake, itself in plain torch, and the operations of its products.
Kernels = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], Callable[..., int]]
Biases = Sequence[Tensor | None]
Grads = list[Tensor | None]


def forward(config: Config, inputs: Sequence[Tensor], weights: Sequence[Tensor], biases: Biases) -> list[Tensor]:
    """y and the residuals, from the backend that serves."""
    x, *others = inputs
    tensors = (*others, *weights, *biases)
    config = _with_kernels(choose(config, x, tensors, weights))
    return module_of(config).forward(config, x, tensors)  # type: ignore[no-any-return]


def backward(config: Config, dy: Tensor, saved: Saved, needs: tuple[bool, ...]) -> Grads:
    """The gradients that are needed, from the backend that serves."""
    flat = (*saved.inputs, saved.y, *saved.weights, *saved.biases, *saved.residuals)
    config = _with_kernels(choose(config, dy, flat, saved.weights))
    return module_of(config).backward(config, dy, flat, needs)  # type: ignore[no-any-return]


def _with_kernels(config: Config) -> Config:
    """Here, beneath autograd, what is to be PyTorch's operations under its own autograd is the reference."""
    return with_backend(config, REFERENCE) if config.backend == EAGER else config


def traced_forward(
    names: Names, inputs: Sequence[Tensor], weights: Sequence[Any], biases: Biases
) -> tuple[Tensor, list[Tensor]]:
    """``forward`` as one op in a graph, given ``Config.names``."""
    op, args = traced_call(names, inputs, weights, biases)
    return op(*args)  # type: ignore[no-any-return]


def traced_call(
    names: Names, inputs: Sequence[Any], weights: Sequence[Any], biases: Sequence[Any]
) -> tuple[Any, tuple[Any, ...]]:
    """The op of that call and its arguments, of tensors or of what stands for them in a graph."""
    form, *settings = names
    op = getattr(torch.ops.fastbp, form).default
    return op, (*inputs, *_packed(FORMS[form], weights, biases), *_listed(settings))


def traced_backward(names: Names, dy: Tensor, saved: Saved, needs: tuple[bool, ...]) -> Grads:
    """``backward`` as one op in a graph; ``saved`` holds every weight and bias."""
    form, *settings = names
    op = getattr(torch.ops.fastbp, f"{form}_backward").default
    packed = _packed(FORMS[form], saved.weights, saved.biases)
    grads = iter(op(dy, *saved.inputs, saved.y, *packed, list(saved.residuals), *_listed(settings), list(needs)))
    return [next(grads) if need else None for need in needs]


def _listed(settings: list[Any]) -> list[Any]:
    """A config's fields after its form, as the dispatcher takes them."""
    activation, params, save, backend = settings
    return [activation, list(params), save, backend]


def _packed(form: Form, weights: Sequence[Any], biases: Sequence[Any]) -> list[Any]:
    """Weights and biases as arguments: one each where the form names them, else two lists."""
    return [*weights, *biases] if form.parts else [list(weights), list(biases)]


def unpacked(form: Form, args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Weights, biases and the arguments after them."""
    if not form.parts:
        return args[0], args[1], args[2:]
    count = len(form.parts)
    return args[:count], args[count : 2 * count], args[2 * count :]


def _schema(form: Form) -> str:
    if not form.parts:
        return "Tensor[] weights, Tensor?[] biases"
    indices = range(len(form.parts))
    weights = [f"Tensor {form.argument('weight', i)}" for i in indices]
    return ", ".join(weights + [f"Tensor? {form.argument('bias', i)}" for i in indices])


def _kernels(form: Form) -> tuple[Kernels, Kernels]:
    """Of a form's op forward and of its op backward."""
    count = form.inputs

    def split_forward(*args: Any) -> tuple[Config, Sequence[Tensor], Sequence[Tensor], Biases]:
        weights, biases, (activation, params, save, backend) = unpacked(form, args[count:])
        return configure(form.name, activation, tuple(params), save, backend), args[:count], weights, biases

    def forward_kernel(*args: Any) -> tuple[Tensor, list[Tensor]]:
        y, *residuals = forward(*split_forward(*args))
        return y.contiguous(), [r.contiguous() for r in residuals]

    def forward_fake(*args: Any) -> tuple[Tensor, list[Tensor]]:
        config, (x, *_), weights, _ = split_forward(*args)
        y, *residuals = shapes.new_results(form, config.save, x, [w.shape for w in weights])
        return y, residuals

    def forward_plain(*args: Any) -> tuple[Tensor, list[Tensor]]:
        return reference.forward(*split_forward(*args))

    def forward_flops(x: Tensor, *args: Any) -> int:
        weights, *_ = unpacked(form, args[count - 1 :])
        return shapes.forward_flops(prod(x.shape[:-1]), [w.shape for w in weights])

    def split_backward(dy: Tensor, *args: Any) -> tuple[Config, Tensor, Saved, tuple[bool, ...]]:
        inputs, y, rest = args[:count], args[count], args[count + 1 :]
        weights, biases, (residuals, activation, params, save, backend, needs) = unpacked(form, rest)
        config = configure(form.name, activation, tuple(params), save, backend)
        return config, dy, Saved(inputs, y, weights, biases, residuals), tuple(needs)

    def backward_kernel(dy: Tensor, *args: Any) -> list[Tensor]:
        return [_own(g, dy) for g in backward(*split_backward(dy, *args)) if g is not None]

    def backward_fake(dy: Tensor, *args: Any) -> list[Tensor]:
        weights, _, (*_, needs) = unpacked(form, args[count + 1 :])
        grads = shapes.gradient_shapes(dy.shape, [w.shape for w in weights], needs)
        return [dy.new_empty(shape) for shape in grads if shape is not None]

    def backward_plain(dy: Tensor, *args: Any) -> list[Tensor]:
        return [_own(g, dy) for g in reference.backward(*split_backward(dy, *args)) if g is not None]

    def backward_flops(dy: Tensor, *args: Any) -> int:
        config, _, saved, needs = split_backward(dy, *args)
        weights = [w.shape for w in saved.weights]
        return shapes.backward_flops(form, config.save, prod(dy.shape[:-1]), weights, needs)

    return (
        (forward_kernel, forward_fake, forward_plain, forward_flops),
        (backward_kernel, backward_fake, backward_plain, backward_flops),
    )


def _own(grad: Tensor, dy: Tensor) -> Tensor:
    """A contiguous tensor that is not dy: an op may not return its argument."""
    return grad.clone() if grad is dy else grad.contiguous()


def _register(form: Form) -> None:
    tensors, name = _schema(form), form.name
    inputs, kept = (", ".join(f"{kind} {i}" for i in form.names_of_inputs) for kind in ("Tensor", "Tensor?"))
    schemas = {
        name: f"({inputs}, {tensors}, {_CONFIG}) -> (Tensor, Tensor[])",
        f"{name}_backward": f"(Tensor dy, {kept}, Tensor? y, {tensors}, Tensor?[] residuals, {_CONFIG}, "
        "bool[] needs) -> Tensor[]",
    }
    for (op, schema), (kernel, fake, plain, count) in zip(schemas.items(), _kernels(form), strict=True):
        _library.define(op + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(op, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastbp::{op}", fake, lib=_library)
        flops.count_as(getattr(torch.ops.fastbp, op), count)
        _plain[getattr(torch.ops.fastbp, op).default] = plain


for _form in FORMS.values():
    _register(_form)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The ops of fastbp as PyTorch's own operations, for graphs that are to run where fastbp is not.

    ``torch.export.export(model, args).run_decompositions(fastbp.decompositions())`` gives a program without any op of
    fastbp, to be saved, compiled ahead of time or exported to ONNX. Together with what PyTorch decomposes by default:
    ``{**torch.export.default_decompositions(), **fastbp.decompositions()}``.
    """
    return dict(_plain)
