"""A physics-informed network for the Poisson equation, in float64, stock and fused: second derivatives in the loss.

-u''(x) = π² sin(πx) on [0, 1], u(0) = u(1) = 0, has the solution u(x) = sin(πx). The loss holds u'', so that training
takes a third derivative through every layer. Here u'' comes in both of PyTorch's ways, from ``torch.autograd.grad`` and
from ``torch.func``, and the network in both of fastbp's, an ``nn.Sequential`` that is fused and a ``fastbp.MLP``. Where
derivatives are in the loss, fastbp computes them with PyTorch's own operations: this shows that they are right, and
saves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from common import Record, compare, parse, run
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fastbp


def by_autograd(network: nn.Module, x: Tensor) -> Tensor:
    """u'' at the points x of (points, 1), differentiable."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return curvature


def by_func(network: nn.Module, x: Tensor) -> Tensor:
    """The same, point by point, with the transforms of ``torch.func``."""
    parameters = dict(network.named_parameters())

    def u(point: Tensor) -> Tensor:
        return functional_call(network, parameters, point.view(1, 1)).squeeze()

    return vmap(grad(grad(u)))(x.flatten()).view(-1, 1)


class Poisson(nn.Module):
    """A network u and how well it solves the equation."""

    def __init__(self, network: nn.Module, curvature: Callable[[nn.Module, Tensor], Tensor] = by_autograd) -> None:
        super().__init__()
        self.network, self.curvature = network, curvature

    def forward(self, x: Tensor) -> Tensor:
        """The mean squared residual at the points x of (points, 1), and of the values at both ends."""
        residual = self.curvature(self.network, x) + math.pi**2 * torch.sin(math.pi * x)
        ends = self.network(x.new_tensor([[0.0], [1.0]]))
        return residual.square().mean() + 100 * ends.square().mean()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and compare; ``errors``, from the solution, come with what ``common.compare`` gives."""
    options = parse(argv, __doc__, steps=600, quick=300)
    settings: dict[str, Any] = dict(device=options.device, dtype=torch.float64)
    sizes = (1, 32, 32, 1)
    points = torch.linspace(0, 1, 64, **settings).view(-1, 1)

    def network() -> nn.Sequential:
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise(sizes):
            layers += [nn.Linear(size_in, size_out, **settings), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    def fused(curvature: Callable[[nn.Module, Tensor], Tensor]) -> tuple[nn.Module, fastbp.FusionReport]:
        model = network()
        report = fastbp.fuse(model, sample_inputs=points)
        return Poisson(model, curvature), report

    def built() -> tuple[nn.Module, None]:
        """The block of the same sizes, which draws the same weights from the same seed."""
        return Poisson(fastbp.MLP(1, sizes[1:-1], 1, activation="tanh", **settings)), None

    def train(model: nn.Module, record: Record) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
        for _ in range(options.steps):
            loss = model(torch.rand(64, 1, **settings))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            record(loss.item())

    def forward(model: nn.Module) -> Tensor:
        # What autograd keeps can be counted; the transforms of torch.func take no saved tensor hooks.
        assert isinstance(model, Poisson)
        return Poisson(model.network)(points)

    variants = {"fuse": lambda: fused(by_autograd), "fuse, torch.func": lambda: fused(by_func), "fastbp.MLP": built}
    result = compare(
        options,
        stock=lambda: Poisson(network()),
        variants=variants,
        train=train,
        forward=forward,
        precision=torch.float64,
    )
    solution = torch.sin(math.pi * points)
    result["errors"] = {}
    for name, trained in result["runs"].items():
        with torch.no_grad():
            u = trained.model.get_submodule("network")(points)
        result["errors"][name] = (u - solution).abs().max().item()
    print("largest error of u: " + ", ".join(f"{name} {error:.1e}" for name, error in result["errors"].items()))
    return result


if __name__ == "__main__":
    run(main)
