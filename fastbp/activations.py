"""The table of activations: every name, parameter, PyTorch spelling and kernel of an activation is in a row here.

The formulas themselves are in ``formulas.py``.  Anything that needs a list of activations reads ``TABLE``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbp import formulas as f
from fastbp import side_formulas as sides
from fastbp.stock import own

_aten = torch.ops.aten
_native, _nn, _modules = torch._C._VariableFunctions, torch._C._nn, nn.modules.activation  # where nobody replaces them


@dataclass(frozen=True, eq=False)
class Activation:
    """One row: y = f(z) with its gradient, its parameters, and what PyTorch calls it."""

    name: str
    formula: str  # for the documentation
    value: Callable[..., Tensor]
    grad: Callable[..., Tensor]
    grad_from_output: Callable[..., Tensor] | None = None
    params: tuple[tuple[str, float], ...] = ()  # name and default, in the order the formulas take them
    invalid: Callable[..., str | None] = lambda *params: None  # why these parameters mean no activation
    output_lost: Callable[..., str | None] = lambda *params: None  # why with these parameters y does not give the slope
    output_exact: bool = True  # False: legal, but y over- or underflows or its slope cancels, so `auto` keeps z
    # Whether PyTorch's own activation keeps y, which then nobody may write to; where it keeps z, `y += x` and a dropout
    # in place are allowed, and `auto` keeps z for a layer, whose y is the caller's.
    torch_keeps_output: bool = False
    # Of an activation that falls to one minimum and rises from it: z and y of the minimum; dz from dy, y and the side
    # of it, as good as float32, and as results of 16 bits need it.
    minimum_at: float | None = None
    lowest: float | None = None
    grad_from_side: Callable[..., Tensor] | None = None
    grad_from_side_16: Callable[..., Tensor] | None = None
    limits: bool = False  # y takes the values of the parameters, so from y they are compared as its dtype rounds them
    module: type[nn.Module] | None = None
    module_attributes: tuple[tuple[str, Any], ...] = ()  # tells apart activations that share a module class
    functions: tuple[Callable[..., Tensor], ...] = ()
    # What autograd calls the node of this activation, where that keeps z (``_saved_self``) and not y; and from a node
    # the parameters, or None where it is another activation's.
    node: str = ""
    node_params: Callable[[Any], tuple[float, ...] | None] = lambda node: ()
    # Of default parameters, in operations of torch, as people write it: the same up to rounding, kinks too.
    spellings: tuple[str, ...] = ()
    spellings_32: tuple[str, ...] = ()  # with constants that are the row's in float32, and others in float64
    spelled_grad: Callable[..., Tensor] | None = None  # dz from dy and z in their dtype, as exact as the first spelling
    # PyTorch's kernels for the same formulas: one pass over memory, and the numbers users have today.
    aten_value: Callable[..., Tensor] | None = None
    aten_grad: Callable[..., Tensor] | None = None
    aten_grad_from_output: Callable[..., Tensor] | None = None
    # The least of a CPU's capabilities on which our own pass over z takes less time: the suite ``activations``.
    cpu_pass: str = ""

    def __fx_create_arg__(self, tracer: Any) -> Any:
        """How torch.fx writes a row into a graph: as the look-up that finds it."""
        return tracer.create_node("call_function", row_named, (self.name,), {})

    @property
    def spelled(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """The spellings as functions."""
        names = {"F": F, "math": math, "torch": torch}
        return tuple(eval(f"lambda z: {text}", names) for text in self.spellings)

    @property
    def grad_reads_output(self) -> bool:
        """Whether ``grad_from_output`` looks at y at all: identity's does not."""
        return self.name != "identity"


def rounded(params: tuple[float, ...], dtype: torch.dtype) -> tuple[float, ...]:
    """The parameters as numbers of this dtype."""
    return tuple(torch.tensor(p, dtype=dtype).item() for p in params)


