"""The C++ and CUDA kernels: one shared library, loaded here, one op call forward and one backward.

``unavailable`` is None, or why there is no library to call: not built, not loadable, or built from other sources.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowADInplaceOrView
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from fastbp import flops, reference, shapes
from fastbp.activations import TABLE, Activation, rounded
from fastbp.forms import FORMS, Form
from fastbp.problem import Config, Problem, check, configure
from fastbp.saving import POLICIES
from fastbp.version import __version__, fingerprint

# FASTBP_NATIVE_LIBRARY names another build of the same sources: `make sanitize` uses it.
LIBRARY = Path(os.environ.get("FASTBP_NATIVE_LIBRARY") or Path(__file__).parents[1] / "_native.abi3.so")
SOURCES = Path(__file__).parents[2] / "csrc"  # there in a checkout, not in an installed package
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps"
CHECKS_TENSORS = True  # in C++, so that a good call need not be checked in Python
_OVERWRITE, _ROUTE, _GIVEN = 2048, 4096, 32768  # in a call's settings, csrc/ops.cpp
CUDA_ROUTES = ("library", "fused", "cublaslt")  # the order of csrc/cuda/route.h
_SAVES = tuple(POLICIES)  # the order of csrc/cpu/call.h


def rebuild_command(kernels: str = "cpu") -> str:
    """What to type to get the library that belongs to this package."""
    command = f"FASTBP_BUILD={kernels} {REBUILD}"
    return f"{command} -e {SOURCES.parent}" if SOURCES.is_dir() else f"{command} fastbp"


def load(library: Path = LIBRARY, sources: Path = SOURCES) -> str | None:
    """Load the library; None, or in a line why it cannot serve and what to do about it."""
    if not library.is_file():
        return f"the C++ kernels were not built; `{rebuild_command()}` builds them and says what is missing"
    try:
        torch.ops.load_library(library)
        info = _ops().build_info()
    except (OSError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        return f"{library.name} does not load into torch {torch.__version__}: {reason}; `{rebuild_command()}`"
    version, built_from, *names = info.split()
    if version != __version__ or names != [row.name for row in TABLE]:
        return f"{library.name} belongs to fastbp {version}, and this is {__version__}; `{rebuild_command()}`"
    if sources.is_dir() and built_from != fingerprint(sources):
        return f"{library.name} was built from other sources than {sources.name}/ holds; `{rebuild_command()}`"
    try:
        capability()
    except RuntimeError as error:  # FASTBP_CPU_CAPABILITY names what this CPU does not have
        return str(error).strip().splitlines()[0]
    return None


def capability() -> str:
    """The instruction set that the loaded kernels use."""
    return _ops().capability()  # type: ignore[no-any-return]


def _ops() -> Any:
    return torch.ops.fastbp_native


def supports(problem: Problem) -> str | None:
    """Why this backend cannot serve the problem, or None."""
    device = problem.device
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip:
        return (
            f"the C++ kernels run on CPUs and NVIDIA GPUs, and x is on {'an AMD GPU' if torch.version.hip else device}"
        )
    if not cuda_architectures():
        return f"{LIBRARY.name} was built without CUDA kernels; `{rebuild_command('cuda')}` builds them, with nvcc"
    return cuda_refusal(torch.cuda.current_device() if device.index is None else device.index)


def cuda_architectures() -> str:
    """What the CUDA kernels are compiled for; empty where the library has none."""
    return _ops().cuda_architectures() if hasattr(_ops(), "cuda_architectures") else ""


def identity(device: torch.device) -> str:
    """What a measurement of this backend depends on: what the kernels were built from, and for."""
    return f"{_BUILT} {_ARCHITECTURES if device.type == 'cuda' else _CAPABILITY}"


def routes(problem: Problem, rows: int | None) -> tuple[str, ...]:
    """The ways to compute that a call may ask for: of so many rows, or with None of any.

    On a GPU not the fused products: their warps wait for each other, and until that has run on a GPU nobody knows that
    none waits for ever, which no check can catch (docs/gpu-status.md).
    """
    if problem.device.type == "cuda":
        return tuple(route for route in CUDA_ROUTES if route != "fused")
    unserved = {"row"} if rows not in (1, None) else set()
    if problem.dtype != torch.bfloat16 or capability() != "avx512_bf16":
        unserved.add("narrow_pairs")
    if problem.config.form.given:
        unserved |= {"narrow", "narrow_pairs"}
    return tuple(route for route in _cpu_routes() if route not in unserved)


@lru_cache(maxsize=1)
def _cpu_routes() -> tuple[str, ...]:
    return tuple(_ops().routes().split())


@contextmanager
def forced(route: str) -> Iterator[None]:
    """Every call on a GPU takes this route where it can: library, fused or cublaslt. For tests and measurements."""
    _ops().set_cuda_route(route)
    try:
        yield
    finally:
        _ops().set_cuda_route("")


@lru_cache(maxsize=64)
def cuda_refusal(index: int) -> str | None:
    """Why the CUDA kernels that are there cannot serve a GPU; None if they can. Launches nothing."""
    return _ops().cuda_refusal(index) or None


def forward(config: Config, x: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """y and the residuals of the policy."""
    present: list[Any] = []
    for tensor in tensors:  # no comprehension, which is a frame of its own before Python 3.12
        present.append(_ABSENT if tensor is None else tensor)
    return _forward(x, present, *_codes(config, torch.float64, x.is_cuda))  # type: ignore[no-any-return]


def backward(
    config: Config, dy: Tensor, saved: Sequence[Tensor | None], needs: tuple[bool, ...], overwrite: bool = False
) -> list[Tensor | None]:
    """The gradients of the inputs, of every weight and of every bias; None where ``needs`` does not ask.

    With ``overwrite`` the residuals of policy preact are used up.
    """
    present: list[Any] = []
    for tensor in saved:
        present.append(_ABSENT if tensor is None else tensor)
    settings, params = _codes(config, dy.dtype, dy.is_cuda)
    found = _backward(dy, present, settings + _OVERWRITE * overwrite, params, needs)
    if len(found) == len(needs):
        return found  # type: ignore[no-any-return]
    grads = iter(found)
    return [next(grads) if need else None for need in needs]


@lru_cache(maxsize=4096)
def _codes(config: Config, dtype: torch.dtype, cuda: bool) -> tuple[int, list[float]]:
    """A config as the ops take it (csrc/ops.cpp), with the parameters as y of this dtype shows them."""
    params = rounded(config.params, dtype) if config.save == "output" and config.row.limits else config.params
    route = 1 + (CUDA_ROUTES if cuda else _cpu_routes()).index(config.route) if config.route else 0
    return _code_of(config.form) + 4 * _SAVES.index(config.save) + 32 * TABLE.index(config.row) + _ROUTE * route, list(
        params
    )


def _code_of(form: Form) -> int:
    return form.gated + 2 * form.projected + _GIVEN * form.given


def _decoded(settings: int) -> tuple[Form, str, Activation, str]:
    """Form, policy, activation and way of computing of a call, from what ``_codes`` makes of them on a CPU."""
    code = settings % 4 + (settings & _GIVEN)
    (form,) = [f for f in FORMS.values() if _code_of(f) == code]
    route = settings % _GIVEN // _ROUTE
    return (
        form,
        _SAVES[settings // 4 % 8],
        TABLE[settings % _OVERWRITE // 32],
        _cpu_routes()[route - 1] if 0 < route <= len(_cpu_routes()) else "",
    )


def _forward_fake(x: Tensor, tensors: list[Tensor], settings: int, params: list[float]) -> list[Tensor]:
    """What ``forward`` returns, unwritten."""
    form, save, *_ = _decoded(settings)
    (_, *others), weights, biases = form.split((x, *tensors))
    check(form, x, weights, _present(biases), others)
    return shapes.new_results(form, save, x, [w.shape for w in weights])


def _is_absent(tensor: Tensor) -> bool:
    """Whether it stands for none, as csrc/cpu/absent.h has it; of copies and fakes of ``_ABSENT`` too."""
    return tensor.dtype is torch.bool and tensor.shape == _ABSENT.shape


def _forward_flops(x: Tensor, tensors: list[Tensor], settings: int, params: list[float]) -> int:
    _, weights, _ = _decoded(settings)[0].split((x, *tensors))
    return shapes.forward_flops(prod(x.shape[:-1]), [w.shape for w in weights])


def _weights_of(dy: Tensor, saved: list[Tensor], settings: int, needs: tuple[bool, ...]) -> list[shapes.Shape]:
    """The shapes of a backward call's weights, those too that it does not read."""
    form, save, row, _ = _decoded(settings)
    inputs, _, weights, _, residuals = reference.unflatten(form, saved, len(needs))
    return shapes.find_weights(
        form,
        save,
        row.grad_reads_output,
        needs,
        dy.shape,
        [t.shape for t in inputs],
        [w.shape if w.dim() == 2 else None for w in weights],
        [r.shape for r in residuals],
    )


