"""Programs with linears run twice, with those of torch.nn and with fastbp's, and compared."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbp
from fastbp import linear as fastbp_linear
from fastbp.linear import OUTCOME

WIDTH, ROWS = 6, 5
Program = Callable[..., Tensor]  # of four linears (WIDTH, WIDTH), x, and a list for what is to be compared besides


# How h is made of two linears, and what the third is then.
MAKERS = {
    "activation": (lambda g, u: F.silu(g), "act_linear, silu"),
    "gate": (lambda g, u: F.silu(g) * u, "gated_act_linear, silu"),
    "dropout": (lambda g, u: F.dropout(F.silu(g), 0.3), "linear of mul"),
}


def gradients(y: Tensor, x: Tensor, parameters: list[Tensor], run: Any) -> list[Any]:
    """Of a number of y, to x and all parameters."""
    return [*torch.autograd.grad(y.square().sum(), [x, *parameters], allow_unused=True)]


def twice(y: Tensor, x: Tensor, parameters: list[Tensor], run: Any) -> list[Any]:
    """Gradients, and those of their squares, and those of theirs."""
    wanted = [x, *parameters]
    orders = [torch.autograd.grad(y.square().sum(), wanted, create_graph=True, allow_unused=True)]
    for _ in range(2):
        squares: Any = sum(g.square().sum() for g in orders[-1] if g is not None and g.requires_grad)
        orders.append(torch.autograd.grad(squares, wanted, create_graph=True, allow_unused=True))
    return [g for order in orders for g in order]


def run(kind: type[nn.Linear], program: Program, after: Any = gradients, **options: Any) -> SimpleNamespace:
    """One run: its output ``y``, what ``after`` makes of it, what was ``seen`` on the way, and the linears."""
    dtype, bias = options.get("dtype", torch.float64), options.get("bias", True)
    generator = torch.Generator().manual_seed(options.get("seed", 0))
    rows, width = options.get("rows", ROWS), options.get("width", WIDTH)
    linears = [kind(width, width, bias=bias, dtype=dtype) for _ in range(4)]
    parameters = [p for linear in linears for p in linear.parameters()]
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / width**0.5)
    for i in options.get("frozen", ()):
        linears[i].weight.requires_grad_(False)
    if options.get("prepare"):
        options["prepare"](linears)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    torch.manual_seed(1)
    result = SimpleNamespace(linears=linears, seen=[], x=x)
    with fastbp_linear.of_any_size():
        result.y = program(linears, x, result.seen)
        trained = [p for p in parameters if p.requires_grad]
        result.grads = after(result.y, x, trained, result)
    result.random = torch.rand(1)
    return result


def outcome(linear: nn.Module) -> tuple[str, str]:
    """Whether the last call of a linear was fused or left, and the call or the reason; ("", "") for neither."""
    found = linear.__dict__.get(OUTCOME)
    return ("", "") if found is None else ("fused" if found.fused else "left", found.what)


def assert_as_stock(program: Program, fused: str | None = None, left: str | None = None, **options: Any) -> Any:
    """Outputs to the bit, gradients and what was seen within rounding; and what the third linear did."""
    tolerance = options.pop("tolerance", 1e-10)
    stock, ours = run(nn.Linear, program, **options), run(fastbp.Linear, program, **options)
    assert_equal([ours.y, ours.random], [stock.y, stock.random])
    assert_close(ours.grads, stock.grads, tolerance)
    assert_close(ours.seen, stock.seen, tolerance)
    found = outcome(ours.linears[2])
    if fused is not None:
        assert found[0] == "fused" and found[1].startswith(fused), found
    elif left is not None:
        assert found[0] == "left" and left in found[1], found
    else:
        assert found == ("", ""), found
    return ours


def assert_equal(got: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """To the bit."""
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), (a, b)


def assert_close(got: Iterable[Any], expected: Iterable[Any], tolerance: float) -> None:
    """Relative to the largest of each tensor; None where None is expected."""
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None), (a, b)
        if b is not None:
            assert a.dtype == b.dtype and a.shape == b.shape
            scale = float(b.detach().double().abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(scale, 1e-30))
