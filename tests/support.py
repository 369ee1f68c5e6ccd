"""What the tests share: random tensors for every form, the call and its plain PyTorch twin, and the yardstick."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbp
from fastbp.activations import TABLE, Activation, Bound, bind
from fastbp.forms import FORMS, LINEAR_ACT, Form
from fastbp.problem import DTYPES as DTYPES
from fastbp.saving import POLICIES, exact_policies, legal_policies

Maybe = Tensor | None
Case = tuple[Form, Bound, str]
Tensors = tuple[Tensor, list[Tensor], list[Maybe]]  # x, weights and before them the inputs after x, biases

FEATURES = (19, 23, 17, 11)  # in, hidden, hidden (mlp only), out: odd, so that no kernel fits evenly
SMALL = (2, 3, 2, 2)

# Parameters other than the defaults, and such as cost an activation its `output` policy. celu with a negative alpha
# grows like e^(z / alpha); nearer to 0, one element's rounding would decide every comparison of errors.
OTHER_PARAMS: dict[str, tuple[tuple[float, ...], ...]] = {
    "leaky_relu": ((0.2,), (-0.2,)),
    "hardtanh": ((-0.3, 1.7),),
    "elu": ((0.7,), (-0.7,)),
    "celu": ((1.5,), (-4.0,)),
    "softplus": ((2.0, 20.0), (1.0, 5.0)),
}


def bound_with_params() -> list[Bound]:
    """Rows that have parameters, with other ones than the defaults."""
    return [bind(name, params) for name, cases in OTHER_PARAMS.items() for params in cases]


ACTIVATIONS = [*(bind(row.name) for row in TABLE), *bound_with_params()]

# One of each kind, for tests whose subject is not the activation: y = z, a kink, the slope from y by PyTorch's kernel,
# no slope from y, no kernel and an inexact slope from y, parameters.
FEW = [*(bind(name) for name in ("identity", "relu", "tanh", "gelu", "relu2")), bind("softplus", (2.0, 20.0))]


def settings(activations: Iterable[Bound], form: Form = LINEAR_ACT) -> list[tuple[Bound, str]]:
    """Every (activation, policy) that is legal in the form and exact."""
    return [(activation, save) for activation in activations for save in exact_policies(activation, form)]


def compressed_cases(activations: Iterable[Bound], forms: Iterable[Form] = FORMS.values()) -> list[Case]:
    """Every (form, activation, policy) that is legal and compressed."""
    return [
        (form, activation, save)
        for form in forms
        for activation in activations
        for save in legal_policies(activation, form)
        if POLICIES[save].compressed
    ]


def cases(activations: Iterable[Bound], forms: Iterable[Form] = FORMS.values()) -> list[Case]:
    """Every (form, activation, policy) that is legal and exact."""
    return [(form, *setting) for form in forms for setting in settings(activations, form)]


SETTINGS = settings(ACTIVATIONS)


def label(value: Any) -> str:
    """A test id, the same in every process: no addresses."""
    if isinstance(value, (Form, Activation)):
        return value.name
    return value.__name__ if callable(value) and hasattr(value, "__name__") else str(value).removeprefix("torch.")


each = functools.partial(pytest.mark.parametrize, ids=label)


def tensors(
    form: Form,
    dtype: torch.dtype = torch.float64,
    *,
    seed: int,
    rows: int | tuple[int, ...] = 37,
    features: Sequence[int] = FEATURES,
    bias: bool = True,
    device: str = "cpu",
    requires_grad: bool = True,
) -> Tensors:
    """Random x (rows, K), weights and biases; a seed draws the same numbers for every dtype, which rounds them.

    Of a given form x is as wide as a hidden layer.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return numbers.to(device, dtype).requires_grad_(requires_grad)

    features = features[1:] if form.given else features
    shapes = list(zip(features[1:], features, strict=False))  # (out, in) of a chain
    if form.given:
        shapes = [(features[-1], features[0])]
    elif form.parts:
        shapes = [shapes[0]] * form.width + [(features[-1], features[1])] * form.projected
    x, *others = (draw(*((rows,) if isinstance(rows, int) else rows), features[0]) for _ in range(form.inputs))
    weights = [draw(*shape, scale=max(shape[1], 1) ** -0.5) for shape in shapes]
    return x, [*others, *weights], [draw(shape[0]) if bias else None for shape in shapes]


