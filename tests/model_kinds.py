"""Models of other packages, small, in float64 and drawn at random: how one is described, built and called."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision_ops
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: no model here is one that is downloaded

Sites = Mapping[str, str]
Inputs = Callable[[], dict[str, Any] | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Known:
    """One architecture: how to build and call it, and what must become of its blocks."""

    package: str
    kind: str  # the class
    build: Callable[[bool], nn.Module]  # with the dropouts of its defaults, or with none
    inputs: Inputs
    fused: Sites  # site: call
    left: Sites = field(default_factory=dict)  # site: words of the reason
    # Of the relative difference of outputs and gradients before and after; larger only where the model computes a part
    # in float32, or with rounded constants, whatever its dtype.
    bound: float = 1e-12
    dtype: torch.dtype = torch.float64
    dropout: bool = True

    def model(self, dropout: bool | None = None) -> nn.Module:
        """In training mode, with biases that are not zero, and weights that reach the bends of every activation."""
        torchvision_ops.declare()
        with torch.random.fork_rng():
            model = self.build(self.dropout if dropout is None else dropout).to(self.dtype).train()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                noise = torch.randn(p.shape, dtype=p.dtype, generator=generator)
                p.copy_(1.5 * noise / p[0].numel() ** 0.5 if p.dim() > 1 else p + 0.3 * noise)
        return model


def expand(sites: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The sites of this very model by name; a pattern that stands for none is a mistake."""
    names, found = [name for name, _ in model.named_modules()], {}
    for pattern, what in sites.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))
        matching = [name for name in names if expression.fullmatch(name)]
        assert matching, f"no module is called {pattern}"
        found |= dict.fromkeys(matching, what)
    return found


def floats(**shapes: tuple[int, ...]) -> Inputs:
    """Inputs of normal random numbers."""

    def draw() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return {name: torch.randn(*shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}

    return draw


def tokens(*names: str, **settings: Any) -> Inputs:
    """Inputs of random tokens, and settings of the call."""

    def draw() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        return {name: torch.randint(3, 64, (2, 7), generator=generator) for name in names} | settings

    return draw


def hf(kind: str, inputs: Inputs, fused: Sites, config: Mapping[str, Any], **facts: Any) -> Known:
    """A class of transformers with its configuration."""

    def build(dropout: bool) -> nn.Module:
        model = getattr(importlib.import_module("transformers"), kind)
        settings = model.config_class(**config)
        if not dropout:
            settings.update({name: 0.0 for name, p in settings.to_dict().items() if "drop" in name and p})
        return model(settings)

    return Known("transformers", kind, build, inputs, fused, **facts)


def made(kind: str, inputs: Inputs, fused: Sites, *args: Any, drop: str = "", **more: Any) -> Known:
    """A class of another package with its arguments; ``drop`` names the one that is a probability of dropping."""
    facts = {name: more.pop(name) for name in ("left", "bound") if name in more}
    module, _, name = kind.rpartition(".")

    def build(dropout: bool) -> nn.Module:
        none = {} if dropout or not drop else {drop: 0.0}
        return getattr(importlib.import_module(module), name)(*args, **more, **none)

    return Known(kind.partition(".")[0], name, build, inputs, fused, **facts)
