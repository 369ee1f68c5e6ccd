"""A small vision transformer on scikit-learn's handwritten digits, stock and fused.

The MLPs are written as ``nn.Sequential(nn.Linear, nn.GELU, nn.Linear)``, as many ViTs have them. The fused model's
weights are then loaded into a stock model, which must classify as it does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from common import Record, compare, packages, parse, require, run
from torch import Tensor, nn

import fastbp

with packages("scikit-learn"):
    from sklearn.datasets import load_digits


class Layer(nn.Module):
    """Attention, then the MLP, each behind a norm and around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Scans of 8 x 8 in patches of 2 x 2, and a token for the class."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, patch: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (8 // patch) ** 2, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, scans: Tensor) -> Tensor:
        """Logits for scans of (batch, 1, 8, 8)."""
        x = self.patches(scans).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train and compare; ``accuracy`` on held-out scans, stock and fused, comes with what ``common.compare`` gives."""
    options = parse(argv, __doc__, steps=150, quick=40)
    digits = load_digits()
    scans = torch.from_numpy(digits.images).float().unsqueeze(1).to(options.device)
    scans = (scans - scans.mean()) / scans.std()
    labels = torch.from_numpy(digits.target).long().to(options.device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(options.seed)).to(options.device)
    test, training = order[:300], order[300:]

    def forward(model: nn.Module, pick: Tensor = training[:64]) -> Tensor:
        return F.cross_entropy(model(scans[pick]), labels[pick])

    def train(model: nn.Module, record: Record) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(options.steps):
            loss = forward(model, training[torch.randint(len(training), (64,)).to(options.device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            record(loss.item())

    def stock() -> nn.Module:
        return ViT().to(options.device)

    def fused() -> tuple[nn.Module, fastbp.FusionReport]:
        model = stock()
        return model, fastbp.fuse(model, sample_inputs=scans[training[:8]])

    result = compare(options, stock=stock, variants={"fused": fused}, train=train, forward=forward)

    models = {name: run.model.eval() for name, run in result["runs"].items()}
    with torch.no_grad():
        logits = {name: model(scans[test]) for name, model in models.items()}
        reloaded = stock().eval()
        reloaded.load_state_dict(models["fused"].state_dict())
        again = reloaded(scans[test])
    result["accuracy"] = {name: (x.argmax(-1) == labels[test]).float().mean().item() for name, x in logits.items()}
    same = torch.allclose(again, logits["fused"], rtol=1e-4, atol=1e-4)
    require(result, same, "a stock model with the fused model's weights gives the fused model's logits")
    print("held-out accuracy: " + ", ".join(f"{name} {value:.3f}" for name, value in result["accuracy"].items()))
    return result


if __name__ == "__main__":
    run(main)
