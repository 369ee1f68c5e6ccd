"""Rivals from other packages, by what they offer their users. A package is imported where a case is made of it.

Some want a gate and its up projection as one weight. That is joined once, as such a model would hold it; what is timed
are gradients of the joined one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case

Split = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class Joined:
    """A block with parameters of its own: weights and biases in turn, the first two linears' as one where gated."""

    call: Callable[[Tensor], Tensor]
    own: list[Tensor]
    split: Split | None

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x)

    def as_given(self, gradients: list[Tensor]) -> list[Tensor]:
        """Gradients of its own parameters as those of the linears it is made of."""
        if self.split is None:
            return gradients
        (gate, up), (gate_bias, up_bias) = map(self.split, gradients[:2])
        return [gate, gate_bias, up, up_bias, *gradients[2:]]


def _parameters(linears: list[nn.Linear]) -> list[Tensor]:
    return [t for linear in linears for t in (linear.weight, linear.bias)]


def _stacked(gate: Tensor, up: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([gate, up]).detach())


def _interleaved(gate: Tensor, up: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.stack([gate, up], 1).flatten(0, 1).detach())


def _joined(linears: list[nn.Linear], join: Callable[[Tensor, Tensor], nn.Parameter]) -> list[Tensor]:
    gate, up, *down = linears
    return [join(gate.weight, up.weight), join(gate.bias, up.bias), *_parameters(down)]


def quack(case: Case, linears: list[nn.Linear]) -> Joined:
    """quack.mlp.mlp_func, whose module leaves its fused path for a bias in training, and which itself does not."""
    mlp: Any = import_module("quack.mlp").mlp_func
    gated = case.kind == "gated_mlp"
    plain = {"gelu_tanh": "gelu_tanh_approx", "silu": "silu", "relu": "relu"}
    name = ({"gelu_tanh": "geglu", "silu": "swiglu", "relu": "reglu"} if gated else plain)[case.activation]
    own = _joined(linears, _interleaved) if gated else _parameters(linears)
    first, first_bias, second, second_bias = own

    def call(x: Tensor) -> Tensor:
        return mlp(x, first, second, activation=name, bias1=first_bias, bias2=second_bias)  # type: ignore[no-any-return]

    return Joined(call, own, (lambda t: (t[::2], t[1::2])) if gated else None)


def liger(case: Case, linears: list[nn.Linear]) -> Callable[[Tensor], Tensor]:
    """Its elementwise product of an activated gate, between PyTorch's linears."""
    ops: Any = import_module("liger_kernel.ops")
    multiply = {"silu": "LigerSiLUMulFunction", "gelu_tanh": "LigerGELUMulFunction"}[case.activation]
    product = getattr(ops, multiply).apply
    gate, up, *down = linears

    def call(x: Tensor) -> Tensor:
        h: Tensor = product(gate(x), up(x))
        return down[0](h) if down else h

    return call


def transformer_engine(case: Case, linears: list[nn.Linear]) -> Joined:
    """A te.ops.Sequential, in which it fuses what it can."""
    ops: Any = import_module("transformer_engine.pytorch").ops
    gated = case.kind.startswith("gated")
    names = {"relu": ("ReLU", "ReGLU"), "gelu_tanh": ("GELU", "GEGLU"), "silu": ("SiLU", "SwiGLU")}
    activation = getattr(ops, names[case.activation][gated])
    own = _joined(linears, _stacked) if gated else _parameters(linears)  # the first half is the gate
    layers: list[Any] = []
    for weight, bias in zip(own[::2], own[1::2], strict=True):
        out, into = weight.shape
        linear = ops.Linear(into, out, device=weight.device, dtype=weight.dtype)
        linear.weight, linear.bias = weight, bias
        layers += [linear, activation()]
    ends_in_linear = case.kind in ("mlp", "gated_mlp")
    module: Callable[[Tensor], Tensor] = ops.Sequential(*(layers[:-1] if ends_in_linear else layers))
    return Joined(module, own, (lambda t: t.chunk(2)) if gated else None)  # type: ignore[arg-type, return-value]


def odd_relu(case: Case, device: torch.device) -> str | None:
    """What flash_attention leaves to PyTorch without a word."""
    odd = case.activation == "relu" and case.features[0] % 128
    return "with ReLU it takes features in multiples of 128" if odd else None


def flash_attention(case: Case, linears: list[nn.Linear]) -> Callable[[Tensor], Tensor]:
    """flash_attn.ops.fused_dense.FusedMLP, with the heuristic that it picks itself."""
    into, hidden, out = case.features
    activation = {"gelu_tanh": "gelu_approx", "relu": "relu"}[case.activation]
    dtype, device = linears[0].weight.dtype, linears[0].weight.device
    make: Any = import_module("flash_attn.ops.fused_dense").FusedMLP
    module = make(into, hidden, out, activation=activation, dtype=dtype, device=device)
    module.fc1, module.fc2 = linears

    def call(x: Tensor) -> Tensor:
        module.training = torch.is_grad_enabled()  # or what backward needs is written in a forward pass alone
        return module(x)  # type: ignore[no-any-return]

    return call
