"""Who is measured: one table of rivals, each made of a case and its modules, and each saying what it serves."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

import fastbp
from benchmarks import outside
from benchmarks.cases import Case, Model, name_of
from benchmarks.suites import MODES
from fastbp.activations import TABLE, bind
from fastbp.backends import AUTO, BACKENDS, native
from fastbp.forms import FORMS
from fastbp.problem import Problem, configure
from fastbp.saving import POLICIES, check_dtype

Run = Callable[[Tensor], Tensor]
Make = Callable[[Case, list[Any]], Run]
KINDS = {"layer": "linear_act", "gated": "gated_linear_act", "mlp": "mlp", "gated_mlp": "gated_mlp"}
MODELS = {"vit": "mlp", "gpt2": "mlp", "llama": "gated_mlp"}  # the form of their blocks' MLPs
PARTITIONED = "aot_eager_decomp_partition"  # Inductor's decompositions and partitioner, and no code
MODULES: dict[str, Callable[[], nn.Module]] = {
    row.name: partial(row.module, **dict(row.module_attributes)) for row in TABLE if row.module is not None
}
ALONE = "activation"  # the kind of a case without a linear


class Gated(nn.Module):
    """``act(gate(x)) * up(x)``, and ``down`` of it where there is one."""

    def __init__(self, linears: list[nn.Linear], activation: nn.Module) -> None:
        super().__init__()
        self.linears, self.activation = nn.ModuleList(linears), activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up, *down = self.linears
        h: Tensor = self.activation(gate(x)) * up(x)
        return down[0](h) if down else h


def make_linears(case: Case) -> list[nn.Linear]:
    """The linears of a case; every rival of one run is made of the same ones."""
    return [nn.Linear(into, out, dtype=case.dtype) for _, into, out in case.products]


def eager(case: Case, parts: list[Any], activation: nn.Module | None = None) -> nn.Module:
    """What people write, or that with another module in place of the activation's."""
    if isinstance(case, Model):
        return parts[0]  # type: ignore[no-any-return]
    activation = activation or MODULES[case.activation]()
    if case.kind == ALONE:
        return activation
    if case.kind.startswith("gated"):
        return Gated(parts, activation)
    layers: list[nn.Module] = []
    for linear in parts:
        layers += [linear, activation]
    return nn.Sequential(*(layers if case.kind == "layer" else layers[:-1]))


def reading(save: str = "auto") -> Make:
    """What people write, with a ``fastbp.Linear`` behind the activation, under this policy of ``fastbp.use``."""

    def make(case: Case, parts: list[Any]) -> Run:
        last = fastbp.Linear(case.features[-2], case.features[-1], device="meta", dtype=case.dtype)
        last.weight, last.bias = parts[-1].weight, parts[-1].bias
        module = eager(case, [*parts[:-1], last])

        def under_policy(x: Tensor) -> Tensor:
            with fastbp.use(save=save):
                return module(x)  # type: ignore[no-any-return]

        return module if save == "auto" else under_policy

    return make


def exchanged(case: Case, parts: list[Any]) -> nn.Module:
    """The module of an activation as ``fuse`` leaves it."""
    module = eager(case, parts)
    fastbp.fuse(module)
    return module


def linears_alone(case: Case, linears: list[nn.Linear]) -> nn.Module:
    """The same linears without any activation: what the arithmetic costs in this PyTorch. Another function than the
    case's, so it is not compared with it."""
    if not case.kind.startswith("gated"):
        return nn.Sequential(*linears)
    return Gated(linears, nn.Identity())


def compiled(mode: str | None = None, **settings: Any) -> Make:
    """torch.compile of eager, in this mode of its own, or under these settings of its partitioner.

    Of meta tensors what is kept for backward is settled as for Inductor, and no code is made.
    """

    def make(case: Case, parts: list[Any]) -> Run:
        module = eager(case, parts)
        backend = PARTITIONED if next(module.parameters()).is_meta else "inductor"
        if mode is not None:
            return torch.compile(module, mode=mode)
        chosen = _configured(backend, settings) if settings else backend
        return torch.compile(module, backend=chosen)

    return make