class Bound(NamedTuple):
    """An activation with the values of its parameters."""

    row: Activation
    params: tuple[float, ...]

    @property
    def name(self) -> str:
        return self.row.name

    def __repr__(self) -> str:
        shown = ", ".join(f"{n}={v:g}" for (n, d), v in zip(self.row.params, self.params, strict=True) if v != d)
        return f"{self.name}({shown})" if shown else self.name

    def __reduce__(self) -> tuple[Any, ...]:
        return bind, (self.name, self.params)  # rows are compared by identity, so a copy finds the table's own

    def __call__(self, z: Tensor) -> Tensor:
        """y = f(z) in plain differentiable torch."""
        return one_pass(self.row.aten_value, self.row.value, self.params)(z)

    def params_for(self, dtype: torch.dtype) -> tuple[float, ...]:
        """The parameters as an output of this dtype shows them: limits are rounded to it."""
        return rounded(self.params, dtype) if self.row.limits else self.params


def _hardtanh_invalid(min_val: float, max_val: float) -> str | None:
    return None if min_val < max_val else f"min_val must be below max_val, got {min_val} and {max_val}"


def _nonzero(name: str) -> Callable[..., str | None]:
    return lambda first, *rest: None if first != 0 else f"{name} must not be 0"


def _nonnegative(name: str) -> Callable[..., str | None]:
    return lambda first, *rest: None if first >= 0 else f"with {name} = {first} the output does not tell the sign of z"


def _softplus_lost(beta: float, threshold: float) -> str | None:
    return None if threshold >= 20 else f"with threshold = {threshold} two values of z give the same output"


_HARDTANH: dict[str, Any] = dict(
    value=f.hardtanh,
    grad=f.hardtanh_grad,
    grad_from_output=f.hardtanh_grad_from_output,
    invalid=_hardtanh_invalid,
    limits=True,
    aten_value=_aten.hardtanh.default,
    aten_grad=_aten.hardtanh_backward.default,
    aten_grad_from_output=lambda dy, y, *limits: _aten.hardtanh_backward.default(dy, y, *rounded(limits, y.dtype)),
)


def _elu_coefficients(
    alpha: Callable[..., float], scale: float, input_scale: Callable[..., float]
) -> Callable[[bool], Callable[..., Tensor]]:
    """aten::elu_backward serves elu, celu and selu; the flag says whether it is given the output."""

    def make(from_output: bool) -> Callable[..., Tensor]:
        return lambda dy, t, *p: _aten.elu_backward.default(dy, alpha(*p), scale, input_scale(*p), from_output, t)

    return make


def quick_gelu_backward(dy: Tensor, z: Tensor) -> Tensor:
    """The formula's gradient in the dtype of z: five passes and two tensors, where its own operations take eight."""
    s = torch.sigmoid_(f.QUICK_GELU_SCALE * z)
    slope: Tensor = _aten.sigmoid_backward.default(z, s)  # z s (1 - s)
    return slope.mul_(f.QUICK_GELU_SCALE).add_(s).mul_(dy)


_elu_backward = _elu_coefficients(lambda a: a, 1.0, lambda a: 1.0)
_celu_backward = _elu_coefficients(lambda a: a, 1.0, lambda a: 1.0 / a)
_selu_backward = _elu_coefficients(lambda: f.SELU_ALPHA, f.SELU_SCALE, lambda: 1.0)

_SELU = (f.SELU_ALPHA, f.SELU_SCALE, 1)


def _scales_of(node: Any) -> tuple[float, float]:
    return node._saved_scale, node._saved_input_scale


# On a CPU, ATen hands contiguous tensors to oneDNN for the erf GELU, which costs 8 µs forward and 16 backward before
# the first element. A transposed view takes ATen's own vectorised kernel, faster up to about this many elements.
_SMALL = 8192
_gelu_backward_kernel: Callable[..., Tensor] = _aten.gelu_backward.default


def _gelu(z: Tensor) -> Tensor:
    # A fake tensor is not asked for its size, which may be a symbol: the graph would be of small sizes alone.
    gelu = _nn.gelu
    return gelu(z.mT).mT if type(z) is Tensor and z.numel() <= _SMALL and z.dim() > 1 and z.is_cpu else gelu(z)