def call(
    form: Form,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Maybe],
    *,
    activation: Any,
    save: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """fastbp's function of the form."""
    function = getattr(fastbp, form.name)
    arguments = (*weights, *biases) if form.parts else (weights, biases)
    return function(x, *arguments, activation=activation, save=save, backend=backend)


def stock_module(activation: Bound) -> nn.Module:
    """PyTorch's module of an activation, for rows that have one."""
    row, params = activation
    assert row.module is not None
    module = row.module()
    for name, value in (*row.module_attributes, *zip((name for name, _ in row.params), params, strict=True)):
        setattr(module, name, value)
    return module


def stock(activation: Bound) -> Callable[[Tensor], Tensor]:
    """What a PyTorch user calls today."""
    composites = {"relu2": lambda z: F.relu(z).square(), "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z)}
    return stock_module(activation) if activation.row.module else composites[activation.name]


def formula(activation: Bound) -> Callable[[Tensor], Tensor]:
    """The table's value in plain torch; in float64, with autograd behind it, what every result is measured against."""
    return lambda z: activation.row.value(z, *activation.params)


def eager(
    form: Form,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Maybe],
    activation: Bound | Callable[[Tensor], Tensor],
) -> Tensor:
    """What a PyTorch user writes today."""
    f = stock(activation) if isinstance(activation, Bound) else activation
    others, weights = weights[: form.inputs - 1], weights[form.inputs - 1 :]
    layers = list(zip(weights, biases, strict=True))
    last = layers.pop() if form.projected else None
    h = x
    if form.given:
        h = f(x) * others[0] if form.gated else f(x)
    elif form.gated:
        gate, up = layers
        h = f(F.linear(x, *gate)) * F.linear(x, *up)
    else:
        for layer in layers:
            h = f(F.linear(h, *layer))
    return F.linear(h, *last) if last else h


