"""Random modules: linears, activations, products, clamps, casts, dropouts, views, in-place steps, reuse, branches."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, ROWS = 6, 5


def old_gelu(z: Tensor) -> Tensor:
    return 0.5 * z * (1.0 + torch.tanh(0.7978845608028654 * (z + 0.044715 * torch.pow(z, 3.0))))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "old_gelu": old_gelu,
    "silu": F.silu,
    "swish": lambda z: z * torch.sigmoid(z),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "other_swish": lambda z: z * torch.sigmoid(1.5 * z),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z) ** 2,
    "relu3": lambda z: F.relu(z) ** 3,
    "square": torch.square,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "softplus": lambda z: F.softplus(z, 2.0, 15.0),
    "softsign": F.softsign,
    "elu": lambda z: F.elu(z, 0.7),
    "celu": lambda z: F.celu(z, 1.3),
    "selu": F.selu,
    "glu": lambda z: F.glu(torch.cat((z, 0.5 * z), -1)),
    "silu_in_place": lambda z: F.silu(z * 1.1, inplace=True),
    "module": nn.GELU(),
}


class Program(nn.Module):
    """A forward drawn by ``seed``: each step makes a tensor (ROWS, WIDTH) of those before it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=draw.random() < 0.7) for _ in range(6))
        self.packed = nn.Linear(WIDTH, 2 * WIDTH)
        for linear in self.linears:
            if draw.random() < 0.1:
                linear.requires_grad_(False)
        self.mask = nn.Buffer((torch.rand(WIDTH) > 0.3).double())
        self.steps = [self._draw(draw, i) for i in range(draw.randint(6, 16))]
        self.log: list[float] = []
        self.seen: list[Tensor] = []

    def _draw(self, draw: random.Random, count: int) -> tuple[Any, ...]:
        """A step: its name, and which tensors and numbers it takes; the latest are the likeliest."""

        def at() -> int:
            return count if draw.random() < 0.7 else draw.randint(0, count)

        names = (
            *["linear"] * 5, *["activation"] * 5, "gate", "gate", "gate", "product", "clamp", "cast", "dropout",
            "scale", "mask", "view", "rows", "packed", "in_place", "add", "branch", "log", "hook", "late_hook",
            "retain", "divide", "detached", "swiglu", "swiglu", "lora", "pair", "early_reader", "gate_hook",
        )  # fmt: skip
        name = draw.choice(names)
        return name, at(), at(), draw.randrange(6), draw.choice(list(ACTIVATIONS)), draw.random()

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            values.append(self._step(values, *step))
        return sum(values[-3:])  # type: ignore[return-value]

    def _step(self, values: list[Tensor], name: str, i: int, j: int, n: int, activation: str, number: float) -> Tensor:
        v, w, f, linear = values[i], values[j], ACTIVATIONS[activation], self.linears[n]
        match name:
            case "linear":
                return linear(v)
            case "activation":
                return f(v)
            case "gate":
                return linear(f(v) * w if number < 0.5 else w * f(v))
            case "swiglu":
                return linear(f(self.linears[n - 1](v)) * self.linears[n - 2](v))
            case "pair":
                return linear(f(self.linears[n - 1](v)))
            case "lora":
                h = f(v) * w
                return linear(h) + self.linears[n - 1](F.dropout(h, 0.2, self.training)) * 0.5
            case "product":
                return v * w
            case "clamp":
                return v.clamp(-1.0, number)
            case "cast":
                return v.float().double()
            case "dropout":
                return linear(F.dropout(f(v), 0.3, self.training))
            case "scale":
                return linear(f(v) * (0.5 + number) if number < 0.5 else number * f(v))
            case "mask":
                return linear(f(v) * self.mask)
            case "divide":
                return linear(f(v) / (0.5 + number) if number < 0.5 else f(v) / (2.0 + w * w))
            case "view":
                return linear(f(v).view(-1).view(ROWS, WIDTH)) if number < 0.5 else v.t().contiguous().t()
            case "rows":
                return torch.cat((linear(f(v)[:2]), linear(f(v)[2:])))
            case "packed":
                a, b = self.packed(v).chunk(2, dim=-1)
                return linear(f(a) * b) if number < 0.6 else linear(b * torch.sigmoid(a))
            case "in_place":
                h = f(v)
                y = linear(h)
                if number < 0.3:
                    y.mul_(1.5)
                elif number < 0.6:
                    y += v
                return y
            case "add":
                return linear(f(v) + number)
            case "branch":
                return linear(f(v)) if v.detach().mean() > 0.1 * number else v * 0.9
            case "log":
                h = f(v)
                self.log.append(float(h.detach().abs().mean()))
                return linear(h)
            case "hook":
                h = f(v) * w
                if h.requires_grad:
                    h.register_hook(lambda g: g * 0.5)
                return linear(h)
            case "late_hook":
                h = f(v) * w if number < 0.5 else f(v)
                y = linear(h) + self.linears[n - 1](h)
                if h.requires_grad:
                    h.register_hook(lambda g: self.log.append(float(g.detach().norm())) or g.tanh())
                return y
            case "early_reader":
                h = f(v) * w
                y = h.sin() + linear(h)
                if h.requires_grad:
                    h.register_hook(lambda g: self.log.append(float(g.detach().norm())) or g.tanh())
                return y
            case "gate_hook":
                a = f(v)
                y = linear(a * w)
                if a.requires_grad:
                    a.register_hook(lambda g: self.log.append(float(g.detach().norm())) or g.tanh())
                return y
            case "retain":
                h = f(v)
                y = linear(h)
                if h.requires_grad:
                    h.retain_grad()
                    self.seen.append(h)
                return y
            case "detached":
                return linear(f(v)) + linear(f(v).detach())
        raise AssertionError(name)
