"""Who is measured: each rival is a function from a case and its tensors to y, or None where it does not serve."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastbp
from benchmarks.suites import SUITES, Case
from fastbp.activations import bind
from fastbp.backends import native, triton
from fastbp.forms import FORMS
from fastbp.saving import POLICIES, legal_policies

KINDS = {"layer": "linear_act", "gated": "gated_linear_act", "mlp": "mlp", "gated_mlp": "gated_mlp"}
_MODULES: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
}


class Gated(nn.Module):
    """``act(gate(x)) * up(x)``, and ``down`` of it where there is one."""

    def __init__(self, linears: list[nn.Linear], activation: nn.Module) -> None:
        super().__init__()
        self.linears, self.activation = nn.ModuleList(linears), activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up, *down = self.linears
        h = self.activation(gate(x)) * up(x)
        return down[0](h) if down else h


def make_linears(case: Case) -> list[nn.Linear]:
    """The linears of a case; every rival of one run is made of the same ones."""
    sizes = list(zip(case.features, case.features[1:], strict=False))
    if case.kind.startswith("gated"):
        sizes = [sizes[0], *sizes]
    return [nn.Linear(*size, dtype=case.dtype) for size in sizes]


def eager(case: Case, linears: list[nn.Linear]) -> nn.Module:
    """What people write."""
    activation = _MODULES[case.activation]()
    if case.kind.startswith("gated"):
        return Gated(linears, activation)
    layers: list[nn.Module] = []
    for linear in linears:
        layers += [linear, activation]
    return nn.Sequential(*(layers if case.kind == "layer" else layers[:-1]))


def linears_alone(case: Case, linears: list[nn.Linear]) -> nn.Module:
    """The same linears without any activation: what the arithmetic costs in this PyTorch. Another function than the
    case's, so it is not compared with it."""
    if not case.kind.startswith("gated"):
        return nn.Sequential(*linears)
    return Gated(linears, nn.Identity())


def compiled(mode: str | None = None) -> Callable[..., Callable[[Tensor], Tensor]]:
    """torch.compile of eager, in this mode of its own."""

    def make(case: Case, linears: list[nn.Linear]) -> Callable[[Tensor], Tensor]:
        return torch.compile(eager(case, linears), mode=mode)  # type: ignore[no-any-return]

    return make


def _has_cuda_kernels(weight: Tensor) -> bool:
    if native.unavailable or not weight.is_cuda or not native.cuda_architectures():
        return False
    return native.cuda_refusal(weight.get_device()) is None


def fused(backend: str | None = None, save: str = "auto") -> Callable[..., Callable[[Tensor], Tensor] | None]:
    """fastbp by its modules, so that what users call is what is timed."""

    def make(case: Case, linears: list[nn.Linear]) -> Callable[[Tensor], Tensor] | None:
        if save != "auto" and save not in legal_policies(bind(case.activation), FORMS[KINDS[case.kind]]):
            return None
        if backend == "triton" and (triton.unavailable or not (linears[0].weight.is_cuda or triton.interpreting())):
            return None
        if backend == "native" and not _has_cuda_kernels(linears[0].weight):
            return None
        options = {"activation": case.activation, "save": save, "backend": backend, "dtype": case.dtype}
        first, last = case.features[0], case.features[-1]
        block: nn.Module
        if case.kind == "layer":
            block = fastbp.LinearAct(first, last, **options)
            block.weight, block.bias = linears[0].weight, linears[0].bias
            return block
        if case.kind == "gated":
            block = fastbp.GatedLinear(first, last, **options)
        elif case.kind == "gated_mlp":
            block = fastbp.GatedMLP(first, case.features[1], last, bias=True, **options)
        else:
            block = fastbp.MLP(first, case.features[1:-1], last, **options)
        for name, linear in zip([name for name, _ in block.named_children()], linears, strict=True):
            setattr(block, name, linear)
        return block

    return make


BOTH, GPU = ("cpu", "cuda"), ("cuda",)


@dataclass(frozen=True)
class Rival:
    """A row: how it is made, whether it computes what the case says, and as exactly as eager, and where it runs
    without being asked for."""

    make: Callable[..., Callable[[Tensor], Tensor] | None]
    same_function: bool = True
    exact: bool = True
    always: tuple[str, ...] = BOTH
    route: str | None = None  # of a backend on a GPU
    backend: str = "triton"

    def on_its_route(self) -> AbstractContextManager[None]:
        """Where its calls, forward and backward, take the route that it is named for."""
        if self.route is None:
            return nullcontext()
        if self.backend == "native":
            return native.forced(self.route)
        from fastbp.backends.triton import choice  # imports Triton

        return choice.forced(self.route)


RIVALS: dict[str, Rival] = {
    "eager": Rival(eager),
    "eager again": Rival(eager),  # the same thing twice: what a difference must exceed to mean anything
    "linears alone": Rival(linears_alone, same_function=False),
    "torch.compile": Rival(compiled()),
    "torch.compile max-autotune": Rival(compiled("max-autotune-no-cudagraphs"), always=GPU),
    "fastbp": Rival(fused()),
    "fastbp library": Rival(fused("triton"), always=GPU, route="library"),
    "fastbp fused": Rival(fused("triton"), always=GPU, route="fused"),
    "fastbp native library": Rival(fused("native"), always=GPU, route="library", backend="native"),
    "fastbp native cublaslt": Rival(fused("native"), always=(), route="cublaslt", backend="native"),
    "fastbp native fused": Rival(fused("native"), always=(), route="fused", backend="native"),  # never run yet
    "fastbp reference": Rival(fused("reference"), always=()),
    **{
        f"fastbp {save}": Rival(fused(save=save), exact=not policy.compressed, always=())
        for save, policy in POLICIES.items()
    },
}


def rivals_of(suite: str, case: Case, device: str) -> list[str]:
    """Who runs in a suite without being asked for, eager first."""
    return [name for name in SUITES[suite].rivals_of(case, device) if name in RIVALS]