def _gelu_backward(dy: Tensor, z: Tensor) -> Tensor:
    if type(z) is Tensor and z.numel() <= _SMALL and z.dim() > 1 and z.is_cpu:
        return _gelu_backward_kernel(dy.mT, z.mT).mT
    return _gelu_backward_kernel(dy, z)


def _sides(name: str) -> dict[str, Any]:
    """What tools/fit_sides.py found for an activation."""
    grads = {f"grad_from_side{suffix}": getattr(sides, f"{name}_grad_from_side{suffix}") for suffix in ("", "_16")}
    at, lowest = (getattr(sides, f"{name.upper()}_{what}") for what in ("MINIMUM_AT", "LOWEST"))
    return dict(minimum_at=at, lowest=lowest, **grads)


TABLE: tuple[Activation, ...] = (
    Activation(
        "identity", "z", f.identity, f.identity_grad, f.identity_grad_from_output,
        module=nn.modules.linear.Identity,
        aten_value=lambda z: z, aten_grad=lambda dy, z: dy, aten_grad_from_output=lambda dy, y: dy,
    ),
    Activation(
        "relu", "max(z, 0)", f.relu, f.relu_grad, f.relu_grad_from_output, torch_keeps_output=True,
        module=_modules.ReLU, functions=own("F.relu torch.relu F.relu_ torch.relu_"),
        aten_value=_native.relu, aten_grad=lambda dy, z: _aten.threshold_backward.default(dy, z, 0),
        aten_grad_from_output=lambda dy, y: _aten.threshold_backward.default(dy, y, 0),
    ),
    Activation(
        "leaky_relu", "z if z > 0 else negative_slope · z",
        f.leaky_relu, f.leaky_relu_grad, f.leaky_relu_grad_from_output,
        params=(("negative_slope", 0.01),), output_lost=_nonnegative("negative_slope"),
        module=_modules.LeakyReLU, functions=own("F.leaky_relu F.leaky_relu_"),
        aten_value=_aten.leaky_relu.default,
        aten_grad=lambda dy, z, slope: _aten.leaky_relu_backward.default(dy, z, slope, False),
        aten_grad_from_output=lambda dy, y, slope: _aten.leaky_relu_backward.default(dy, y, slope, True),
        node="LeakyReluBackward0", node_params=lambda node: (node._saved_negative_slope,),
    ),
    Activation(
        "relu6", "min(max(z, 0), 6)", **_HARDTANH, params=(("min_val", 0.0), ("max_val", 6.0)),
        module=_modules.ReLU6, functions=own("F.relu6"),
    ),
    Activation(
        "hardtanh", "min(max(z, min_val), max_val)", **_HARDTANH, params=(("min_val", -1.0), ("max_val", 1.0)),
        module=_modules.Hardtanh, functions=own("F.hardtanh F.hardtanh_"),
        node="HardtanhBackward0", node_params=lambda node: (node._saved_min_val, node._saved_max_val),
    ),
    # From y, the slope of a saturated unit is y + alpha, where all digits cancel: `auto` keeps z for elu, celu, selu.
    Activation(
        "elu", "z if z > 0 else alpha · (eᶻ − 1)", f.elu, f.elu_grad, f.elu_grad_from_output,
        params=(("alpha", 1.0),), output_lost=_nonnegative("alpha"), output_exact=False,
        module=_modules.ELU, functions=own("F.elu F.elu_"),
        aten_value=_aten.elu.default, aten_grad=_elu_backward(False), aten_grad_from_output=_elu_backward(True),
        node="EluBackward0", node_params=lambda node: (node._saved_alpha,) if _scales_of(node) == (1, 1) else None,
        cpu_pass="avx2",
    ),
    Activation(
        "celu", "z if z > 0 else alpha · (e^(z / alpha) − 1)", f.celu, f.celu_grad, f.celu_grad_from_output,
        params=(("alpha", 1.0),), invalid=_nonzero("alpha"), output_lost=_nonnegative("alpha"), output_exact=False,
        module=_modules.CELU, functions=own("F.celu F.celu_ torch.celu torch.celu_"),
        aten_value=_aten.celu.default, aten_grad=_celu_backward(False), aten_grad_from_output=_celu_backward(True),
    ),
    Activation(
        "selu", "1.0507 · (z if z > 0 else 1.6733 · (eᶻ − 1))", f.selu, f.selu_grad, f.selu_grad_from_output,
        output_exact=False, module=_modules.SELU, functions=own("F.selu F.selu_ torch.selu torch.selu_"),
        aten_value=_native.selu, aten_grad=_selu_backward(False), aten_grad_from_output=_selu_backward(True),
        node="EluBackward0", node_params=lambda node: () if (node._saved_alpha, *_scales_of(node)) == _SELU else None,
        cpu_pass="avx2",
    ),
    Activation(
        "sigmoid", "1 / (1 + e⁻ᶻ)", f.sigmoid_, f.sigmoid_grad, f.sigmoid_grad_from_output,
        torch_keeps_output=True, module=_modules.Sigmoid, functions=own("torch.sigmoid F.sigmoid torch.special.expit"),
        aten_value=_native.sigmoid, aten_grad_from_output=_aten.sigmoid_backward.default,
    ),
    Activation(
        "tanh", "tanh(z)", f.tanh_, f.tanh_grad, f.tanh_grad_from_output,
        torch_keeps_output=True, module=_modules.Tanh, functions=own("torch.tanh F.tanh"),
        aten_value=_native.tanh, aten_grad_from_output=_aten.tanh_backward.default, cpu_pass="avx2",
    ),
    Activation(
        "softplus", "log(1 + e^(beta · z)) / beta", f.softplus, f.softplus_grad, f.softplus_grad_from_output,
        params=(("beta", 1.0), ("threshold", 20.0)), invalid=_nonzero("beta"), output_lost=_softplus_lost,
        module=_modules.Softplus, functions=own("F.softplus"),
        aten_value=_aten.softplus.default, aten_grad=_aten.softplus_backward.default,
        node="SoftplusBackward0", node_params=lambda node: (node._saved_beta, node._saved_threshold), cpu_pass="avx2",
    ),
    Activation(
        "softsign", "z / (1 + |z|)", f.softsign, f.softsign_grad, f.softsign_grad_from_output,
        module=_modules.Softsign, functions=own("F.softsign"), cpu_pass="avx2",
    ),
    Activation(
        "silu", "z · sigmoid(z)", f.silu, f.silu_grad,
        module=_modules.SiLU, functions=own("F.silu"), aten_value=_nn.silu, aten_grad=_aten.silu_backward.default,
        node="SiluBackward0", spellings=("z * torch.sigmoid(z)",),
        **_sides("silu"), cpu_pass="avx2",
    ),
    Activation(
        "gelu", "z · Φ(z), Φ the normal distribution function", f.gelu, f.gelu_grad,
        module=_modules.GELU, module_attributes=(("approximate", "none"),), functions=own("F.gelu"),
        spellings=("z * 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0)))",),
        aten_value=_gelu, aten_grad=_gelu_backward,
        node="GeluBackward0", node_params=lambda node: () if node._saved_approximate == "none" else None,
        **_sides("gelu"), cpu_pass="avx512",
    ),
    Activation(
        "gelu_tanh", "z/2 · (1 + tanh(√(2/π) · (z + 0.044715 z³)))", f.gelu_tanh, f.gelu_tanh_grad,
        module=_modules.GELU, module_attributes=(("approximate", "tanh"),),
        aten_value=lambda z: _nn.gelu(z, approximate="tanh"),
        aten_grad=lambda dy, z: _aten.gelu_backward.default(dy, z, approximate="tanh"),
        node="GeluBackward0", node_params=lambda node: () if node._saved_approximate == "tanh" else None,
        spellings=(
            "0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0))))",
            "0.5 * z * (1.0 + torch.tanh(z * math.sqrt(2.0 / math.pi) * (1.0 + 0.044715 * z * z)))",
        ),
        spellings_32=(  # FastGELU's and Bloom's
            "0.5 * z * (1.0 + torch.tanh(z * 0.7978845608 * (1.0 + 0.044715 * z * z)))",
            "z * 0.5 * (1.0 + torch.tanh(0.79788456 * z * (1 + 0.044715 * z * z)))",
        ),
        **_sides("gelu_tanh"), cpu_pass="avx2",
    ),
    Activation(
        "quick_gelu", "z · sigmoid(1.702 z)", f.quick_gelu, f.quick_gelu_grad,
        aten_grad=lambda dy, z: quick_gelu_backward(*(t.to(wide(t.dtype)) for t in (dy, z))).to(z.dtype),
        spellings=("z * torch.sigmoid(1.702 * z)",), spelled_grad=quick_gelu_backward,
        **_sides("quick_gelu"), cpu_pass="avx2",
    ),
    Activation(
        "mish", "z · tanh(log(1 + eᶻ))", f.mish, f.mish_grad,
        module=_modules.Mish, functions=own("F.mish"), aten_value=_nn.mish, aten_grad=_aten.mish_backward.default,
        node="MishBackward0", spellings=("z * torch.tanh(F.softplus(z))",),
        **_sides("mish"), cpu_pass="avx2",
    ),
    Activation(
        "hardswish", "z · min(max(z + 3, 0), 6) / 6", f.hardswish, f.hardswish_grad,
        module=_modules.Hardswish, functions=own("F.hardswish"),
        aten_value=_nn.hardswish, aten_grad=_aten.hardswish_backward.default,
        node="HardswishBackward0",
    ),
    Activation(
        "hardsigmoid", "min(max(z + 3, 0), 6) / 6", f.hardsigmoid, f.hardsigmoid_grad, f.hardsigmoid_grad_from_output,
        module=_modules.Hardsigmoid, functions=own("F.hardsigmoid"),
        aten_value=_nn.hardsigmoid, aten_grad=_aten.hardsigmoid_backward.default,
    ),
    # From y = z², sqrt(y) is lost where the square leaves the range of the dtype, so `auto` keeps z.
    Activation(
        "relu2", "max(z, 0)²", f.relu2, f.relu2_grad, f.relu2_grad_from_output, output_exact=False,
        spellings=("torch.square(F.relu(z))",), cpu_pass="avx2",
    ),
)  # fmt: skip

