"""What is measured at once: a block of linears, or a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """A block of linears: what it is made of, and the rows it is given."""

    kind: str  # layer, gated, mlp, gated_mlp; or activation, which has no linear
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
    def products(self) -> list[tuple[int, int, int]]:
        """Of every linear, the first and the last of the model among them."""
        width, hidden, _ = self.features
        mlp = [(width, hidden)] * (2 if self.kind == "llama" else 1) + [(hidden, width)]
        blocks = [(self.rows, *size) for size in [(width, 3 * width), (width, width), *mlp]] * self.depth
        if self.kind == "vit":
            patches = (self.rows - self.batch, 3 * 16 * 16, width)
            return [patches, *blocks, (self.batch, width, self.classes)]
        return [*blocks, (self.rows, width, self.classes)]

    @property
    def attention(self) -> int:
        """Arithmetic of attention's two products, by feature and block: of half the pairs where words look back."""
        return 4 * self.rows * self.length // (1 if self.kind == "vit" else 2)

    @property
    def name(self) -> str:
        width, hidden, _ = self.features
        blocks = f"{self.depth}×({width}→{hidden}→{width})"
        return f"{self.kind} {self.batch}×{self.length} {blocks} {self.activation} {name_of(self.dtype)}"


def flops(case: Case, mode: str) -> int:
    """Arithmetic of a step's products: of backward twice that of forward."""
    forward = sum(2 * rows * into * out for rows, into, out in case.products)
    if isinstance(case, Model):
        forward += case.attention * case.features[0] * case.depth
    return forward * _PASSES[mode]


def least_bytes(case: Case, mode: str) -> int:
    """What a step's products must at least read and write: every operand and every result once."""
    moved = sum(rows * into + into * out + rows * out for rows, into, out in case.products)
    if isinstance(case, Model):
        moved += 4 * case.rows * case.features[0] * case.depth  # q, k, v and what comes of them
    return moved * case.dtype.itemsize * _PASSES[mode]


_PASSES = {"fwd": 1, "bwd": 2, "fwd_bwd": 3, "train": 3}
