"""The autograd Functions: one for each form, all of one shape.

``apply(config, *inputs, *weights, *biases)`` returns y and the residuals of the config's save policy. The residuals are
outputs in the eyes of autograd, so what backward reads is connected to the graph, and a second derivative flows through
it into this node again: derivatives of any order need neither a second formula nor inputs kept for their sake.

The Functions take checked tensors and a canonical ``Config`` that names a backend; ``fastbp.linear_act`` and its
sisters make those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled, nn
from torch._C import _are_functorch_transforms_active as functorch_active
from torch._C._functorch import TransformType, is_legacy_batchedtensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.compiler import is_compiling

from fastbp import reference
from fastbp.backends import BACKENDS, REFERENCE, module_of, with_backend, with_choice
from fastbp.backends.measured import EAGER, Choice
from fastbp.problem import Config, check, configure
from fastbp.reference import Saved, unflatten
from fastbp.saving import POLICIES, kept, leanest
from fastbp.tangents import jvp

Outputs = tuple[Tensor, ...]
_ONLY_NONE, _STRIDED = frozenset((None,)), torch.strided
_PLAIN_OR_NONE = frozenset((Tensor, nn.Parameter, nn.Buffer, type(None)))


class _Eager(torch.autograd.Function):
    """What all of them are: derivatives of every order, forward mode and vmap."""

    @staticmethod
    def forward(config: Config, x: Tensor, *tensors: Tensor | None) -> Outputs:
        # A transform hides of which class a tensor is until here, so the choice could not see it.
        if not _PLAIN_OR_NONE.issuperset(map(type, (x, *tensors))):
            config = with_backend(config, REFERENCE)
        return tuple(module_of(config).forward(config, x, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.set_materialize_grads(False)
        config = ctx.config = inputs[0]
        needs = ctx.needs = ctx.needs_input_grad[1:]
        ctx.save_for_backward(*pick(config, needs)((*inputs, *output, None)))
        if forward_ad._current_level >= 0 or functorch_active():
            y = 1 + config.form.inputs
            ctx.save_for_forward(*inputs[1:y], output[0], *inputs[y:], *output[1:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dresiduals: Tensor | None) -> tuple[Tensor | None, ...]:
        config, needs, saved = ctx.config, ctx.needs, ctx.saved_tensors
        batched = functorch_active() or (dy is not None and is_legacy_batchedtensor(dy))
        if is_grad_enabled() or batched or forward_ad._current_level >= 0 or is_compiling():
            differentiable = True  # the gradient is going to be differentiated, is batched, or traced
        elif dy is None or not _ONLY_NONE.issuperset(dresiduals):
            differentiable = False  # the end of a double backward, whose gradients reach the residuals themselves
        else:
            alone = dy.numel() >= _WORTH_ASKING and owns_residuals(ctx, dy, saved)
            return (None, *BACKENDS[config.backend].backward(config, dy, saved, needs, alone))  # type: ignore[union-attr]
        parts = unflatten(config.form, saved, len(needs))
        return (None, *reference.backward(config, dy, parts, needs, dresiduals, differentiable))

    @staticmethod
    def jvp(ctx: Any, _: None, *ttensors: Tensor | None) -> tuple[Tensor | None, ...]:
        form = ctx.config.form
        tinputs, tweights, tbiases = form.split(ttensors)
        tangents = Saved(tinputs, None, tweights, tbiases, ())
        return jvp(ctx.config, unflatten(form, ctx.saved_tensors, len(ttensors)), tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], config: Config, *tensors: Tensor | None) -> tuple[Outputs, Any]:
        count, dims = config.form.inputs, in_dims[1:]
        if all(dim is None for dim in dims[count:]):  # only inputs are batched: one more leading size
            size = info.batch_size
            inputs = [
                t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)  # type: ignore[union-attr]
                for t, dim in zip(tensors[:count], dims, strict=False)
            ]
            outputs = _Eager.apply(config, *inputs, *tensors[count:])
            return outputs, (0,) * len(outputs)

        def plain(*tensors: Any) -> Outputs:
            y, residuals = reference.forward(config, *config.form.split(tensors))
            return (y, *residuals)

        outputs = torch.vmap(plain, in_dims=dims, randomness="error")(*tensors)
        return outputs, (0,) * len(outputs)


def is_special(dy: Tensor) -> bool:
    """Whether a gradient is going to be differentiated, or is batched: it takes PyTorch's operations alone."""
    return is_grad_enabled() or functorch_active() or is_legacy_batchedtensor(dy) or forward_ad._current_level >= 0


def c_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without the Python around it, which looks for transforms."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]


