"""Blocks whose code is known, and that fuse runs whole."""

import torch
from torch import Tensor, nn

WIDTH = 12


class TwoLinears(nn.Module):
    """fc1, activation, fc2."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 20), activation, nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 16, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(16, WIDTH, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


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


class Swish(nn.Module):
    """A stranger's silu, which nobody is asked to know."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, 18), nn.GELU(), nn.Linear(18, WIDTH),
        nn.Linear(WIDTH, 8), Swish(), nn.Dropout(0.0),
        nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5),
        nn.Linear(5, 5),
    )  # fmt: skip