ROWS: dict[str, Activation] = {row.name: row for row in TABLE}
NODES: dict[str, tuple[Activation, ...]] = {  # by the name of autograd's node
    name: tuple(row for row in TABLE if row.node == name) for name in dict.fromkeys(row.node for row in TABLE) if name
}


def row_named(name: str) -> Activation:
    """The row of this name."""
    return ROWS[name]


def bind(name: str, params: tuple[float, ...] | None = None) -> Bound:
    """The activation of this name with these parameters, or its defaults."""
    row = ROWS[name]
    return Bound(row, tuple(v for _, v in row.params) if params is None else params)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which elementwise work on tensors of this dtype is done: 16-bit ones are widened."""
    return dtype if dtype == torch.float64 else torch.float32


def one_pass(
    kernel: Callable[..., Tensor] | None, formula: Callable[..., Tensor], params: tuple[float, ...]
) -> Callable[..., Tensor]:
    """PyTorch's kernel where there is one, else the formula, with the parameters bound."""
    if kernel is not None:
        return (lambda *tensors: kernel(*tensors, *params)) if params else kernel
    return lambda *tensors: formula(*(t.to(wide(t.dtype)) for t in tensors), *params).to(tensors[0].dtype)


def nearest(word: str, known: list[str]) -> str:
    """`` did you mean 'gelu'?`` or nothing, for error texts."""
    close = difflib.get_close_matches(word.lower(), known, n=1)
    return f" did you mean {close[0]!r}?" if close else ""