class _AtOnce(torch.autograd.Function):
    """``_Eager`` with forward and setup_context in one, which spares a call where no transform is active."""

    @staticmethod
    def forward(ctx: Any, config: Config, x: Tensor, *tensors: Tensor | None) -> Outputs:
        # A backend has been chosen: no module_of here and in backward, for frames cost twice where Dynamo watches them.
        output = tuple(BACKENDS[config.backend].forward(config, x, tensors))  # type: ignore[union-attr]
        ctx.set_materialize_grads(False)
        ctx.config = config
        needs = ctx.needs = ctx.needs_input_grad[1:]
        ctx.save_for_backward(*pick(config, needs)((config, x, *tensors, *output, None)))
        if forward_ad._current_level >= 0:
            others = config.form.inputs - 1
            ctx.save_for_forward(x, *tensors[:others], output[0], *tensors[others:], *output[1:])
        return output

    backward = _Eager.backward
    jvp = _Eager.jvp


def owns_residuals(ctx: Any, dy: Tensor, saved: tuple[Tensor | None, ...]) -> bool:
    """Whether z is nobody's but this backward's, which may then write dz over it and needs no memory for it.

    So it is where the graph is not kept, and autograd has let go what it saved, unless somebody holds the storage: by
    saved-tensor hooks, by ``grad_fn.saved_tensors``, in another graph.
    """
    if ctx.config.save != "preact" or ctx.config.form.given or type(dy) is not Tensor or _count_holders is None:
        return False  # z that is given may lie in any strides, one number in many places
    ctx.maybe_clear_saved_tensors()
    residuals = saved[1 + len(ctx.needs) :]
    return all(r is None or _count_holders(r.untyped_storage()._cdata) == _ALONE for r in residuals)


_WORTH_ASKING = 1 << 14  # numbers in dy: below, the microsecond of asking is worth more than the memory
_ALONE = 2  # a tensor, and the storage object that asks
# Internal to PyTorch (2.11 to 2.14 have both); where one is gone, dz gets memory of its own.
_count_holders: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
if not hasattr(torch._C._FunctionBase, "maybe_clear_saved_tensors"):
    _count_holders = None


