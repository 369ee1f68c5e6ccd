"""What is measured at once: a block of linears, or a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """A block of linears: what it is made of, and the rows it is given."""

    kind: str  # layer, gated, mlp, gated_mlp
    rows: int
    features: tuple[int, ...]  # in, hidden ..., out; a gated block has one hidden size
    activation: str = "gelu"
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        sizes = "→".join(map(str, self.features))
        return f"{self.kind} {self.rows}×{sizes} {self.activation} {name_of(self.dtype)}"

    @property
    def products(self) -> list[tuple[int, int, int]]:
        """Rows, features in and features out of every linear."""
        sizes = list(zip(self.features, self.features[1:], strict=False))
        if self.kind.startswith("gated"):
            sizes = [sizes[0], *sizes]
        return [(self.rows, *size) for size in sizes]


@dataclass(frozen=True)
class Model(Case):
    """A model of benchmarks/models.py: ``rows`` are the tokens of a batch, ``features`` those of a block's MLP."""

    batch: int = 1
    depth: int = 1
    heads: int = 1
    classes: int = 10  # of a picture, or the words there are

    @property
    def length(self) -> int:
        """Tokens of one of the batch."""
        return self.rows // self.batch

    @property
    def name(self) -> str:
        width, hidden, _ = self.features
        blocks = f"{self.depth}×({width}→{hidden}→{width})"
        return f"{self.kind} {self.batch}×{self.length} {blocks} {self.activation} {name_of(self.dtype)}"
