"""Beside a kink the slope may be either side's: where kinks are, what is turned, and that nothing else is excused."""

import pytest
import torch
from support import each

from benchmarks.cases import Case
from benchmarks.measure import Truth
from benchmarks.rivals import ALONE, eager
from benchmarks.steps import task_of
from fastbp.activations import TABLE, bind
from fastbp.kinks import Sides, kinks
from fastbp.reference import compose
from fastbp.tuning import drawn
from fastbp.tuning.jobs import parse

CPU = torch.device("cpu")
KINKS = {
    "relu": [0], "leaky_relu": [0], "selu": [0], "relu6": [0, 6], "hardtanh": [-1, 1], "hardswish": [-3, 3],
    "hardsigmoid": [-3, 3],
}  # fmt: skip
CALLS = [
    "linear_act 700x64x96 hardswish bfloat16 preact",
    "gated_linear_act 700x64x96 hardtanh bfloat16 preact",
    "mlp 700x64x96x64 hardswish bfloat16 preact",
    "mlp 700x64x96x64x32 hardtanh float16 preact",
    "gated_mlp 700x64x96x64 hardsigmoid bfloat16 preact",
]


@each("row", TABLE)
def test_kinks_are_where_the_slope_jumps(row):
    assert kinks(bind(row.name)) == pytest.approx(KINKS.get(row.name, []), abs=1e-9)


def test_kinks_are_those_of_the_parameters():
    assert kinks(bind("hardtanh", (-0.3, 1.7))) == pytest.approx([-0.3, 1.7], abs=1e-9)
    assert kinks(bind("elu", (2.0,))) == pytest.approx([0.0], abs=1e-9)
    assert kinks(torch.nn.PReLU(init=0.1).double()) == pytest.approx([0.0], abs=1e-9)


@each("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_stay_and_slopes_beside_a_kink_are_the_other_sides(dtype):
    eps = max(torch.finfo(dtype).eps, 2.0**-50)  # in float64 a kink is found to a neighbour of 3
    z = torch.tensor([3 - eps, 3 + eps, -3 + eps, -3 - eps, 2.9, 3.1, 0.0, -2.9], dtype=torch.float64)
    z.requires_grad_()
    f = bind("hardswish")
    sides = Sides(f, dtype)
    sides.noting(f)(z.detach().to(dtype))
    y = sides.other()(z)
    (slope,) = torch.autograd.grad(y.sum(), z)
    assert torch.equal(y, f(z))
    wanted = torch.tensor([1.0, 1.5, 0.0, -0.5, 0.5 + 2.9 / 3, 1.0, 0.5, 0.5 - 2.9 / 3], dtype=torch.float64)
    assert sides.turned == 4 and torch.allclose(slope, wanted, atol=max(3 * eps, 1e-6), rtol=0)


def test_the_rows_of_a_block_are_held_to_what_was_noted_of_them_and_a_wide_error_turns_more():
    f = bind("relu")
    z = torch.linspace(-1, 1, 2001, dtype=torch.float64)[:, None].repeat(1, 2)
    sides = Sides(f, torch.float32)
    noted = z.float()
    noted[1000:] += 0.01  # as of sums in bfloat16
    sides.noting(f)(noted)
    sides.other(slice(0, 1000))(z[:1000])
    assert sides.turned == 0
    sides.other(slice(1000, 2001))(z[1000:])
    assert 2 * 20 <= sides.turned <= 2 * 22  # z from 0 to twice the error


@each("words", CALLS)
def test_who_has_the_other_slopes_is_right_and_only_he(words, monkeypatch):
    monkeypatch.setattr(drawn, "BLOCKS", 1)
    job = parse("x", words, CPU)
    call = drawn.draw(job)
    exact = drawn.yardstick(job, call)
    f = bind(job.config.row.name)
    sides = Sides(f, job.dtype)
    drawn.plain(job, call, sides.noting(f))
    wide = {
        id(t): t.detach().double().requires_grad_(t.requires_grad) for t in (*call.inputs, *call.weights, *call.biases)
    }
    inputs, weights, biases = ([wide[id(t)] for t in each] for each in (call.inputs, call.weights, call.biases))
    y = compose(job.config.form, sides.other(), inputs, weights, biases)
    grads = torch.autograd.grad(y, [wide[id(t)] for t in call.wanted], call.dy.double())
    results = [t.detach().to(job.dtype) for t in (y, *grads)]
    assert sides.turned > 5
    assert [truth.refusal(t) for truth, t in zip(exact, results, strict=True)] == [None] * len(results)
    for truth, t in zip(exact[1:], results[1:], strict=True):
        for spoil in (lambda t: t[-1].zero_(), lambda t: t[:, 3].mul_(0.7)):
            if t.dim() < 2:
                continue
            spoilt = t.clone()
            spoil(spoilt)
            assert truth.refusal(spoilt) is not None, truth.name
    needed = set()
    for truth, t in zip(exact[1:], results[1:], strict=True):
        full = truth.beside
        for name in ("rows", "columns") if full else ():
            truth.beside = full._replace(**{name: torch.zeros_like(getattr(full, name))})
            needed |= {name} if truth.refusal(t) else set()
        truth.beside = full
    assert needed == {"rows", "columns"}, "or one of them excuses nothing"
    dx = exact[1]
    dx.beside = None
    assert dx.refusal(results[1]) is not None, "or nothing here needs to be excused"


def test_benchmarks_excuse_what_kinks_explain_and_nothing_else():
    case = Case("gated_mlp", 700, (64, 96, 64), "hardtanh", torch.bfloat16)
    task = task_of(case, CPU)
    exact, beside = task.truth("fwd_bwd")
    assert beside[0] is None and sum(t is not None and bool(t.any()) for t in beside[1:]) == 3  # of x and the gate
    truth = Truth(case, exact, beside)
    truth.allow(task.results(eager(case, task.parts), "fwd_bwd"))
    other = [e if off is None else e + off for e, off in zip(exact, beside, strict=True)]
    other = [t.to(case.dtype) for t in other]
    assert truth.refusal(other) is None
    other[1][-1] = 0
    assert "row 699 of gradient 1" in truth.refusal(other)


@each("kind, activation, mode", [("mlp", "gelu", "fwd_bwd"), (ALONE, "relu", "fwd_bwd"), ("mlp", "relu", "fwd")])
def test_where_no_kink_is_met_nothing_is_excused(kind, activation, mode):
    case = Case(kind, 40, (8, 16, 8) if kind == "mlp" else (8,), activation, torch.bfloat16)
    assert not any(t is not None for t in task_of(case, CPU).truth(mode)[1])