@lru_cache(maxsize=1024)
def pick(config: Config, needs: tuple[bool, ...]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """From (config, inputs, weights, biases, y, residuals, None) to inputs, y, weights, biases, residuals, in one step.

    None, the last of them, stands for all that is not kept.
    """
    keep = kept(config.form, config.save, config.row.grad_reads_output, needs)
    y, first = 1 + len(needs), 1 + config.form.inputs
    places = (*range(1, first), y, *range(first, y), *range(y + 1, 1 + len(keep)))
    return itemgetter(*(place if k else -1 for place, k in zip(places, keep, strict=True)))


class LinearActFunction(_Eager):
    """``y = f(x Wᵀ + b)``: ``apply(config, x, weight, bias)`` returns (y, *residuals).

    x (..., K), weight (N, K), bias (N,) or None, one dtype and device; y (..., N). Backward: ``dz = dz(dy, z)``,
    ``dx = dz W``, ``dW = dzᵀ x``, ``db = Σ dz``.
    """


class GatedLinearActFunction(_Eager):
    """``y = f(x Wgᵀ + bg) · (x Wuᵀ + bu)``: ``apply(config, x, gate_weight, up_weight, gate_bias, up_bias)``.

    Backward: ``dg = dy · u · f'(g)``, ``du = dy · f(g)``, then as for two linears of one input.
    """


class MLPFunction(_Eager):
    """A chain of linears with the activation between them: ``apply(config, x, W_1, ..., W_L, b_1, ..., b_L)``.

    Backward is the delta rule, ``dz_{l-1} = (dz_l W_l) · f'(z_{l-1})``; hidden outputs are rebuilt from z.
    """


class GatedMLPFunction(_Eager):
    """``(f(x Wgᵀ + bg) · (x Wuᵀ + bu)) Wdᵀ + bd``: ``apply(config, x, Wg, Wu, Wd, bg, bu, bd)``."""


class ActLinearFunction(_Eager):
    """``y = f(z) Wᵀ + b``: ``apply(config, z, weight, bias)``.

    z (..., N), weight (O, N), bias (O,) or None; y (..., O). Backward: ``dz = dz(dy W, z)``, ``dW = dyᵀ f(z)``,
    ``f(z)`` rebuilt from z unless the policy kept it, ``db = Σ dy``.
    """


class GatedActLinearFunction(_Eager):
    """``y = (f(g) · u) Wᵀ + b``: ``apply(config, gate, up, weight, bias)``.

    Backward, with ``dh = dy W``: ``dg = dh · u · f'(g)``, ``du = dh · f(g)``, ``dW = dyᵀ (f(g) · u)``, ``db = Σ dy``.
    """


FUNCTIONS: dict[str, type[torch.autograd.Function]] = {
    "linear_act": LinearActFunction,
    "gated_linear_act": GatedLinearActFunction,
    "mlp": MLPFunction,
    "gated_mlp": GatedMLPFunction,
    "act_linear": ActLinearFunction,
    "gated_act_linear": GatedActLinearFunction,
}


def _at_once(function: type[torch.autograd.Function]) -> Any:
    """The Function to apply where no functorch transform is active.

    Function.apply binds the signature on every call when setup_context is defined, 20 to 50 µs; the C-level apply
    beneath it does not. The node's own apply looks for the function's backward on every call; here it is the backward.
    """
    made = type(function.__name__, (_AtOnce,), {})  # the name is what grad_fn shows
    made._backward_cls.apply = _Eager.backward  # type: ignore[attr-defined]
    return made


_AT_ONCE = {form: _at_once(function) for form, function in FUNCTIONS.items()}
NODES: dict[str, type] = {form: made._backward_cls for form, made in _AT_ONCE.items()}  # of eager calls, by form
_DIRECT = {form: c_apply(made) for form, made in _AT_ONCE.items()}


def run(
    config: Config,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    tensors: tuple[Tensor | None, ...],
) -> Tensor:
    """y of an eager call by the backend that the config names, differentiable where autograd or a transform asks.

    ``choose`` has named the backend. Refuses as ``check`` does. ``tensors`` are the inputs after x, the weights and the
    biases in one row.
    Every small call pays for each line that it comes by here, which is why there are few.
    """
    if config.backend == EAGER:
        dtype, device, fine = x.dtype, x.device, x.layout is _STRIDED
        for t in tensors:
            if t is not None and (t.dtype is not dtype or t.layout is not _STRIDED or t.device != device):
                fine = False
        others = tensors[: config.form.inputs - 1]
        if not fine:  # the shapes have been checked, with the choice
            check(config.form, x, weights, biases, others)  # type: ignore[arg-type]
        return reference.compose(config.form, config.value, (x, *others), weights, biases)  # type: ignore[arg-type]
    if functorch_active() or forward_ad._current_level >= 0:
        return _run_transformed(config, x, tensors)
    module: Any = BACKENDS[config.backend]
    if not module.CHECKS_TENSORS:
        check(config.form, x, weights, biases, tensors[: config.form.inputs - 1])  # type: ignore[arg-type]
    try:
        if is_grad_enabled() and not is_inference_mode_enabled():  # which records nothing, whatever is within it
            if config.form.given and _cannot_be_kept(config, x, tensors):
                return _compose(config, x, tensors)
            return _DIRECT[config.form.name](config, x, *tensors)[0]  # type: ignore[no-any-return]
        return module.forward(_writing_nothing(config), x, tensors)[0]  # type: ignore[no-any-return]  # no backward
    except RuntimeError:  # say it in the words of the call, if it is the call that is wrong
        check(config.form, x, weights, biases, tensors[: config.form.inputs - 1])  # type: ignore[arg-type]
        raise


def _run_transformed(config: Config, x: Tensor, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """``run`` in a transform of torch.func or in forward mode."""
    (_, *others), weights, biases = config.form.split((x, *tensors))
    check(config.form, x, weights, biases, others)  # type: ignore[arg-type]
    # Nothing is recorded, but a Function saves for the tangent all the same, which inference tensors cannot be.
    if is_inference_mode_enabled() or (forward_ad._current_level >= 0 and not is_grad_enabled()):
        return _compose(config, x, tensors)
    if POLICIES[config.save].compressed:
        config = _writing_nothing(config)  # transforms do not look into bits
    if not functorch_active():
        return _DIRECT[config.form.name](config, x, *tensors)[0]  # type: ignore[no-any-return]
    if _hides_functions():
        return _compose(config, x, tensors)
    return FUNCTIONS[config.form.name].apply(config, x, *tensors)[0]  # type: ignore[no-any-return]


def _compose(config: Config, x: Tensor, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """``run`` by PyTorch's own operations."""
    return reference.compose(config.form, config.value, *config.form.split((x, *tensors)))  # type: ignore[arg-type]


def _cannot_be_kept(config: Config, x: Tensor, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether z, gate or up is of inference mode, and is what would be kept: PyTorch keeps what it makes of them."""
    inputs, _, _ = config.form.split((x, *tensors))
    return config.save == "preact" and any(t is not None and t.is_inference() for t in inputs)


def _hides_functions() -> bool:
    """Whether a transform does not look into a Function, where plain torch operations give what is right.

    Forward mode inside forward mode takes the jvp of a Function for a constant, so that the second derivative would
    silently be 0; functionalize has no rule for Functions.
    """
    keys = [interpreter.key() for interpreter in retrieve_all_functorch_interpreters()]
    return keys.count(TransformType.Jvp) > 1 or TransformType.Functionalize in keys


@lru_cache(maxsize=4096)
def _writing_nothing(config: Config) -> Config:
    """The same call with the policy of which forward writes nothing but y."""
    form, activation, params, _, backend = config.names
    lean = configure(form, activation, params, leanest(config.form), backend)
    return with_choice(lean, Choice(backend, config.route))
