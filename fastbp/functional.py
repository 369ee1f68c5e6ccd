"""The functions users call, and what each call goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled as any_autocast
from torch._C import _is_tracing as is_tracing
from torch.compiler import is_compiling, is_exporting
from torch.overrides import handle_torch_function, has_torch_function

from fastbp import activations, main_grad, recognition, saving, sharding
from fastbp.activations import Bound
from fastbp.autograd import run
from fastbp.backends import choose_settled
from fastbp.capture import refuse_torchscript, run_captured, unscriptable
from fastbp.casts import cast_all
from fastbp.forms import ACT_LINEAR, GATED_ACT_LINEAR, GATED_LINEAR_ACT, GATED_MLP, LINEAR_ACT, MLP, Form
from fastbp.problem import check
from fastbp.settings import configure_settled, defaults, settle


def available_activations() -> dict[str, tuple[str, ...]]:
    """Each activation by name, with the save policies that serve it in ``fastbp.linear_act``."""
    return {name: saving.legal_policies(activations.bind(name)) for name in activations.ROWS}


_PLAIN = (Tensor, nn.Parameter)


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


@unscriptable
def act_linear(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Any = "gelu",
    save: str = "auto",
    backend: str | None = None,
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """``y = f(z) Wᵀ + b``, an activation and the linear layer after it as one step: the second half of ``fastbp.mlp``.

    z (..., N), weight (O, N), bias (O,) or None; y (..., O). Arguments and errors as in ``fastbp.linear_act``. z or the
    output f(z) is kept, by the policy, and the other rebuilt in backward, where eager PyTorch keeps both. ``recompute``
    is none of the policies, as z is not made here. Under a compressed one z is not kept, and a gradient that is to be
    differentiated again is refused. Autocast casts z first, as it does an argument of ``F.linear``.

    Gradients: ``dz = dz(dy W, z)``, ``dW = dyᵀ f(z)``, ``db = Σ dy``; of any order.
    """
    return call(ACT_LINEAR, z, (weight,), (bias,), activation, save, backend, gradient_accumulation_fusion)


@unscriptable
def gated_act_linear(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Any = "silu",
    save: str = "auto",
    backend: str | None = None,
    gradient_accumulation_fusion: bool = False,
) -> Tensor:
    """``y = (f(g) · u) Wᵀ + b``, a gate and the linear layer after it: the second half of ``fastbp.gated_mlp``.

    gate and up (..., N), of one shape, weight (O, N), bias (O,) or None; y (..., O). Arguments and errors as in
    ``fastbp.linear_act``. The policies are ``preact`` (g and u are kept, f(g) and f(g) · u rebuilt in backward) and
    ``fp8``, under which a gradient that is to be differentiated again is refused.

    Gradients, with ``dh = dy W``: ``dg = dh · u · f'(g)``, ``du = dh · f(g)``, ``dW = dyᵀ (f(g) · u)``, ``db = Σ dy``.
    """
    accumulates = gradient_accumulation_fusion
    return call(GATED_ACT_LINEAR, gate, (weight,), (bias,), activation, save, backend, accumulates, others=(up,))


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
    others: tuple[Tensor, ...] = (),
) -> Tensor:
    """A call of this form, as the functions above and the modules make it; the arguments are those of ``mlp``.

    Hands over to ``__torch_function__``, casts as autocast asks, checks the tensors, settles the settings, and runs.
    ``owners`` are the weights before they were cast, ``others`` the inputs after x.
    """
    tensors = (*others, *weights, *biases)
    if has_torch_function((x, *tensors)):
        options = dict(activation=activation, save=save, backend=backend, gradient_accumulation_fusion=accumulates)
        return _overridden(form, x, weights, biases, others, **options)
    if accumulates is not False and torch.is_grad_enabled() and is_compiling() and not is_exporting():
        return _outside_graphs(form, x, weights, biases, activation, save, backend, accumulates, owners, others)
    if any_autocast():
        device = x.device.type if isinstance(x, Tensor) else "cpu"
        if device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            cast = cast_all((x, *tensors), dtype, device)
            owners, (inputs, weights, biases) = weights, form.split(cast)
            inner = (form, inputs[0], weights, biases, activation, save, backend, accumulates, owners, inputs[1:])
            if is_compiling():
                with torch.autocast(device, enabled=False):
                    return call(*inner)
            torch.set_autocast_enabled(device, False)  # 6 µs less than the context above
            try:
                return call(*inner)
            finally:
                torch.set_autocast_enabled(device, True)
    # Dynamo does not know the question; where it captures, _accumulated refuses.
    records = accumulates is not False and torch.is_grad_enabled()
    if records and (is_compiling() or not torch.is_inference_mode_enabled()):
        return _accumulated(form, x, weights, biases, activation, save, backend, accumulates, owners or weights, others)
    if type(activation) is not str and type(activation) is not Bound:  # a module's parameters may change between calls
        check(form, x, weights, biases, others)  # before the activation is probed: the tensors' faults come first
        activation = recognition.resolve(activation, f"fastbp.{form.name}")
    settings = (form, activation, save, backend, defaults.both)
    if type(x) not in _PLAIN and sharding.applies(x, tensors):
        check(form, x, weights, biases, others)
        linear = settle(*settings)[1] == "identity"
        settled = partial(call, form, activation=activation, save=save, backend=backend)
        return sharding.call(form, linear, (x, *others), weights, biases, settled)
    if is_compiling():
        check(form, x, weights, biases, others)
        return run_captured(settle(*settings), (x, *others), weights, biases)
    if is_tracing():
        refuse_torchscript(form.name, "torch.jit.trace")
    try:
        config = choose_settled(settings, configure_settled, x, tensors, weights)
    except (TypeError, ValueError, RuntimeError):
        check(form, x, weights, biases, others)  # so that the tensors' faults come first
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
    others: tuple[Tensor, ...],
) -> Tensor:
    """``call`` with gradient_accumulation_fusion, where gradients are wanted at all."""
    main_grad.check_flag(accumulates, f"fastbp.{form.name}")
    main_grad.check_surroundings(form, owners)
    check(form, x, weights, biases, others)
    tensors = (*others, *weights, *biases)
    trained = main_grad.find_owners(form, x, owners, tensors)
    if trained is None:
        return call(form, x, weights, biases, activation, save, backend, others=others)
    config = configure_settled((form, activation, save, backend, defaults.both))
    return main_grad.run(config, trained, x, tensors)


def _outside_graphs(*arguments: Any) -> Tensor:
    """``call`` for code that is compiled: Dynamo breaks the graph here and runs it eagerly, casts and all."""
    reason = "fastbp: gradient_accumulation_fusion adds to tensors outside the graph"
    return torch.compiler.disable(call, reason=reason)(*arguments)  # type: ignore[no-any-return]


def _overridden(
    form: Form, x: Any, weights: tuple[Any, ...], biases: tuple[Any, ...], others: tuple[Any, ...], **options: Any
) -> Tensor:
    """The call as the user's function of this form, for tensor-likes that say themselves what to do with one."""
    tensors = (x, *others, *weights, *biases)
    arguments = tensors if form.parts else (x, weights, biases)
    return handle_torch_function(_PUBLIC[form], tensors, *arguments, **options)  # type: ignore[no-any-return]


_PUBLIC: dict[Form, Callable[..., Any]] = {
    LINEAR_ACT: linear_act,
    GATED_LINEAR_ACT: gated_linear_act,
    MLP: mlp,
    GATED_MLP: gated_mlp,
    ACT_LINEAR: act_linear,
    GATED_ACT_LINEAR: gated_act_linear,
}
