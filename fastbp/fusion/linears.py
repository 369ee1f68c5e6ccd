"""Children that compute ``x Wᵀ + b``: nn.Linear, and by their values others with the same two parameters.

A subclass of nn.Linear with a forward of its own, or a layer that keeps its weight as (in, out), as the Conv1D of GPT-2
does, is run once on small random numbers. What it then was is compared at each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbp.fusion.probe import quiet, shadow
from fastbp.linear import Linear
from fastbp.modules import PLAIN_TENSORS, is_plain, plain_parts
from fastbp.recognition import has_hooks

Parts = tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]
_SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Settings:
    """The numbers, names and functions among a module's attributes, which its forward may read."""

    names: tuple[tuple[str, Any], ...]  # with what the class has under the name
    values: tuple[Any, ...]

    def hold(self, module: nn.Module) -> bool:
        """Whether they still are what they were."""
        own = module.__dict__
        return tuple([own.get(name, default) for name, default in self.names]) == self.values


def settings_of(module: nn.Module) -> Settings:
    """The settings as they are now; ``training`` is none of them."""
    classes = [c for c in reversed(type(module).__mro__) if issubclass(c, nn.Module) and c is not nn.Module]
    shared = {name: value for c in classes for name, value in vars(c).items() if isinstance(value, _SCALARS)}
    found = {name: value for name, value in (shared | vars(module)).items() if _is_setting(name, value)}
    return Settings(tuple((name, shared.get(name)) for name in found), tuple(found.values()))


def _is_setting(name: str, value: object) -> bool:
    return name != "training" and not name.startswith("_") and (isinstance(value, _SCALARS) or is_function(value))


def is_function(value: object) -> bool:
    """Whether an attribute is a function and no module or class."""
    return callable(value) and not isinstance(value, (nn.Module, type))


@dataclass(frozen=True)
class LinearKind:
    """How a child computes ``x Wᵀ + b``; for nn.Linear there is nothing to remember."""

    kind: type[nn.Module]
    transposed: bool  # the weight is kept as (in, out)
    settings: Settings

    def holds(self, child: nn.Module) -> bool:
        """Whether the child still is what it was."""
        return (
            type(child) is self.kind
            and not has_hooks(child)
            and type(child.weight) in PLAIN_TENSORS
            and self.settings.hold(child)
        )


def kind_of(child: nn.Module | None) -> LinearKind | None:
    """How a child stands for a linear layer; None if it does not."""
    if child is None or isinstance(child, torch.jit.ScriptModule):
        return None
    if type(child) in (nn.Linear, Linear):
        return LinearKind(type(child), False, Settings((), ())) if is_plain(child) else None
    own = child._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if (
        weight is None
        or weight.ndim != 2
        or own.keys() - {"weight", "bias"}
        or child._modules
        or child._buffers
        or type(weight) not in PLAIN_TENSORS
        or has_hooks(child)
    ):
        return None
    for transposed in (False, True):
        out_features = weight.shape[1 if transposed else 0]
        if (bias is None or bias.shape == (out_features,)) and _is_linear(child, out_features, transposed):
            return LinearKind(type(child), transposed, settings_of(child))
    return None


def _is_linear(child: nn.Module, out_features: int, transposed: bool) -> bool:
    """Whether a shallow copy of the child with few input features computes a linear layer, with its gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    x, weight, bias = draw(3, 2, 5), draw(*((5, out_features) if transposed else (out_features, 5))), draw(out_features)
    given = [x, weight] + ([bias] if child._parameters.get("bias") is not None else [])
    parameters = dict(zip(("weight", "bias"), map(nn.Parameter, given[1:]), strict=False))
    probes = [shadow(child, _parameters={"bias": None} | parameters, training=t) for t in (True, False)]
    inputs = [x, *parameters.values()]
    with quiet():
        ours = torch.nn.functional.linear(x, weight.mT if transposed else weight, bias if len(given) == 3 else None)
        dy = torch.randn(ours.shape, dtype=torch.float64, generator=generator)
        wanted = [ours, *torch.autograd.grad(ours, given, dy)]
        try:
            outputs = [type(probe).forward(probe, x) for probe in probes]
            found = [[y, *torch.autograd.grad(y, inputs, dy)] for y in outputs]
        except Exception:  # a stranger's forward: then it is no linear layer
            return False
    return all(
        a.shape == b.shape and torch.allclose(a, b, 1e-12, 1e-12)
        for theirs in found
        for a, b in zip(theirs, wanted, strict=True)
    )


def parts_of(children: Sequence[nn.Module | None], kinds: Sequence[LinearKind]) -> Parts | None:
    """The weights as (out, in) and the biases of children that still are what they were; None if one is not."""
    if all(kind.kind is nn.Linear for kind in kinds):
        return plain_parts(children)  # type: ignore[arg-type]
    weights: tuple[Any, ...] = ()
    biases: tuple[Any, ...] = ()
    for child, kind in zip(children, kinds, strict=True):
        if child is None or not kind.holds(child):
            return None
        weights = (*weights, child.weight.mT if kind.transposed else child.weight)
        biases = (*biases, child.bias)
    return None if plain_parts(()) is None else (weights, biases)


def looks_linear(child: nn.Module | None) -> bool:
    """Whether a child is a linear layer, or what somebody put around one."""
    return isinstance(child, nn.Linear) or (hasattr(child, "in_features") and hasattr(child, "out_features"))


def not_plain(names: Sequence[str]) -> str:
    """Why a block with these linears is left."""
    return f"{', '.join(names)} is not a plain nn.Linear (a subclass, hooks, or a wrapped weight)"


def may_idle(module: nn.Module | None) -> bool:
    """Whether a child is of a kind that can be idle."""
    return type(module) in (nn.Identity, nn.Dropout)


def is_idle(module: nn.Module | None) -> bool:
    """Whether a child hands on what it gets: an nn.Identity, or a dropout that does not drop now."""
    kind = type(module)
    if kind is not nn.Identity and kind is not nn.Dropout:  # may_idle, without a call in each of every block
        return False
    return (kind is nn.Identity or module.p == 0 or not module.training) and not has_hooks(module)  # type: ignore