def _configured(backend: str, settings: dict[str, Any]) -> Callable[..., Any]:
    """A compiler of its own: Dynamo would take what another rival compiled of the same module for this one's."""
    compiler = torch._dynamo.lookup_backend(backend)

    def configured(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        with functorch.patch(settings):
            return compiler(graph, inputs)

    return configured


def addmm_activation(case: Case, linears: list[nn.Linear]) -> Run:
    """PyTorch's product with the activation in its epilogue, which has no derivative."""
    weight, bias, gelu = linears[0].weight, linears[0].bias, case.activation.startswith("gelu")
    return lambda x: torch._addmm_activation(bias, x, weight.t(), use_gelu=gelu)


def _erf_on_cpu(case: Case, device: torch.device) -> str | None:
    tanh = case.activation == "gelu_tanh" and device.type == "cpu"
    return "on a CPU its GELU is that of erf" if tanh else None


def fused(backend: str | None = None, save: str = "auto") -> Make:
    """fastbp by its modules, and of a model by ``fuse``, so that what users call is what is timed."""

    def make(case: Case, parts: list[Any]) -> Run:
        if isinstance(case, Model):
            return _fused_model(case, parts[0], save, backend)
        options = {"activation": case.activation, "save": save, "backend": backend, "dtype": case.dtype}
        first, last = case.features[0], case.features[-1]
        block: nn.Module
        if case.kind == "layer":
            block = fastbp.LinearAct(first, last, **options)  # type: ignore[arg-type]
            block.weight, block.bias = parts[0].weight, parts[0].bias
            return block
        if case.kind == "gated":
            block = fastbp.GatedLinear(first, last, **options)  # type: ignore[arg-type]
        elif case.kind == "gated_mlp":
            block = fastbp.GatedMLP(first, case.features[1], last, bias=True, **options)  # type: ignore[arg-type]
        else:
            block = fastbp.MLP(first, case.features[1:-1], last, **options)  # type: ignore[arg-type]
        for name, linear in zip([name for name, _ in block.named_children()], parts, strict=True):
            setattr(block, name, linear)
        return block

    return make


def _fused_model(case: Model, model: nn.Module, save: str, backend: str | None) -> nn.Module:
    """A copy with the same parameters, every block of it fused."""
    model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    report = fastbp.fuse(model, save=save, backend=backend)
    assert len(report.fused) == case.depth, f"{case.name}: not every block was fused\n{report}"
    return model


def _refuses(backend: str | None, save: str) -> Callable[[Case, torch.device], str | None]:
    """Why fastbp does not serve a case by this backend and policy, in its own words."""

    def refuses(case: Case, device: torch.device) -> str | None:
        activation, form = bind(case.activation), FORMS[(KINDS | MODELS)[case.kind]]
        if save != "auto":
            if reason := POLICIES[save].illegal(activation, form):
                return reason
            try:
                check_dtype(save, case.dtype, form)
            except ValueError as error:
                return str(error)
        entry = BACKENDS.get(backend or AUTO)
        if entry is None or isinstance(entry, str):
            return entry
        kept = "preact" if save == "auto" else save
        config = configure(form.name, activation.name, activation.params, kept, backend or AUTO)
        return entry.supports(Problem(config, device, case.dtype))  # type: ignore[no-any-return]

    return refuses


@dataclass(frozen=True)
class Rival:
    """A row: how it is made, what it serves, whether it computes what the case says, and as exactly as eager."""

    make: Make
    kinds: tuple[str, ...] = (*KINDS, *MODELS)
    activations: tuple[str, ...] = tuple(MODULES)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    devices: tuple[str, ...] = ("cpu", "cuda", "meta")
    modes: tuple[str, ...] = MODES
    most_hidden: int | None = None  # hidden layers
    multiple_of: int = 1  # what its features must be
    refuses: Callable[[Case, torch.device], str | None] = field(default=lambda case, device: None)
    needs: tuple[str, str] | None = None  # the module it is from, and how that is installed
    same_function: bool = True
    exact: bool = True
    backend: str | None = None  # of fastbp's, if one is named
    route: str | None = None  # of that backend on a GPU

    def refusal(self, case: Case, mode: str, device: torch.device) -> str | None:
        """Why it does not take part, or None."""
        for asked, served in (
            (case.kind, self.kinds),
            (case.activation, self.activations),
            (name_of(case.dtype), tuple(map(name_of, self.dtypes))),
            (device.type, self.devices),
            (mode, self.modes),
        ):
            if asked not in served:
                return f"serves {' and '.join(served)}, not {asked}"
        if self.most_hidden is not None and len(case.features) - 2 > self.most_hidden:
            return f"has {self.most_hidden} hidden layer, not {len(case.features) - 2}"
        if any(size % self.multiple_of for size in case.features):
            return f"takes features in multiples of {self.multiple_of}"
        if self.needs is not None and not _is_there(self.needs[0]):
            return f"{self.needs[0]} is not installed; {self.needs[1]}"
        return self.refuses(case, device)

    def on_its_route(self) -> AbstractContextManager[None]:
        """Where its calls, forward and backward, take the route that it is named for."""
        if self.route is None:
            return nullcontext()
        if self.backend == "native":
            return native.forced(self.route)
        from fastbp.backends.triton import choice  # imports Triton

        return choice.forced(self.route)


def _is_there(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None


def _by_fastbp(backend: str | None = None, save: str = "auto", **row: Any) -> Rival:
    exact = save == "auto" or not POLICIES[save].compressed
    return Rival(fused(backend, save), exact=exact, refuses=_refuses(backend, save), backend=backend, **row)


ANY = (*KINDS, *MODELS, ALONE)
SIXTEEN = (torch.bfloat16, torch.float16)
RIVALS: dict[str, Rival] = {
    "eager": Rival(eager, ANY),
    "eager again": Rival(eager, ANY),  # the same thing twice: what a difference must exceed to mean anything
    "linears alone": Rival(linears_alone, tuple(KINDS), same_function=False),
    "torch addmm_activation": Rival(
        addmm_activation, ("layer",), ("relu", "gelu", "gelu_tanh"), modes=("fwd",), refuses=_erf_on_cpu
    ),
    "torch.compile": Rival(compiled()),
    "torch.compile max-autotune": Rival(compiled("max-autotune-no-cudagraphs"), devices=("cpu", "cuda")),
    "torch.compile, ban_recompute_materialized_backward=False": Rival(
        compiled(ban_recompute_materialized_backward=False)
    ),
    "torch.compile, activation_memory_budget=0.5": Rival(compiled(activation_memory_budget=0.5)),
    **{
        " ".join(["fastbp", *filter(None, [backend, save.removeprefix("auto")])]): _by_fastbp(backend, save)
        for backend in (None, *BACKENDS)
        for save in ("auto", *POLICIES)
    },
    "fastbp.Linear": Rival(reading(), ("mlp", "gated_mlp")),
    "fastbp.Linear preact": Rival(reading("preact"), ("mlp", "gated_mlp")),  # small calls too
    "fastbp.fuse": Rival(exchanged, (ALONE,)),
    "fastbp library": _by_fastbp("triton", route="library"),
    "fastbp fused": _by_fastbp("triton", route="fused"),
    **{
        f"fastbp native {route}": _by_fastbp("native", route=route, devices=("cuda",))
        for route in ("library", "cublaslt", "fused")  # the last two have never run yet
    },
    "quack": Rival(
        outside.quack, ("mlp", "gated_mlp"), ("relu", "gelu_tanh", "silu"), SIXTEEN, ("cuda",),
        most_hidden=1, multiple_of=8, needs=("quack", "pip install quack-kernels"),
    ),
    "liger": Rival(
        outside.liger, ("gated", "gated_mlp"), ("gelu_tanh", "silu"), (torch.float32, *SIXTEEN), ("cuda",),
        needs=("liger_kernel", "pip install liger-kernel"),
    ),
    "transformer-engine": Rival(
        outside.transformer_engine, tuple(KINDS), ("relu", "gelu_tanh", "silu"), (torch.float32, *SIXTEEN), ("cuda",),
        needs=("transformer_engine", "pip install --no-build-isolation 'transformer-engine[pytorch]'"),
    ),
    "flash-attn": Rival(
        outside.flash_attention, ("mlp",), ("relu", "gelu_tanh"), SIXTEEN, ("cuda",), most_hidden=1, multiple_of=8,
        refuses=outside.odd_relu, needs=("fused_dense_lib", "it is built from csrc/fused_dense_lib of flash-attention"),
    ),
}  # fmt: skip
