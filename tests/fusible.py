"""Blocks that can be fused, and one step of a model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 12


class TwoLinears(nn.Module):
    """fc1, activation, fc2 under the names the subclass or caller chooses."""

    def __init__(self, activation, names=("fc1", "fc2"), hidden=20, out=WIDTH, dropout=None):
        super().__init__()
        self.names = names
        setattr(self, names[0], nn.Linear(WIDTH, hidden))
        setattr(self, names[1], nn.Linear(hidden, out))
        self.act = activation
        if dropout is not None:
            self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = getattr(self, self.names[1])(self.act(getattr(self, self.names[0])(x)))
        return self.dropout(y) if hasattr(self, "dropout") else y


class Written(TwoLinears):
    """The activation stands in the forward."""

    def __init__(self):
        super().__init__(None)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Residual(TwoLinears):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Scaled(TwoLinears):
    """Something stands between the linear and its activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(2 * self.fc1(x)))


class Gated(nn.Module):
    def __init__(self, names=("gate_proj", "up_proj", "down_proj"), swap=False):
        super().__init__()
        self.names, self.swap = names, swap
        for name, sizes in zip(names, ((WIDTH, 16), (WIDTH, 16), (16, WIDTH)), strict=True):
            setattr(self, name, nn.Linear(*sizes, bias=False))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (getattr(self, name) for name in self.names)
        return c(a(x) * self.act_fn(b(x))) if self.swap else c(self.act_fn(a(x)) * b(x))


class Swish(nn.Module):
    """A stranger's name for silu."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and every gradient; dropouts draw the same numbers each time."""
    x = x.clone().requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        y = model(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], dy)]


def assert_same_step(model: nn.Module, stock: nn.Module, x: Tensor) -> None:
    for a, b in zip(step(model, x), step(stock, x), strict=True):
        torch.testing.assert_close(a, b)


def with_child(name: str, child: nn.Module) -> nn.Module:
    """A block with one child more, or another."""
    model = TwoLinears(nn.GELU())
    setattr(model, name, child)
    return model


BLOCKS = {
    "fc1/fc2": (lambda: TwoLinears(nn.GELU()), "mlp, gelu"),
    "other names, second first": (lambda: TwoLinears(nn.ReLU(), ("a_out", "b_in")), "mlp, relu"),
    "square": (lambda: TwoLinears(nn.Tanh(), hidden=WIDTH), "mlp, tanh"),
    "idle dropout": (lambda: TwoLinears(nn.GELU(), dropout=0.0), "mlp, gelu"),
    "dropout": (lambda: TwoLinears(nn.GELU(), dropout=0.1), "mlp, gelu"),
    "residual": (lambda: Residual(nn.GELU()), "mlp, gelu"),
    "another activation, never called": (lambda: with_child("act2", nn.ReLU()), "mlp, gelu"),
    "function attribute": (lambda: TwoLinears(F.silu), "mlp, silu"),
    "stranger's module": (lambda: TwoLinears(Swish()), "mlp, silu"),
    "parameters": (lambda: TwoLinears(nn.LeakyReLU(0.2)), "mlp, leaky_relu(negative_slope=0.2)"),
    "written in forward": (Written, "mlp, gelu_tanh"),
    "gated": (Gated, "gated_mlp, silu"),
    "gated, other names": (lambda: Gated(("w1", "w3", "w2")), "gated_mlp, silu"),
    "gated, gate second": (lambda: Gated(swap=True), "gated_mlp, silu"),
}


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, 18), nn.GELU(), nn.Linear(18, WIDTH),
        nn.Linear(WIDTH, 8), Swish(), nn.Dropout(0.0),
        nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5),
        nn.Linear(5, 5),
    )  # fmt: skip
