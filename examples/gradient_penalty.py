"""A WGAN-GP critic, stock and fused: the norm of a gradient in the loss, a double backward through every layer.

The critic is trained between two samples whose Wasserstein distance is known: eight Gaussians on a ring, and the same
ring moved by a vector. The distance is the vector's length, and the critic must find it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from common import Record, compare, parse, run
from torch import Tensor, nn

import fastbp

MOVE = (1.5, 2.0)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and compare; ``distances``, as the critics estimate them, come with what ``common.compare`` gives."""
    options = parse(argv, __doc__, steps=400, quick=150)
    device = options.device

    def ring(count: int) -> Tensor:
        angle = torch.randint(8, (count,)) * (math.tau / 8)
        return (torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * torch.randn(count, 2)).to(device)

    def real(count: int) -> Tensor:
        return ring(count) + torch.tensor(MOVE, device=device)

    def loss_of(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
        between = torch.lerp(real, fake, torch.rand(len(real), 1).to(device)).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return critic(fake).mean() - critic(real).mean() + 10 * penalty

    def train(critic: nn.Module, record: Record) -> None:
        optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.9))
        for _ in range(options.steps):
            loss = loss_of(critic, real(256), ring(256))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            record(loss.item())

    def stock() -> nn.Module:
        return nn.Sequential(
            nn.Linear(2, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, 1),
        ).to(device)

    def fused() -> tuple[nn.Module, fastbp.FusionReport]:
        critic = stock()
        return critic, fastbp.fuse(critic, sample_inputs=ring(16))

    result = compare(
        options,
        stock=stock,
        variants={"fused": fused},
        train=train,
        forward=lambda critic: loss_of(critic, real(256), ring(256)),
    )
    torch.manual_seed(options.seed)
    held_out = real(2048), ring(2048)
    result["distances"] = {name: distance(run.model, *held_out) for name, run in result["runs"].items()}
    found = ", ".join(f"{name} {value:.3f}" for name, value in result["distances"].items())
    print(f"Wasserstein distance: {math.hypot(*MOVE):.3f}; by the critics: {found}")
    return result


def distance(critic: nn.Module, real: Tensor, fake: Tensor) -> float:
    """What the critic makes of two samples, over its slope, which the penalty lets exceed 1 by a little."""
    between = torch.lerp(real, fake, 0.5).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between)
    gap = critic(real).mean() - critic(fake).mean()
    return (gap / slope.norm(dim=1).mean()).item()


if __name__ == "__main__":
    run(main)
