"""The functions users call, and ``use``, which sets their defaults for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled as any_autocast
from torch._C import _is_tracing as is_tracing
from torch.compiler import is_compiling, is_exporting
from torch.overrides import handle_torch_function, has_torch_function

from fastbp import activations, backends, main_grad, recognition, saving, sharding
from fastbp.activations import Bound
from fastbp.autograd import run
from fastbp.backends import choose_settled
from fastbp.capture import refuse_torchscript, run_captured, unscriptable
from fastbp.casts import cast_all
from fastbp.forms import GATED_LINEAR_ACT, GATED_MLP, LINEAR_ACT, MLP, Form
from fastbp.problem import Config, Names, check, configure


def available_activations() -> dict[str, tuple[str, ...]]:
    """Each activation by name, with the save policies that serve it in ``fastbp.linear_act``."""
    return {name: saving.legal_policies(activations.bind(name)) for name in activations.ROWS}


_PLAIN = (Tensor, nn.Parameter)


class _Defaults(threading.local):
    def __init__(self) -> None:  # of instances, not of the class: Dynamo guards only these
        self.both: tuple[str | None, str | None] = (None, None)  # save and backend: looking one thing up is cheaper


_defaults = _Defaults()


class use:
    """Set the backend or the save policy for the calls of this thread that do not name their own.

    ``with fastbp.use(backend="reference", save="recompute"): ...``. A call or module that names a backend or a policy
    keeps it; a compiled call is compiled anew for another setting. Raises as the functions do for an unknown name; a
    policy that is illegal for an activation is refused by the call it reaches.
    """

    def __init__(self, backend: str | None = None, save: str | None = None) -> None:
        if backend is None and save is None:
            raise ValueError("fastbp.use: neither backend nor save was given, so it would change nothing")
        self.backend = None if backend is None else backends.check_name(backend, "fastbp.use")
        self.save = None if save is None else saving.check_name(save, "fastbp.use")
        self._before: list[tuple[str | None, str | None]] = []

    def __enter__(self) -> None:
        save, backend = _defaults.both
        self._before.append((save, backend))
        _defaults.both = (save if self.save is None else self.save, backend if self.backend is None else self.backend)

    def __exit__(self, *exception: object) -> None:
        _defaults.both = self._before.pop()


@unscriptable
def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Any = "gelu",
    save: str = "auto",
    backend: str | None = None,
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """``y = f(x Wᵀ + b)``, a linear layer and its activation as one step.

    x (..., K), weight (N, K), bias (N,) or None; y (..., N). float64, float32, bfloat16 or float16, all of one dtype
    and device; under autocast they are cast as ``F.linear`` casts. ``activation`` is a name of
    ``fastbp.available_activations()``, or the module or function PyTorch has for it. ``backend`` is a name of
    ``fastbp.available_backends()``, or None for the first that serves.

    ``save`` is what forward keeps for backward: ``"preact"`` z, ``"output"`` nothing but y, ``"recompute"`` nothing;
    ``"auto"`` takes ``"output"`` where that is exact and PyTorch's own activation keeps y too (relu, sigmoid, tanh),
    else ``"preact"``, so that ``y += r`` is allowed where it is with PyTorch. On request only, in at most 32 bits:
    ``"output_bits"`` half a byte a number besides y, ``"output_lsb"`` nothing, the lowest bit of a negative y being
    changed for it (both for activations with one minimum, like GELU), ``"fp8"`` about a byte in place of z. Their
    errors are in docs/numerics.md. They keep x, where a weight needs it, for gradients that are differentiated again,
    which are exact; transforms of torch.func and forward mode compute as by ``"recompute"``.

    Gradients: ``dz = dz(dy, z)``, ``dx = dz W``, ``dW = dzᵀ x``, ``db = Σ dz``; of any order.

    With ``gradient_accumulation_fusion`` backward adds each weight's gradient to ``weight.main_grad``, a float32 tensor
    of its shape that the caller attaches, or without one to ``weight.grad`` if that is float32 or may be
    (``weight.grad_dtype``): in float32 throughout, on the stream of the forward call. Autograd gets None for the
    weight. Where that has Megatron's attribute ``grad_added_to_main_grad`` and a main_grad, it is set to True and hooks
    run on a dummy (zeros if ``zero_out_wgrad`` is true). Biases are left to autograd; ``torch.autograd.grad`` returns
    gradients as ever and adds nothing. Second derivatives, transforms, captured graphs, tensor subclasses, weights that
    are no leaves and a DistributedDataParallel that reduces are refused; compiled code runs the call eagerly.

    Raises ValueError for shapes, devices, names and policies that do not fit, TypeError for dtypes and for what is no
    tensor.
    """
    return call(LINEAR_ACT, x, (weight,), (bias,), activation, save, backend, gradient_accumulation_fusion)


@unscriptable
def gated_linear_act(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    activation: Any = "silu",
    save: str = "auto",
    backend: str | None = None,
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """``y = f(x Wgᵀ + bg) · (x Wuᵀ + bu)``: SwiGLU with silu, GEGLU with gelu, ReGLU with relu, GLU with sigmoid.

    x (..., K), both weights (N, K), both biases (N,) or None; y (..., N). Arguments and errors as in
    ``fastbp.linear_act``; the policies are ``preact`` (g and u are kept), ``fp8`` and ``recompute``.

    Gradients: ``dg = dy · u · f'(g)``, ``du = dy · f(g)``, then as for two linears of one input.
    """
    weights, biases = (gate_weight, up_weight), (gate_bias, up_bias)
    return call(GATED_LINEAR_ACT, x, weights, biases, activation, save, backend, gradient_accumulation_fusion)


@unscriptable
def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    activation: Any = "gelu",
    save: str = "auto",
    backend: str | None = None,
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """``W_L f(... f(W_1 x + b_1) ...) + b_L``: linears with the activation between them, none after the last.

    x (..., K), weights[l] (N_l, N_{l-1}) with N_0 = K, biases[l] (N_l,) or None, or None for no biases at all;
    y (..., N_L). Arguments and errors as in ``fastbp.linear_act``. Of each hidden layer one tensor is kept, z or the
    output, and the other is rebuilt in backward: half of what eager PyTorch keeps.

    Gradients: ``dz_{l-1} = (dz_l W_l) · f'(z_{l-1})``, ``dW_l = dz_lᵀ h_{l-1}``, ``db_l = Σ dz_l``.
    """
    matrices = weights if type(weights) is tuple else _tensors("weights", weights)
    vectors = biases if type(biases) is tuple else _tensors("biases", biases, len(matrices))
    return call(MLP, x, matrices, vectors, activation, save, backend, gradient_accumulation_fusion)


def _tensors(name: str, given: Any, nones: int | None = None) -> tuple[Any, ...]:
    if given is None and nones is not None:
        return (None,) * nones
    if isinstance(given, Tensor) or not hasattr(given, "__iter__"):
        raise TypeError(f"fastbp.mlp: {name} must be a list or tuple of tensors, got {type(given).__name__}")
    return tuple(given)


@unscriptable
def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: Any = "silu",
    save: str = "auto",
    backend: str | None = None,
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """``(f(x Wgᵀ + bg) · (x Wuᵀ + bu)) Wdᵀ + bd``: the feed-forward block of Llama and its kin.

    x (..., K), gate_weight and up_weight (N, K), down_weight (O, N), biases (N,), (N,), (O,) or None; y (..., O).
    Arguments and errors as in ``fastbp.linear_act``. g and u are kept, f(g) and f(g) · u are rebuilt in backward: half
    of what eager PyTorch keeps.
    """
    weights, biases = (gate_weight, up_weight, down_weight), (gate_bias, up_bias, down_bias)
    return call(GATED_MLP, x, weights, biases, activation, save, backend, gradient_accumulation_fusion)


def call(
    form: Form,
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    activation: Any,
    save: str,
    backend: str | None,
    accumulates: bool = False,
    owners: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """A call of this form, as the functions above and the modules make it; the arguments are those of ``mlp``.

    Hands over to ``__torch_function__``, casts as autocast asks, checks the tensors, settles the settings, and runs.
    ``owners`` are the weights before they were cast.
    """
    tensors = (*weights, *biases)
    if has_torch_function((x, *tensors)):
        options = dict(activation=activation, save=save, backend=backend, gradient_accumulation_fusion=accumulates)
        return _overridden(form, x, weights, biases, **options)
    if accumulates is not False and torch.is_grad_enabled() and is_compiling() and not is_exporting():
        return _outside_graphs(form, x, weights, biases, activation, save, backend, accumulates)
    if any_autocast():
        device = x.device.type if isinstance(x, Tensor) else "cpu"
        if device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, *cast = cast_all((x, *tensors), dtype, device)
            owners, biases = weights, tuple(cast[len(weights) :])
            weights = tuple(cast[: len(owners)])
            inner = (form, x, weights, biases, activation, save, backend, accumulates, owners)
            if is_compiling():
                with torch.autocast(device, enabled=False):
                    return call(*inner)
            torch.set_autocast_enabled(device, False)  # 6 µs less than the context above
            try:
                return call(*inner)
            finally:
                torch.set_autocast_enabled(device, True)
    if accumulates is not False and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        return _accumulated(form, x, weights, biases, activation, save, backend, accumulates, owners or weights)
    if type(activation) is not str and type(activation) is not Bound:  # a module's parameters may change between calls
        check(form, x, weights, biases)  # before the activation is probed, so that the tensors' faults come first
        activation = recognition.resolve(activation, f"fastbp.{form.name}")
    settings = (form, activation, save, backend, _defaults.both)
    if type(x) not in _PLAIN and sharding.applies(x, tensors):
        check(form, x, weights, biases)
        linear = _settle(*settings)[1] == "identity"
        settled = partial(call, form, activation=activation, save=save, backend=backend)
        return sharding.call(form, linear, x, weights, biases, settled)
    if is_compiling():
        check(form, x, weights, biases)
        return run_captured(_settle(*settings), x, weights, biases)
    if is_tracing():
        refuse_torchscript(form.name, "torch.jit.trace")
    try:
        config = choose_settled(settings, _configure, x, tensors, weights)
    except (TypeError, ValueError, RuntimeError):
        check(form, x, weights, biases)  # so that the tensors' faults come first
        raise
    return run(config, x, weights, biases, tensors)


def _accumulated(
    form: Form,
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    activation: Any,
    save: str,
    backend: str | None,
    accumulates: bool,
    owners: tuple[Tensor, ...],
) -> Tensor:
    """``call`` with gradient_accumulation_fusion, where gradients are wanted at all."""
    main_grad.check_flag(accumulates, f"fastbp.{form.name}")
    main_grad.check_surroundings(form, owners)
    check(form, x, weights, biases)
    tensors = (*weights, *biases)
    trained = main_grad.find_owners(form, x, owners, tensors)
    if trained is None:
        return call(form, x, weights, biases, activation, save, backend)
    config = _configure((form, activation, save, backend, _defaults.both))
    return main_grad.run(config, trained, x, tensors)


def _outside_graphs(*arguments: Any) -> Tensor:
    """``call`` for code that is compiled: Dynamo breaks the graph here and runs it eagerly, casts and all."""
    reason = "fastbp: gradient_accumulation_fusion adds to tensors outside the graph"
    return torch.compiler.disable(call, reason=reason)(*arguments)  # type: ignore[no-any-return]


def _overridden(form: Form, x: Any, weights: tuple[Any, ...], biases: tuple[Any, ...], **options: Any) -> Tensor:
    """The call as the user's function of this form, for tensor-likes that say themselves what to do with one."""
    tensors = (x, *weights, *biases)
    arguments = tensors if form.parts else (x, weights, biases)
    return handle_torch_function(_PUBLIC[form], tensors, *arguments, **options)  # type: ignore[no-any-return]


_PUBLIC: dict[Form, Callable[..., Any]] = {
    LINEAR_ACT: linear_act,
    GATED_LINEAR_ACT: gated_linear_act,
    MLP: mlp,
    GATED_MLP: gated_mlp,
}


def _settle(
    form: Form,
    activation: Any,
    save: str,
    backend: str | None,
    defaults: tuple[str | None, str | None],
) -> Names:
    """The settings of a call, checked, as ``Config.names``. ``defaults`` are the policy and the backend of ``use``."""
    default_save, default_backend = defaults
    where = f"fastbp.{form.name}"
    bound = recognition.resolve(activation, where)
    if save == "auto" and default_save is not None:
        save = default_save
    policy = saving.resolve(save, bound, form, where)
    backend = backends.check_name(default_backend if backend is None else backend, where)
    return form.name, bound.name, bound.params, policy, backend


def _configure(settings: tuple[Any, ...]) -> Config:
    return configure(*_settle(*settings))
