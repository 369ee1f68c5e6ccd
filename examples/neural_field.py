"""A neural field, stock and fused: the signed distance of a shape from points on its outline.

The network sees the outline and its normals, and otherwise learns from the eikonal equation |∇f| = 1 alone: the
gradient by the input is in the loss, a double backward through every layer. The shape is a ring, whose distance is
known. ``--out field.png`` draws both fields and their difference (needs matplotlib).
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import Record, compare, packages, parse, run
from torch import Tensor, nn

import fastbp

RADIUS, HALF_WIDTH = 0.6, 0.2


def distance(x: Tensor) -> Tensor:
    """The signed distance of points (n, 2) from the ring's outline, negative inside the ring: (n, 1)."""
    return (x.norm(dim=1, keepdim=True) - RADIUS).abs() - HALF_WIDTH


def outline(count: int) -> tuple[Tensor, Tensor]:
    """Random points on the outline, and its normals there."""
    angle = math.tau * torch.rand(count)
    side = 2.0 * torch.randint(2, (count, 1)) - 1
    direction = torch.stack([angle.cos(), angle.sin()], dim=1)
    return (RADIUS + HALF_WIDTH * side) * direction, side * direction


def loss_of(field: nn.Module, points: Tensor, normals: Tensor, anywhere: Tensor) -> Tensor:
    """The field is 0 on the outline, its slope there the normal, and of length 1 everywhere."""
    x = torch.cat([points, anywhere]).requires_grad_()
    f = field(x)
    (slope,) = torch.autograd.grad(f.sum(), x, create_graph=True)
    on, off = slope.split([len(points), len(anywhere)])
    eikonal = (off.norm(dim=1) - 1).square().mean()
    return 10 * f[: len(points)].square().mean() + (on - normals).square().sum(1).mean() + eikonal


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and compare; ``errors``, the mean ones of the distance, come with what ``common.compare`` gives."""
    extras = {"--out": dict(type=Path, metavar="PNG", help="write a picture there")}
    options = parse(argv, __doc__, steps=400, quick=150, extras=extras)
    device = options.device

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        points, normals = outline(256)
        return points.to(device), normals.to(device), (2 * torch.rand(256, 2) - 1).to(device)

    def train(field: nn.Module, record: Record) -> None:
        optimizer = torch.optim.Adam(field.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
        for _ in range(options.steps):
            loss = loss_of(field, *draw())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            record(loss.item())

    def stock() -> nn.Module:
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise((2, 64, 64, 64, 1)):
            layers += [nn.Linear(size_in, size_out), nn.Softplus(beta=30)]
        return nn.Sequential(*layers[:-1]).to(device)

    def fused() -> tuple[nn.Module, fastbp.FusionReport]:
        field = stock()
        return field, fastbp.fuse(field, sample_inputs=draw()[2])

    result = compare(
        options, stock=stock, variants={"fused": fused}, train=train, forward=lambda field: loss_of(field, *draw())
    )
    side = torch.linspace(-1, 1, 101, device=device)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        fields = {name: run.model(grid) for name, run in result["runs"].items()}
    result["errors"] = {name: (f - distance(grid)).abs().mean().item() for name, f in fields.items()}
    print("mean error of the distance: " + ", ".join(f"{name} {e:.4f}" for name, e in result["errors"].items()))
    if options.out:
        picture(options.out, {name: fields[name].view(101, 101).T.cpu().numpy() for name in ("stock", "fused")})
    return result


def picture(path: Path, fields: dict[str, Any]) -> None:
    """Both fields with their outlines, and the difference."""
    with packages("matplotlib"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    difference = fields["fused"] - fields["stock"]
    panels = {**fields, f"difference, at most {abs(difference).max():.1e}": difference}
    for axes, (title, values) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        limit = float(abs(values).max()) or 1.0
        image = axes.imshow(values, extent=(-1, 1, -1, 1), origin="lower", cmap="RdBu", vmin=-limit, vmax=limit)
        if title in fields:
            axes.contour(values, levels=[0.0], extent=(-1, 1, -1, 1), colors="black")
        figure.colorbar(image, ax=axes)
        axes.set_title(title)
    figure.savefig(path, dpi=120)
    print(f"picture: {path}")


if __name__ == "__main__":
    run(main)