def exact(
    form: Form, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Maybe], f: Callable[[Tensor], Tensor]
) -> Tensor:
    """``eager`` in float64 with every sum taken backwards.

    A yardstick that rounds as eager does would find no error in float64 eager at all, and so measure nothing.
    """
    others, weights = weights[: form.inputs - 1], weights[form.inputs - 1 :]
    count = len(weights)
    layers = [min(i // form.width, form.hidden(count)) for i in range(count)]
    top = layers[-1]
    weights = [w.flip(1) if layer == top else w.flip(0, 1) for w, layer in zip(weights, layers, strict=True)]
    biases = [b if b is None or layer == top else b.flip(0) for b, layer in zip(biases, layers, strict=True)]
    rows = (0,) if x.dim() > 1 else ()
    x, *others = (t.flip(*rows, -1) for t in (x, *others))
    y = eager(form, x, [*others, *weights], biases, f)
    return y.flip(*rows) if rows else y


def on_flat(function: Callable[..., Tensor], form: Form, **options: Any) -> Callable[..., Tensor]:
    """``call`` or ``eager`` as a function of ``x, *weights, *biases``, which says how many of them have x's shape."""

    def flat(*tensors: Tensor) -> Tensor:
        return function(form, *unflatten(form, tensors), **options)

    flat.inputs = form.inputs  # type: ignore[attr-defined]
    return flat


def flatten(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Maybe]) -> list[Maybe]:
    """``x, *weights, *biases``."""
    return [x, *weights, *biases]


def unflatten(form: Form, flat: Sequence[Any]) -> tuple[Any, Sequence[Any], Sequence[Any]]:
    """The other way round."""
    half = form.inputs + form.linears(len(flat))
    return flat[0], flat[1:half], flat[half:]


def with_others(form: Form, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """``weights`` and before them the inputs after x, made of x: for models that have parameters and one input."""
    return [*[x.flip(-1)] * (form.inputs - 1), *weights]


def saved_row(form: Form, flat: Sequence[Maybe], y: Maybe, residuals: Sequence[Maybe]) -> list[Maybe]:
    """What backends take as saved, of a call's tensors and what forward returned."""
    return [*flat[: form.inputs], y, *flat[form.inputs :], *residuals]


def like(tensor: Tensor, seed: int) -> Tensor:
    """A random gradient for a tensor."""
    numbers = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(tensor.device, tensor.dtype)


def grads(y: Tensor, inputs: Sequence[Maybe], dy: Tensor, **options: Any) -> list[Maybe]:
    """The gradient of each input; None where it is absent or frozen."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, dy, **options))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def widened(values: Iterable[Maybe]) -> list[Maybe]:
    """The same numbers in float64, as new leaves."""
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in values]


# For two float64 results of the same mathematics, which differ in the order of rounding.
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12, equal_nan=True)


def error(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """RMS and maximum of what separates two tensors where both are finite."""
    gap = (actual.double() - exact.double())[actual.isfinite() & exact.isfinite()]
    return (gap.square().mean().sqrt().item(), gap.abs().max().item()) if gap.numel() else (0.0, 0.0)


def places(tensor: Tensor) -> Tensor:
    """Where NaN (3), inf (1) and -inf (2) stand."""
    return tensor.isnan() * 3 + tensor.isposinf() * 1 + tensor.isneginf() * 2


def roundings(save: str, dtype: torch.dtype) -> int:
    """Units to spare for a policy: in float32 the coefficients of the slope from a side alternate, up to 70, and sums
    with fused products round otherwise than those without."""
    policy = POLICIES[save]
    return 64 if dtype == torch.float32 and policy.compressed and policy.from_output else 1


def assert_as_good_as_eager(
    ours: Sequence[Maybe], eagers: Sequence[Maybe], exact: Sequence[Maybe], spare_units: int = 1
) -> None:
    """The rule for every result: NaN and inf where eager has them, RMS and maximum error at most twice eager's.

    The errors are against float64 and have one rounding unit of the largest value to spare; float64 itself has four,
    because a yardstick of the same precision is off by some roundings of its own.
    """
    for index, (mine, theirs, truth) in enumerate(zip(ours, eagers, exact, strict=True)):
        if truth is None:
            assert mine is None and theirs is None, index
            continue
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), index
        assert torch.equal(places(mine), places(theirs)), f"{index}: NaN or inf stand elsewhere"
        finite = truth[truth.isfinite()].abs()
        units = 4 if mine.dtype == torch.float64 else spare_units
        spare = units * torch.finfo(mine.dtype).eps * (finite.max().item() if finite.numel() else 0.0)
        errors = zip(("RMS", "maximum"), error(mine, truth), error(theirs, truth), strict=True)
        for what, my_error, their_error in errors:
            assert my_error <= 2 * their_error + spare, f"{index}: {what} error {my_error:g}, eager's {their_error:g}"


def assert_accurate(
    form: Form,
    activation: Bound,
    save: str,
    tensors: Tensors,
    *,
    backend: str | None = None,
    view: Callable[[Tensor], Tensor] = lambda dy: dy,
    spare_units: int = 1,
    **options: Any,
) -> None:
    """Output and gradients of one call, with ``view`` of a random dy, held to the rule above."""
    inputs = flatten(*tensors)
    wide = widened(inputs)
    ours = call(form, *tensors, activation=activation, save=save, backend=backend)
    theirs = eager(form, *tensors, activation)
    truth = exact(form, *unflatten(form, wide), formula(activation))
    dy = view(like(ours, seed=2))
    assert_as_good_as_eager(
        [ours, *grads(ours, inputs, dy, **options)],
        [theirs, *grads(theirs, inputs, dy)],
        [truth, *grads(truth, wide, dy.double())],
        spare_units,
    )


def special(activation: Bound, dtype: torch.dtype) -> Tensor:
    """Where formulas go wrong: ±0, kinks, the ends of float16, ±1e30, ±inf, NaN."""
    kinks = [0.0, 1.0, 3.0, 6.0, 20.0, *activation.params_for(dtype)]
    values = [float("nan"), *(sign * v for v in (*kinks, 65504.0, 1e30, float("inf")) for sign in (1, -1))]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


class RedZones:
    """Allocates as ``fastbp.backends.triton.layers.new`` does, between zones that nobody may write to."""

    SIZE, FILL = 64, 123.0  # numbers on either side; 16 bytes at least, so that the memory stays aligned

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def new(self, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * self.SIZE,), self.FILL, dtype=dtype or like.dtype, device=like.device)
        self.buffers.append(buffer)
        unwritten = 0x7F if buffer.dtype == torch.uint8 else float("nan")  # which is NaN of e4m3
        return buffer[self.SIZE : self.SIZE + count].fill_(unwritten).view(tuple(shape))

    def check(self) -> None:
        for buffer in self.buffers:
            assert (buffer[: self.SIZE] == self.FILL).all() and (buffer[-self.SIZE :] == self.FILL).all()
