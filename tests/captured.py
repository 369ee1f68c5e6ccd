"""Blocks that torch.compile captures, and the pass of the backend fastbp without Inductor, which is slow to compile."""

import torch
from support import assert_close, like
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from fastbp.compiler import put_ops

ROWS, WIDTH, HIDDEN = 24, 8, 32


def backend_that(puts, then="aot_eager", **settings):
    """A backend that puts fastbp's ops, says in ``puts`` what they are, and goes on with another."""

    def backend(graph_module, example_inputs):
        puts.extend(str(match).split(", at ")[0] for match in put_ops(graph_module, **settings))
        graph_module.graph.lint()
        return lookup_backend(then)(graph_module, example_inputs)

    return backend


def compiled(function, puts, dynamic=False, **settings):
    return torch.compile(function, backend=backend_that(puts, **settings), fullgraph=True, dynamic=dynamic)


class Block(nn.Module):
    """Linears, and a forward that is ``compute(block, x)``."""

    def __init__(self, compute, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(WIDTH, HIDDEN, dtype=dtype), nn.Linear(WIDTH, HIDDEN, dtype=dtype)
        self.packed = nn.Linear(WIDTH, 2 * HIDDEN, dtype=dtype)
        self.square, self.small = nn.Linear(HIDDEN, HIDDEN, dtype=dtype), nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.last = nn.Linear(HIDDEN, WIDTH, dtype=dtype)
        self.compute = compute

    def forward(self, x):
        return self.compute(self, x)


def inputs(dtype=torch.float64, rows=ROWS, seed=1):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def step(function, model, x):
    """Outputs, and the gradients of x and the parameters, None where one has no part."""
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    outputs = function(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((y * like(y, seed=2)).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True)]


def assert_as_uncompiled(compute, expected, tolerance=1e-12, **options):
    """The compiled block computes what it computes uncompiled, and these ops were put, the last first."""
    model, x, puts = Block(compute), inputs(), []
    ours, stock = step(compiled(model, puts, **options), model, x), step(model, model, x)
    assert puts == expected
    for mine, theirs in zip(ours, stock, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
