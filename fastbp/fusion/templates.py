"""Which modules are blocks that can be fused: found by structure, decided by values.

A candidate is a module whose children are two or three plain linears and an activation. What its forward computes is
not read off its source or its names: it is run, on small float64 weights in place of its own, and compared with what
the fused call would compute, output and gradients. So a block with a residual, a scale or another activation inside is
told apart from one without whatever the model's own dtype, size and device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fastbp import functional, recognition
from fastbp.activations import ROWS, Bound, bind
from fastbp.modules import is_plain, run_chain, run_gated
from fastbp.recognition import has_hooks, of_known_module

# Relative L2, in float64. PyTorch's hardsigmoid takes 1/6 in float32 even there; the closest pair of activations, the
# two GELUs, differ by about 1e-4.
TOLERANCE = 1e-7


@dataclass(frozen=True)
class Plan:
    """How a fused module runs: which of its linears, in the order of the call, and which activation."""

    linears: tuple[str, ...]
    activation: Bound
    activation_child: str | None  # None where the activation is written in the module's forward
    activation_type: type | None
    idle: tuple[str, ...]  # dropouts that must stay at p = 0
    save: str
    backend: str | None

    @property
    def gated(self) -> bool:
        return len(self.linears) == 3

    @property
    def call(self) -> str:
        """The fused call in words."""
        return f"{'gated_mlp' if self.gated else 'mlp'}, {self.activation!r}"

    def holds(self, module: nn.Module) -> bool:
        """Whether the module still is what it was when it was fused, as far as this call is concerned."""
        children = module._modules
        if not all(name in children and is_plain(children[name]) for name in self.linears):  # type: ignore[arg-type]
            return False
        if not all(_is_idle(children.get(name)) for name in self.idle):
            return False
        if self.activation_child is None:
            return True
        child = children.get(self.activation_child)
        if child is None or type(child) is not self.activation_type or has_hooks(child):
            return False
        known = of_known_module(child)
        return known is None or known == self.activation

    def run(self, module: nn.Module, input: Tensor) -> Tensor:
        """The fused call."""
        linears = [module._modules[name] for name in self.linears]
        if self.gated:
            return run_gated(linears, self.activation, self.save, self.backend, input)  # type: ignore[arg-type]
        return run_chain(linears, self.activation, self.save, self.backend, input, projected=True)  # type: ignore[arg-type]


def _is_idle(module: nn.Module | None) -> bool:
    return type(module) is nn.Identity or (isinstance(module, nn.Dropout) and module.p == 0)


def find_plan(module: nn.Module, save: str, backend: str | None) -> Plan | str | None:
    """The plan by which a module can run fused, or why it cannot; None where it does not look like a block at all."""
    linears = [name for name, child in module.named_children() if isinstance(child, nn.Linear)]
    others = {name: child for name, child in module.named_children() if name not in linears}
    if len(linears) not in (2, 3) or isinstance(module, torch.jit.ScriptModule):
        return None
    acts = {name: bound for name, child in others.items() if (bound := _activation(child)) is not None}
    strangers = [child for name, child in others.items() if name not in acts and not isinstance(child, nn.Dropout)]
    if any(next(child.parameters(), None) is not None for child in strangers):
        return None  # more than a block: an attention, a whole layer
    if strangers:
        names = ", ".join(type(child).__name__ for child in strangers)
        return f"{names} is no activation that fastbp knows"
    if len(acts) > 1:
        return "more than one activation"
    unplain = [name for name in linears if not is_plain(module._modules[name])]  # type: ignore[arg-type]
    if unplain:
        return f"{', '.join(unplain)} is not a plain nn.Linear (a subclass, hooks, or a wrapped weight)"
    if module._parameters or module._buffers:
        return "it has parameters or buffers of its own"
    idle = tuple(name for name, child in others.items() if name not in acts)
    dropping = [name for name in idle if not _is_idle(module._modules[name])]
    if dropping:
        return f"{', '.join(dropping)} drops (p > 0) inside the block"
    child, given = next(iter(acts.items()), (None, None))
    for order in _orders(module, linears):
        for bound in [given] if given is not None else _written_activations(module):
            kind = None if child is None else type(module._modules[child])
            plan = Plan(order, bound, child, kind, idle, save, backend)
            if computes(module, plan):
                return plan
    return "its forward computes something else than the fused block"


def _activation(module: nn.Module) -> Bound | None:
    try:
        bound = recognition.resolve(module)
    except ValueError:
        return None
    return None if bound.name == "identity" else bound


def _written_activations(module: nn.Module) -> list[Bound]:
    """What an activation that is no child can be: a function among the attributes, else any of the table."""
    found = []
    for value in vars(module).values():
        if callable(value) and not isinstance(value, (nn.Module, type)):
            try:
                found.append(recognition.resolve(value))
            except (TypeError, ValueError):
                continue
    return found or [bind(name) for name in ROWS if name != "identity"]


def _orders(module: nn.Module, linears: list[str]) -> Iterator[tuple[str, ...]]:
    """The orders of the linears whose sizes fit: first to second, or gate and up to down."""
    sizes = {
        name: (m.in_features, m.out_features) for name in linears if isinstance(m := module._modules[name], nn.Linear)
    }
    for order in itertools.permutations(linears):
        first, last = sizes[order[0]], sizes[order[-1]]
        if first[1] == last[0] and (len(order) == 2 or sizes[order[1]] == first):
            yield order


def computes(module: nn.Module, plan: Plan) -> bool:
    """Whether the module's forward is the plan's call: output and gradients, on random small float64 weights."""
    children = {name: cast(nn.Linear, module._modules[name]) for name in plan.linears}
    small = _shrink([s for m in children.values() for s in (m.in_features, m.out_features)])
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weights: dict[str, Tensor] = {}
    for name, m in children.items():
        size_in, size_out = small[m.in_features], small[m.out_features]
        # Wide enough for z to reach the limits of relu6 and the like.
        weights[f"{name}.weight"] = (3.0 / size_in**0.5 * draw(size_out, size_in)).requires_grad_()
        if m.bias is not None:
            weights[f"{name}.bias"] = draw(size_out).requires_grad_()
    x = draw(4, 16, small[children[plan.linears[0]].in_features]).requires_grad_()
    inputs = [x, *weights.values()]

    def fused(x: Tensor) -> Tensor:
        ws = [weights[f"{name}.weight"] for name in plan.linears]
        bs = [weights.get(f"{name}.bias") for name in plan.linears]
        if plan.gated:
            return functional.gated_mlp(x, *ws, *bs, activation=plan.activation)
        return functional.mlp(x, ws, bs, activation=plan.activation)

    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            y = torch.func.functional_call(module, weights, (x,))
            if not isinstance(y, Tensor):
                return False
            dy = draw(*y.shape)
            theirs = [y, *torch.autograd.grad(y, inputs, dy, allow_unused=True)]
    except Exception:  # a stranger's forward on sizes it may not like: then it is not known, and left alone
        return False
    y = fused(x)
    if theirs[0].shape != y.shape:
        return False
    ours = [y, *torch.autograd.grad(y, inputs, dy)]
    return all(t is not None and difference(t, o) <= TOLERANCE for t, o in zip(theirs, ours, strict=True))


def _shrink(sizes: list[int]) -> dict[int, int]:
    """Small sizes that are equal and different where the real ones are."""
    return {size: 6 + 2 * i for i, size in enumerate(sorted(set(sizes)))}


def difference(a: Tensor, b: Tensor) -> float:
    """The relative L2 difference, with infinities and NaN in other places counted as infinite."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double(), b.detach().double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    a, b = a[finite], b[finite]
    return float((a - b).norm() / b.norm().clamp(min=1e-300)) if a.numel() else 0.0
