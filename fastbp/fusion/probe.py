"""Running a module's own forward on small stand-ins for its children, and noting who got what from whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Called:
    """One call of a child with one tensor."""

    name: str
    input: Tensor
    output: Tensor


@dataclass
class Trace:
    """A module's forward on stand-ins: what it computed, of what, and by which calls."""

    children: Mapping[str, nn.Module]  # the stand-ins
    x: Tensor
    y: Tensor
    dy: Tensor
    calls: list[Called]
    grads: list[Tensor | None] = field(default_factory=list)  # of x and the stand-ins' parameters

    def inputs(self) -> list[Tensor]:
        """What the gradients are taken of: x and every parameter, once."""
        found = {id(p): p for child in self.children.values() for p in child.parameters()}
        return [self.x, *found.values()]


class _StandIn(nn.Module):
    """A child in the trace: calls what stands for it, and notes the call."""

    def __init__(self, name: str, inner: Any, calls: list[Called | None]) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.__dict__["inner"] = inner  # not as a child of its own: the modes of the real one are left alone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            self.calls.append(None)  # not a call of a chain
            raise TypeError(f"{self.name} is called with more than one tensor")
        y = self.inner(args[0])
        self.calls.append(Called(self.name, args[0], y))
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["inner"], name)


class _Opaque(nn.Module):
    """Stands for a child that is called as it is: some function of each number, another for each child."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 + 0.1 * self.number) + torch.sin(x + self.number)


def opaque(number: int) -> nn.Module:
    """A stand-in for a child of which nothing is known but that it maps a tensor to one."""
    return _Opaque(number)


def small_linear(size_in: int, size_out: int, bias: bool, generator: torch.Generator) -> nn.Linear:
    """A float64 nn.Linear whose output is wide enough to reach the limits of relu6 and the like."""
    linear = nn.Linear(size_in, size_out, bias=bias, device="cpu", dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(_draw(generator, size_out, size_in) * (3.0 / size_in**0.5))
        if linear.bias is not None:
            linear.bias.copy_(_draw(generator, size_out))
    return linear


def _draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def shadow(module: nn.Module, **attributes: Any) -> nn.Module:
    """Another object of the module's class with its attributes, but for these."""
    new: nn.Module = object.__new__(type(module))
    object.__setattr__(new, "__dict__", module.__dict__ | attributes)
    return new


@contextmanager
def quiet() -> Iterator[None]:
    """A stranger's forward on the CPU, differentiable and without autocast; random state is left as it was."""
    with (
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield


def trace(module: nn.Module, children: Mapping[str, nn.Module], size_in: int) -> Trace | None:
    """The module's forward with these children on a random x (4, 16, size_in), with gradients.

    None where the forward fails, returns something else than one tensor, or calls a child in another way than with one
    tensor; and where training and evaluating differ, as with a dropout that is written in the forward.
    """
    with quiet():
        first, second = (_run(module, children, size_in, training) for training in (True, False))
        if first is None or second is None:
            return None
        if first.y.shape != second.y.shape or not torch.equal(first.y, second.y):
            return None
        try:
            first.grads = list(torch.autograd.grad(first.y, first.inputs(), first.dy, allow_unused=True))
        except RuntimeError:
            return None
    return first


def _run(module: nn.Module, children: Mapping[str, nn.Module], size_in: int, training: bool) -> Trace | None:
    generator = torch.Generator().manual_seed(1)
    calls: list[Called | None] = []
    standing = {name: _StandIn(name, child, calls) for name, child in children.items()}
    # Of other values than they have now: a scale of 1 or a bias of 0 is one that training will move.
    own = {n: p if p is None else nn.Parameter(_draw(generator, *p.shape)) for n, p in module._parameters.items()}
    probe = shadow(module, _modules={**module._modules, **standing}, _parameters=own, training=training)
    x = _draw(generator, 4, 16, size_in).requires_grad_()
    forward: Callable[..., Any] = type(module).forward
    try:
        y = forward(probe, x)
    except Exception:  # a stranger's forward on sizes it may not like: then it is not known, and left alone
        return None
    if not isinstance(y, Tensor) or not y.requires_grad or None in calls:
        return None
    return Trace(children, x, y, _draw(generator, *y.shape), [c for c in calls if c is not None])
