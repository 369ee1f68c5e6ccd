"""One version of fastbp, timed on request: ``python -m benchmarks.version_worker TREE``; benchmarks.versions starts it.

Reads a line of JSON for a request and answers with one: ``{"case": {...}, "device": "cpu"}`` prepares a case and says
how wrong its results are; ``{"calls": n}`` makes so many forward and backward calls of it and says how many seconds
they took; ``{}`` says which fastbp this is. fastbp comes from the tree that is named, and all else from the folder that
this file is in, so that every version is timed by the same code. Of fastbp it uses public names alone, and of this
folder nothing that imports fastbp, so that it serves older versions too.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import clock, cuda_clock, models
from benchmarks.cases import Case, Model

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


def block_of(fastbp: Any, case: Case, device: str) -> nn.Module:
    """The module of a case, with parameters from the default generator."""
    first, *hidden, last = case.features
    options = {"activation": case.activation, "dtype": case.dtype, "device": device}
    made: nn.Module
    if case.kind == "layer":
        made = fastbp.LinearAct(first, last, **options)
    elif case.kind == "gated":
        made = fastbp.GatedLinear(first, last, **options)
    elif case.kind == "gated_mlp":
        made = fastbp.GatedMLP(first, hidden[0], last, bias=True, **options)
    else:
        made = fastbp.MLP(first, hidden, last, **options)
    return made


def plain(case: Case, x: Tensor, *parameters: Tensor) -> Tensor:
    """The same by PyTorch, of parameters in the module's order: weight and bias of each linear."""
    f, pairs = ACTIVATIONS[case.activation], list(zip(parameters[::2], parameters[1::2], strict=True))
    if case.kind.startswith("gated"):
        gate, up, *down = pairs
        h = f(F.linear(x, *gate)) * F.linear(x, *up)
        return F.linear(h, *down[0]) if down else h
    *others, last = pairs
    for pair in others:
        x = f(F.linear(x, *pair))
    return f(F.linear(x, *last)) if case.kind == "layer" else F.linear(x, *last)


def results(run: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """Output and gradients of all inputs."""
    y = run(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative, in the RMS; infinite where the shape is wrong. What is no number is above any bound."""
    return [
        ((f.double() - e).norm() / e.norm()).item() if f.shape == e.shape else float("inf")
        for f, e in zip(found, exact, strict=True)
    ]


def checked(case: Case, block: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Any]:
    """The largest error against float64; and whether each is at most twice PyTorch's, as benchmarks.measure asks."""
    inputs = [x, *block.parameters()]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = results(lambda *given: plain(case, *given), wide, dy.double())
    own = errors(results(lambda *given: plain(case, *given), inputs, dy), exact)
    found = errors(results(lambda x, *_: block(x), inputs, dy), exact)
    # A z next to a kink may fall to either side of it, and its slope then differs as a whole; the output does not.
    kinks = 4 / (case.rows * max(case.features)) ** 0.5 if case.activation == "relu" else 0.0
    return judged(case.dtype, found, own, kinks)


def judged(dtype: torch.dtype, found: list[float], own: list[float], kinks: float = 0.0) -> dict[str, Any]:
    """Of the errors of an output and its gradients, and of PyTorch's; ``kinks``: what the gradients may have more."""
    slack = [torch.finfo(dtype).eps + (kinks if index else 0.0) for index in range(len(found))]
    accurate = all(f <= 2 * o + s for f, o, s in zip(found, own, slack, strict=True))
    return {"error": max((f if f == f else float("inf")) for f in found), "accurate": accurate}


def learned(model: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    """Logits of a model, and the gradients of its loss by every parameter."""
    y = model(x)
    loss = F.cross_entropy(y.flatten(0, -2).float(), target.flatten())
    return [y.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def prepare_model(fastbp: Any, case: Model, device: str) -> tuple[clock.Step, dict[str, Any]]:
    """A model of benchmarks/models.py after ``fastbp.fuse``: forward, loss and backward."""
    stock = models.build(case).to(device)
    x, target = models.batch(case, torch.device(device), None)
    wide = x.double() if x.is_floating_point() else x
    exact = learned(copy.deepcopy(stock).double(), wide, target)
    own = errors(learned(stock, x, target), exact)
    fused = copy.deepcopy(stock)
    fastbp.fuse(fused)
    found = errors(learned(fused, x, target), exact)
    return lambda: learned(fused, x, target), judged(case.dtype, found, own)


def prepare(fastbp: Any, case: Case, device: str) -> tuple[clock.Step, dict[str, Any]]:
    """A step, and how accurate it is. On a GPU each call finds other inputs than those its L2 cache holds."""
    torch.manual_seed(0)
    if isinstance(case, Model):
        return prepare_model(fastbp, case, device)
    block = block_of(fastbp, case, device)
    first, last = case.features[0], case.features[-1]
    each = case.rows * (first + last) * case.dtype.itemsize
    copies = cuda_clock.copies(each, torch.device(device)) if device == "cuda" else 1

    def draw(features: int) -> Tensor:
        return torch.randn(case.rows, features, dtype=case.dtype, device=device)

    pairs = [(draw(first).requires_grad_(), draw(last)) for _ in range(copies)]
    parameters = list(block.parameters())
    turns = itertools.cycle([([x, *parameters], dy) for x, dy in pairs])

    def step() -> object:
        inputs, dy = next(turns)
        return torch.autograd.grad(block(inputs[0]), inputs, dy)

    return step, checked(case, block, *pairs[0])


def timed(step: clock.Step, calls: int, device: str) -> float:
    """Seconds of so many calls, after one that fetches from memory what another process has pushed out of the caches,
    unless they are so long that there is but one."""
    if calls > 1:
        step()
    return (cuda_clock if device == "cuda" else clock).burst(step, calls)


def answers(fastbp: Any) -> None:
    """Until there is nobody who asks. What a version prints itself goes to stderr."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    step: clock.Step | None = None
    device = ""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "case" in request:
                given, device, step = request["case"], request["device"], None
                kind = Model if "depth" in given else Case
                case = kind(**given | {"features": tuple(given["features"]), "dtype": getattr(torch, given["dtype"])})
                step, answer = prepare(fastbp, case, device)
            elif "calls" in request:
                assert step is not None, "no case was prepared"
                answer = {"seconds": timed(step, request["calls"], device)}
            else:
                answer = {"fastbp": fastbp.__file__, "backends": fastbp.available_backends()}
        except Exception as error:  # said to who asked; the next request may fare better
            answer = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        print(json.dumps(answer), file=said, flush=True)


if __name__ == "__main__":
    if sys.platform == "linux":  # whoever is stopped when its parent is killed would wait for ever
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    clock.keep_freed_memory()
    sys.path.insert(0, sys.argv[1])
    answers(import_module("fastbp"))
