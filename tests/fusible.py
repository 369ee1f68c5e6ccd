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


class Dense(nn.Module):
    """A linear and its activation."""

    def __init__(self, behind=None):
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(WIDTH, 20), nn.GELU()
        if behind is not None:
            self.behind = behind

    def forward(self, hidden_states: Tensor) -> Tensor:
        h = self.intermediate_act_fn(self.dense(hidden_states))
        return self.behind(h) if hasattr(self, "behind") else h


class Packed(nn.Module):
    """Gate and up in one linear."""

    def __init__(self, interleaved, gate_first, down=True, bias=True, width=WIDTH, hidden=16):
        super().__init__()
        self.interleaved, self.gate_first = interleaved, gate_first
        self.Wi = nn.Linear(width, 2 * hidden, bias=bias)
        self.act, self.drop = nn.SiLU(), nn.Dropout(0.3)
        if down:
            self.Wo = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.Wi(x)
        a, b = (h[..., ::2], h[..., 1::2]) if self.interleaved else h.chunk(2, dim=-1)
        h = self.drop(self.act(a) * b if self.gate_first else a * self.act(b))
        return self.Wo(h) if hasattr(self, "Wo") else h


class Chain(TwoLinears):
    """Norms and dropouts before, between and after."""

    def __init__(self, before=None, between=None, after=None):
        super().__init__(nn.GELU())
        self.before, self.between, self.after = (m or nn.Identity() for m in (before, between, after))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fc2(self.between(self.act(self.fc1(self.before(x))))))


class Transposed(nn.Module):
    """Keeps its weight as (in, out), as the first GPT-2 did."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


class Own(nn.Linear):
    """The same product, written otherwise; and twice that, if asked."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T + self.bias) * self.scale


def two(make) -> nn.Module:
    model = TwoLinears(nn.GELU())
    model.fc1, model.fc2 = make(WIDTH, 20), make(20, WIDTH)
    return model


def assert_same_training(model: nn.Module, stock: nn.Module, x: Tensor) -> None:
    """Steps evaluating and training; dropouts draw the same numbers."""
    for training in (False, True):
        for m in (model, stock):
            m.train(training)
        torch.manual_seed(3)
        state = torch.get_rng_state()
        mine = steps(model, x)
        torch.set_rng_state(state)
        for a, b in zip(mine, steps(stock, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def steps(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    parameters = list({id(p): p for p in model.parameters()}.values())
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), parameters)]


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
