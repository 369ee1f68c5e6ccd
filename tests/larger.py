"""Modules with fc1, an activation and fc2 in a forward that does more."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HIDDEN = 8, 24


class Layer(nn.Module):
    """A transformer layer as many write it: attention, a norm, and an MLP with residuals, all in one forward."""

    def __init__(self, activation=None, drop=0.0, drop_by_function=0.0):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.activation_fn = nn.GELU() if activation is None else activation
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm, self.drop, self.activation_dropout = nn.LayerNorm(WIDTH), nn.Dropout(drop), drop_by_function

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor]:
        h = hidden_states + self.self_attn(hidden_states, hidden_states, hidden_states, attn_mask=mask)[0]
        residual, h = h, self.norm(h)
        h = self.drop(self.activation_fn(self.fc1(h)))
        h = F.dropout(h, p=self.activation_dropout, training=self.training)
        return (residual + scale * self.fc2(h),)


class Model(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.layers = nn.ModuleList([Layer(**settings), Layer(**settings)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            (x,) = layer(x, mask, scale=0.5)
        return self.head(x)


X = torch.linspace(-2, 2, 2 * 5 * WIDTH, dtype=torch.float64).sin().view(2, 5, WIDTH)
