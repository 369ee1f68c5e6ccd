"""Whole models in plain PyTorch, as people write them: a ViT, a GPT-2 and a Llama, of any size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Model

PATCH = 16  # pixels on a side of a ViT's token
ACTIVATIONS: dict[str, nn.Module] = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU()}


class Attention(nn.Module):
    """Self-attention of several heads; ``rotary`` is the cosine and sine of every place and frequency, if any."""

    def __init__(self, width: int, heads: int, causal: bool, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width, bias=bias, dtype=dtype)
        self.out = nn.Linear(width, width, bias=bias, dtype=dtype)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if rotary is not None:
            q, k = rotated(q, *rotary), rotated(k, *rotary)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


class Mlp(nn.Module):
    """Of a ViT and a GPT-2."""

    def __init__(self, width: int, hidden: int, activation: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden, dtype=dtype), nn.Linear(hidden, width, dtype=dtype)
        self.act = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class GatedMlp(nn.Module):
    """Of a Llama."""

    def __init__(self, width: int, hidden: int, activation: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False, dtype=dtype)
        self.act = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def norm_of(case: Model) -> nn.Module:
    norm = nn.RMSNorm if case.kind == "llama" else nn.LayerNorm
    return norm(case.features[0], eps=1e-5, dtype=case.dtype)  # RMSNorm's own depends on the dtype


class Block(nn.Module):
    """Attention and an MLP, each on what is normalised, each added to what there was."""

    def __init__(self, case: Model) -> None:
        super().__init__()
        width, hidden, _ = case.features
        llama = case.kind == "llama"
        self.norm1, self.norm2 = norm_of(case), norm_of(case)
        self.attention = Attention(width, case.heads, case.kind != "vit", not llama, case.dtype)
        self.mlp = (GatedMlp if llama else Mlp)(width, hidden, case.activation, case.dtype)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Logits: of each picture's class by a ViT, of each next word by the others."""

    def __init__(self, case: Model) -> None:
        super().__init__()
        width, dtype = case.features[0], case.dtype
        self.kind = case.kind
        if self.kind == "vit":
            self.patches = nn.Conv2d(3, width, PATCH, PATCH, dtype=dtype)
            self.first = nn.Parameter(torch.randn(1, 1, width, dtype=dtype) * 0.02)
        else:
            self.words = nn.Embedding(case.classes, width, dtype=dtype)
        if self.kind == "llama":
            half = width // case.heads // 2
            angles = torch.outer(torch.arange(case.length), 1e4 ** (-torch.arange(half) / half))
            self.register_buffer("cos", angles.cos().to(dtype))
            self.register_buffer("sin", angles.sin().to(dtype))
        else:
            self.places = nn.Parameter(torch.randn(1, case.length, width, dtype=dtype) * 0.02)
        self.blocks = nn.ModuleList(Block(case) for _ in range(case.depth))
        self.norm = norm_of(case)
        self.head = nn.Linear(width, case.classes, bias=self.kind == "vit", dtype=dtype)
        if self.kind == "gpt2":
            self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "vit":
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        else:
            x = self.words(x)
        rotary = (self.cos, self.sin) if self.kind == "llama" else None
        x = x if rotary else x + self.places
        for block in self.blocks:
            x = block(x, rotary)
        return self.head(self.norm(x[:, 0] if self.kind == "vit" else x))  # type: ignore[no-any-return]


def build(case: Model) -> nn.Module:
    """The model of a case, with PyTorch's initial weights but words and places as small as GPT-2's."""
    model = Transformer(case)
    if case.kind != "vit":
        nn.init.normal_(model.words.weight, std=0.02)
    return model


def batch(case: Model, device: torch.device, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Random inputs, and the classes or words that are to come out."""

    def draw(*shape: int) -> Tensor:
        return torch.randint(case.classes, shape, device=device, generator=generator)

    if case.kind != "vit":
        return draw(case.batch, case.length), draw(case.batch, case.length)
    side = PATCH * math.isqrt(case.length - 1)  # a token is the class's
    shape = (case.batch, 3, side, side)
    return torch.randn(shape, dtype=case.dtype, device=device, generator=generator), draw(case.batch)