def _backward_fake(
    dy: Tensor, saved: list[Tensor], settings: int, params: list[float], needs: list[bool]
) -> list[Tensor]:
    """What ``backward`` returns, unwritten."""
    for tensor in saved:
        if tensor.device != dy.device and not _is_absent(tensor):
            raise RuntimeError(f"fastbp_native: tensors on {tensor.device} and {dy.device} in one call")
    weights = _weights_of(dy, saved, settings, tuple(needs))
    grads = [None if s is None else dy.new_empty(s) for s in shapes.gradient_shapes(dy.shape, weights, needs)]
    form, *_, route = _decoded(settings)
    if dy.device.type == "cpu" and route in ("", "library", "row") and all(map(all, (dy.shape, *weights))):
        for i, weight in enumerate(reference.unflatten(form, saved, len(needs)).weights, start=form.inputs):
            grad = grads[i]
            if grad is not None and weight.dim() == 2 and weight.stride(0) == 1 != weight.stride(1):
                grads[i] = grad.new_empty(grad.shape[::-1]).mT  # it lies as the weight does
    return [grad for grad in grads if grad is not None]


def _recorded_forward(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """A call that make_fx records, as PyTorch's operations: this op has no derivative, and its settings no meaning
    in another process."""
    x, tensors, settings, params = args
    config = _config(settings, params)
    with mode, _AutoDispatchBelowADInplaceOrView():
        y, residuals = reference.forward(config, *config.form.split((x, *_present(tensors))))
    return [y, *residuals]


def _recorded_backward(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The same of backward."""
    dy, saved, settings, params, needs = args
    config = _config(settings, params)
    parts = reference.unflatten(config.form, _present(saved), len(needs))
    with mode, _AutoDispatchBelowADInplaceOrView():
        grads = reference.backward(config, dy, parts, tuple(needs))
    return [grad for grad in grads if grad is not None]


def _config(settings: int, params: list[float]) -> Config:
    form, save, row, _ = _decoded(settings)
    return configure(form.name, row.name, tuple(params), save, "reference")


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None or _is_absent(t) else t for t in tensors]


def _backward_flops(dy: Tensor, saved: list[Tensor], settings: int, params: list[float], needs: list[bool]) -> int:
    form, save, *_ = _decoded(settings)
    weights = _weights_of(dy, saved, settings, tuple(needs))
    return shapes.backward_flops(form, save, prod(dy.shape[:-1]), weights, tuple(needs))


unavailable = load()
if unavailable is None:
    # What OpOverload.__call__ calls: one Python frame less.
    _forward, _backward = _ops().forward.default._op, _ops().backward.default._op
    _ABSENT = _ops().absent()  # what the ops take for None
    # Asked once and not by a call that is about to be refused.
    _BUILT = " ".join(_ops().build_info().split()[:2])
    _CAPABILITY, _ARCHITECTURES = capability(), cuda_architectures()
    # Autograd is the business of the Functions around the ops, and its fallback costs a detour.
    _beneath_autograd = torch.library.Library("fastbp_native", "IMPL", "Autograd")
    for _op in ("forward", "backward"):
        _beneath_autograd.impl(_op, torch.library.fallthrough_kernel)
    _more = torch.library.Library("fastbp_native", "FRAGMENT")
    for _packet, _fake, _flops, _recorded in (
        (_ops().forward, _forward_fake, _forward_flops, _recorded_forward),
        (_ops().backward, _backward_fake, _backward_flops, _recorded_backward),
    ):
        _name = f"fastbp_native::{_packet.__name__}"
        torch.library.register_fake(_name, _fake, lib=_more)
        torch.library.register_torch_dispatch(_name, ProxyTorchDispatchMode, _recorded, lib=_more)
        flops.count_as(_packet, _flops)
