"""What a module has to be a block with: its linears, its activations, and the children that are neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fastbp import recognition
from fastbp.activations import Bound
from fastbp.fusion.linears import LinearKind, is_function, kind_of, looks_linear


@dataclass(frozen=True)
class Members:
    """Of one module, by the names of its attributes."""

    children: Mapping[str, nn.Module]
    kinds: Mapping[str, LinearKind]  # children that stand for x Wᵀ + b
    unplain: tuple[str, ...]  # children that look like it, and are wrapped or changed
    acts: Mapping[str, Bound]  # children that are activations
    functions: Mapping[str, Bound]  # attributes that are functions and activations

    @property
    def strangers(self) -> list[nn.Module]:
        """The children that are neither."""
        return [c for n, c in self.children.items() if n not in self.kinds and n not in self.acts]


def members_of(module: nn.Module) -> Members:
    """The members of a module as it is now."""
    children = {name: child for name, child in module._modules.items() if child is not None}
    kinds = {name: kind for name, child in children.items() if (kind := kind_of(child)) is not None}
    others = {name: child for name, child in children.items() if name not in kinds}
    return Members(
        children,
        kinds,
        tuple(name for name, child in others.items() if looks_linear(child)),
        {name: bound for name, child in others.items() if (bound := _activation(child)) is not None},
        {n: b for n, value in vars(module).items() if is_function(value) and (b := _activation(value)) is not None},
    )


def _activation(given: object) -> Bound | None:
    try:
        bound = recognition.resolve(given)
    except (TypeError, ValueError):
        return None
    return None if bound.name == "identity" else bound
