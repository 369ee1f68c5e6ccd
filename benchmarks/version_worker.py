"""One version of fastbp, timed on request: ``benchmarks.check`` starts one for each, with its tree first on the path.

Reads a line of JSON for a request and answers with one: ``{"case": {...}}`` prepares a case and says how wrong its
results are; ``{"calls": n}`` makes so many forward and backward calls of it and says how many seconds they took; ``{}``
says which fastbp this is. It uses public names alone, and nothing of this folder, so that it serves any version.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbp

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
Step = Callable[[], Any]


def block_of(case: dict[str, Any]) -> nn.Module:
    """The module of a case, with parameters from the default generator."""
    first, *hidden, last = case["features"]
    options = {"activation": case["activation"], "dtype": getattr(torch, case["dtype"]), "device": case["device"]}
    if case["kind"] == "layer":
        return fastbp.LinearAct(first, last, **options)
    if case["kind"] == "gated":
        return fastbp.GatedLinear(first, last, **options)
    if case["kind"] == "gated_mlp":
        return fastbp.GatedMLP(first, hidden[0], last, bias=True, **options)
    return fastbp.MLP(first, hidden, last, **options)


def plain(case: dict[str, Any], x: Tensor, params: list[Tensor]) -> Tensor:
    """The same by PyTorch, of parameters as the module has them: weight and bias of each linear."""
    f, pairs = ACTIVATIONS[case["activation"]], list(zip(params[::2], params[1::2], strict=True))
    if case["kind"].startswith("gated"):
        (gate, up), rest = pairs[:2], pairs[2:]
        h = f(F.linear(x, *gate)) * F.linear(x, *up)
        return F.linear(h, *rest[0]) if rest else h
    for weight, bias in pairs[:-1]:
        x = f(F.linear(x, weight, bias))
    y = F.linear(x, *pairs[-1])
    return f(y) if case["kind"] == "layer" else y


def prepare(case: dict[str, Any]) -> tuple[Step, float]:
    """A step, and the largest relative RMS error of its output and gradients against float64."""
    torch.manual_seed(0)
    block = block_of(case)
    options = {"dtype": getattr(torch, case["dtype"]), "device": case["device"]}
    x = torch.randn(case["rows"], case["features"][0], **options).requires_grad_()
    dy = torch.randn(case["rows"], case["features"][-1], **options)
    wanted = [x, *block.parameters()]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(block(x), wanted, dy)

    wide = [t.detach().double().requires_grad_() for t in wanted]
    exact = plain(case, wide[0], wide[1:])
    pairs = zip((block(x), *step()), (exact, *torch.autograd.grad(exact, wide, dy.double())), strict=True)
    errors = [((mine.double() - truth).norm() / truth.norm()).item() for mine, truth in pairs]
    return step, max(error if error == error else float("inf") for error in errors)


def burst(step: Step, calls: int, cuda: bool) -> float:
    """Seconds of so many calls: on a GPU by its events."""
    if cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
    began = time.perf_counter()
    for _ in range(calls):
        step()
    took = time.perf_counter() - began
    if cuda:
        end.record()
        end.synchronize()
        took = start.elapsed_time(end) / 1e3
    return took


def main() -> int:
    step: Step | None = None
    cuda = False
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "case" in request:
                step, error = prepare(request["case"])
                cuda = request["case"]["device"] == "cuda"
                answer: dict[str, Any] = {"error": error}
            elif "calls" in request:
                assert step is not None
                answer = {"seconds": burst(step, request["calls"], cuda)}
            else:
                answer = {"fastbp": fastbp.__file__, "backends": fastbp.available_backends()}
        except Exception as problem:  # said to who asked; the next request may fare better
            answer = {"failed": f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
