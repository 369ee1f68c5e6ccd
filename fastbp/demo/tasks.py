"""What the demo trains: real data that is already on the machine, and ordinary PyTorch models without any fastbp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """A model, its batches in order, what it is tested on, and which part of it fastbp is expected to fuse."""

    name: str
    about: str
    unit: str  # of the loss
    model: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    learning_rate: float
    block: Callable[[nn.Module], nn.Module]  # finds a block of linears and activations in the model
    block_width: int  # of the block's input
    hidden: int  # activations inside the block for one row of its input

    @property
    def steps(self) -> int:
        return len(self.batches)


def digits(device: torch.device, seed: int, quick: bool) -> Task:
    """Scikit-learn's handwritten digits, a fifth held out, and an MLP."""
    from sklearn.datasets import load_digits  # optional dependency

    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=generator)
    scans = torch.from_numpy(data.data).float()[order].to(device) / 16
    labels = torch.from_numpy(data.target).long()[order].to(device)
    test = len(labels) // 5
    train = len(labels) - test
    picks = torch.randint(train, (40 if quick else 300, 128), generator=generator).to(device)
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10))
    return Task(
        name="digits",
        about=f"MLP 64-512-512-10 on {train:,} scans of handwritten digits, {test} held out",
        unit="nats",
        model=model.to(device),
        batches=[(scans[pick], labels[pick]) for pick in picks],
        held_out=(scans[train:], labels[train:]),
        learning_rate=1e-3,
        block=lambda model: model,
        block_width=64,
        hidden=512 + 512,
    )


def text(device: torch.device, seed: int, quick: bool) -> Task:
    """The reference texts in English that come with Python, the last twentieth held out, and a small transformer."""
    from pydoc_data.topics import topics

    corpus = torch.tensor(list("\n".join(topics.values()).encode()), device=device)
    width, context, layers, batch = 128, 64, 2, 16
    train = len(corpus) * 19 // 20
    window = torch.arange(context + 1, device=device)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(train - context, (16 if quick else 300, batch, 1), generator=generator).to(device)
    held_out = corpus[torch.arange(train, len(corpus) - context, context, device=device)[:, None] + window]
    model = Transformer(width, layers, context)
    return Task(
        name="text",
        about=f"transformer, {layers} layers of width {width}, on {train:,} bytes of English (Python's help texts), "
        f"{len(corpus) - train:,} held out",
        unit="nats/byte",
        model=model.to(device),
        batches=[(piece[:, :-1], piece[:, 1:]) for piece in (corpus[start + window] for start in starts)],
        held_out=(held_out[:, :-1], held_out[:, 1:]),
        learning_rate=2e-3,
        block=lambda model: model.get_submodule("layers.0.feed_forward"),
        block_width=width,
        hidden=4 * width,
    )


class FeedForward(nn.Module):
    """The MLP of a transformer layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """fc2(act(fc1(x)))"""
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class Layer(nn.Module):
    """A transformer layer: causal attention, then the MLP, each behind a norm and around a residual."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        """x of (batch, position, width)"""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).flatten(2))
        x = x + self.feed_forward(self.norm2(x))
        return x


class Transformer(nn.Module):
    """A language model over bytes."""

    def __init__(self, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.positions = nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)

    def forward(self, bytes: Tensor) -> Tensor:
        """The logits of the next byte at every position of (batch, position)."""
        x = self.bytes(bytes) + self.positions.weight[: bytes.shape[1]]
        logits: Tensor = self.head(self.norm(self.layers(x)))
        return logits
