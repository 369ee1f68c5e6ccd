"""Random programs: fastbp's linears give what those of torch.nn give, whatever stands around them."""

import copy
from collections import Counter

import pytest
import torch
from linear_twins import assert_close, assert_equal, outcome
from random_programs import ROWS, WIDTH, Program
from torch import Tensor, nn

import fastbp
from fastbp.linear import of_any_size

PROGRAMS, IN_ONE = 500, 100
FUSED = {"act_linear": 20, "gated_act_linear": 20, "linear of mul": 50}  # at least, of IN_ONE programs


def gradients(model: Program, y: Tensor, x: Tensor, twice: bool) -> list[Tensor | None]:
    """All gradients; and either those of their squares, or what accumulates in ``grad``."""
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    loss = y.square().sum()
    found = list(torch.autograd.grad(loss, wanted, create_graph=twice, retain_graph=True, allow_unused=True))
    if twice:
        squares = sum((g.square().sum() for g in found if g is not None), torch.zeros((), dtype=y.dtype))
        if squares.requires_grad:
            found += torch.autograd.grad(squares, wanted, allow_unused=True)
    else:
        loss.backward()
        found += [x.grad, *(p.grad for p in model.parameters()), *(seen.grad for seen in model.seen)]
    return found


def outcome_of(model: Program, x: Tensor, seed: int) -> tuple[list[Tensor], list[Tensor | None], list[float]] | None:
    """Output and random state, gradients, and the log; None where PyTorch refuses."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    try:
        y = model(x)
        found = gradients(model, y, x, twice=seed % 5 == 0)
    except RuntimeError:
        return None
    return [y, torch.rand(1)], found, model.log


@pytest.mark.parametrize("begin", range(0, PROGRAMS, IN_ONE))
def test_programs_compute_what_pytorch_computes(begin):
    found: Counter[str] = Counter()
    for seed in range(begin, begin + IN_ONE):
        torch.manual_seed(seed)
        stock = Program(seed).double()
        ours = copy.deepcopy(stock)
        for module in list(ours.modules()):
            if type(module) is nn.Linear:
                module.__class__ = fastbp.Linear
        x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
        with of_any_size():
            expected, got = (outcome_of(model, x, seed) for model in (stock, ours))
        if expected is None:
            continue
        assert got is not None, seed
        assert_equal(got[0], expected[0])
        scale = max((float(g.detach().abs().max()) for g in expected[1] if g is not None), default=0.0)
        for a, b in zip(got[1], expected[1], strict=True):
            present = [t for t in (a, b) if t is not None]
            difference = a - b if len(present) == 2 else sum(present)  # a gradient of zeros may be none at all
            if present:
                torch.testing.assert_close(difference, difference * 0, rtol=0, atol=1e-10 * scale, equal_nan=True)
        assert_close(map(torch.tensor, got[2]), map(torch.tensor, expected[2]), 1e-6)
        found["compared"] += 1
        found.update(what.split(",")[0] for status, what in map(outcome, ours.modules()) if status == "fused")
    assert found["compared"] > 0.8 * IN_ONE, found
    assert all(found[way] >= least for way, least in FUSED.items()), found
