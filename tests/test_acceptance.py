"""The one rule of what is right: every wrong result is refused and told where, and no right one is."""

import random

import pytest
import torch
import torch.nn.functional as F
from support import each

from fastbp import acceptance
from fastbp.acceptance import Exact, poisoned
from fastbp.activations import TABLE, bind
from fastbp.problem import DTYPES

HALVES = [torch.bfloat16, torch.float16]


def layer(rows, n, k, dtype, seed=0, activation="gelu"):
    """A layer in float64, by plain PyTorch in the dtype, and as a kernel makes it that sums in another order and rounds
    once, or twice where the dtype is as wide as what is summed in."""
    generator = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((rows, k), (n, k), (n,)))
    x, w, b, f = x.to(dtype), (w * k**-0.5).to(dtype), b.to(dtype), bind(activation)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ours = f(F.linear(x.to(wide).flip(1), w.to(wide).flip(1), b.to(wide))).to(dtype)
    return f(F.linear(x.double(), w.double(), b.double())), f(F.linear(x, w, b)), ours


def judge(exact, plain, **more):
    found = Exact(plain, "y")
    for start in range(0, len(exact), 7):
        found.put(start, exact[start : start + 7])
    found.allow(plain, **more)
    return found


def put_all(value):
    def spoil(y):
        y[...] = value

    return spoil


def put(row, column, value):
    def spoil(y):
        y[row, column] = value

    return spoil


def shift(y):
    y[8:24] = y[9:25].clone()


def next_bias(y):
    y[:, 5] = y[:, 6]


SPOILT = {
    "nan everywhere": (put_all(float("nan")), "has nan at row 0, column 0, instead of"),
    "zero everywhere": (put_all(0.0), "error 1 against float64 of y"),
    "inf in one number": (put(3, 4, float("inf")), "has inf at row 3, column 4, instead of"),
    "nan in one number": (put(-1, -1, float("nan")), "has nan at row {last}, column 39, instead of"),
    "the last row is zero": (put(-1, slice(None), 0.0), "at row {last}, column"),
    "a column is half": (lambda y: y[:, 5].mul_(0.5), "column 5, instead of"),
    "a column is off by a tenth": (lambda y: y[:, 5].mul_(1.1), "column 5, instead of"),
    "a row is off by a tenth": (lambda y: y[9].mul_(1.1), "row 9"),
    "the largest number is zero": (lambda y: y.view(-1)[y.argmax()].zero_(), ": 0 at row"),
    "one number is its neighbour": (lambda y: y.view(-1).__setitem__(int(y.argmax()), y.min()), "instead of"),
    "rows are shifted": (shift, "instead of"),
    "a bias is the next column's": (next_bias, "column 5, instead of"),
    "all is off by a twentieth": (lambda y: y.mul_(1.05), "error 0.0"),
}


@each("rows", [40, 4096])
@each("dtype", [*HALVES, torch.float32])
@each("fault", SPOILT)
def test_what_is_wrong_is_refused_and_told_where(rows, dtype, fault):
    exact, plain, ours = layer(rows, 40, 96, dtype)
    found = judge(exact, plain)
    assert found.refusal(ours) is None
    spoil, words = SPOILT[fault]
    spoil(ours)
    said = found.refusal(ours)
    assert said is not None and words.format(last=rows - 1) in said, said


@each("dtype", HALVES)
@each("spoilt", ["zero", "one too far"])
def test_one_number_in_millions(dtype, spoilt):
    """Whose part in the error of the whole is nothing."""
    exact, plain, ours = layer(4096, 512, 64, dtype)
    found = judge(exact, plain)
    assert found.refusal(ours) is None
    row, column = 1234, int(exact[1234].argmax())  # 0 in place of nearly 0 would be right
    ours[row, column] = 0.0 if spoilt == "zero" else ours[row, column] + 0.5
    said = found.refusal(ours)
    assert said.startswith("error ") and f"at row {row}, column {column}, instead of" in said, said


def test_no_right_kernel_is_refused():
    """Of any shape, dtype and activation: one row, one column, few products, many."""
    draw, judged = random.Random(0), 0
    sizes = (1, 2, 3, 8, 17, 40, 129)
    for seed in range(400):
        dtype, activation = draw.choice(DTYPES), draw.choice(TABLE).name
        rows, n, k = (draw.choice(sizes) for _ in range(3))
        if rows * n == 1:
            continue  # one number, which may have cancelled, and nothing to tell its size by
        exact, plain, ours = layer(rows, n, draw.choice((k, 1000)), dtype, seed, activation)
        assert judge(exact, plain).refusal(ours) is None, (seed, rows, n, dtype, activation)
        judged += 1
    assert judged > 350


@each("dtype", DTYPES)
def test_sums_that_cancel(dtype):
    """A bias gradient that is nearly 0 is as exact as what it is the sum of, which nobody tells by the sum alone."""
    refused = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        dz = torch.randn(4096, 2, generator=generator, dtype=torch.float64)
        dz = dz - dz.mean(0) * (1 - 1e-6)
        rounded = dz.to(dtype)  # as of a kernel that adds up what it stores; plain PyTorch was lucky
        exact, plain, ours = dz.sum(0), dz.sum(0).to(dtype), rounded.double().sum(0).to(dtype)
        entered = (dz.square().sum() / 2).sqrt().item()
        assert judge_vector(exact, plain, entered).refusal(ours) is None
        refused += judge_vector(exact, plain, 0.0).refusal(ours) is not None
        assert judge_vector(exact, plain, entered).refusal(ours + entered / 4) is not None
    assert refused > (20 if dtype != torch.float64 else -1), "or nothing cancelled here"


def judge_vector(exact, plain, entered):
    found = Exact(plain, "db")
    found.put(0, exact)
    found.allow(plain, entered=entered)
    return found


@each("dtype", HALVES)
def test_rows_of_zeros_must_be_zeros(dtype):
    """As of a gradient that is 0 for the padding of a batch."""
    exact, plain, ours = layer(64, 40, 32, dtype)
    for y in (exact, plain, ours):
        y[10:20] = 0.0
    found = judge(exact, plain)
    assert found.refusal(ours) is None
    ours[15, 3] = 0.05
    assert "at row 15, column 3, instead of 0" in found.refusal(ours)
    nothing = torch.zeros(4, 8, dtype=dtype)
    found = judge(nothing.double(), nothing)
    assert found.refusal(nothing) is None and found.refusal(-nothing) is None
    assert "instead of 0" in found.refusal(nothing + 1e-3)


def test_infinities_and_nan_stand_where_float64_has_them():
    exact = torch.tensor([[1.0, float("inf"), float("nan"), 7e4, -7e4, 2.0]], dtype=torch.float64)
    plain = exact.half()
    found = judge(exact, plain)
    assert plain[0, 3].isinf() and found.refusal(plain) is None
    for column, value in ((0, float("inf")), (1, 65504.0), (1, -float("inf")), (2, 1.0), (3, float("nan")),
                          (3, -float("inf")), (4, float("inf")), (5, float("nan"))):  # fmt: skip
        other = plain.clone()
        other[0, column] = value
        assert f"{value:.6g} at row 0, column {column}" in found.refusal(other)
    saturated = plain.clone()
    saturated[0, 3] = 65504.0  # as near as float16 comes, and PyTorch rounds it to infinity
    assert found.refusal(saturated) is None


def test_what_overflows_in_pytorch_itself_may_overflow():
    """An intermediate of PyTorch's is beyond the dtype, and that of a kernel which goes the same way."""
    exact = torch.ones(2, 4, dtype=torch.float64)
    plain = exact.half()
    plain[1, 2] = float("inf")
    found = judge(exact, plain)
    assert found.refusal(plain) is None and found.refusal(exact.half()) is None
    elsewhere = exact.half()
    elsewhere[1, 1] = float("inf")
    assert "has inf at row 1, column 1" in found.refusal(elsewhere)


def test_another_shape_or_dtype_is_refused():
    exact, plain, _ = layer(4, 8, 8, torch.bfloat16)
    found = judge(exact, plain)
    assert found.refusal(plain[:3]) == "y is (3, 8) of bfloat16, where (4, 8) of bfloat16 is wanted"
    assert found.refusal(plain.float()) == "y is (4, 8) of float32, where (4, 8) of bfloat16 is wanted"


@each("shape", [(), (5,), (0, 4), (4, 0), (2, 3, 5), (7, 3)])
def test_results_of_any_rank(shape):
    exact = torch.randn(shape, dtype=torch.float64)
    for plain in (exact.bfloat16(), exact.bfloat16().mT.contiguous().mT if len(shape) == 2 else exact.bfloat16()):
        found = Exact(plain)
        found.put(0, exact)
        found.allow(plain)
        assert found.refusal(plain) is None
        if exact.numel():
            assert "float64" in found.refusal(plain + 1)


def test_it_takes_memory_for_blocks_of_rows_and_no_float64_of_the_whole(monkeypatch):
    """Whatever it allocates is a block, or in the dtype of the result."""
    monkeypatch.setattr(acceptance, "NUMBERS", 1 << 10)
    exact, plain, ours = layer(512, 64, 8, torch.bfloat16)
    found = Exact(plain)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype in (torch.float64, torch.float32):
                largest = max(largest, result.numel())
            return result

    with Watch():
        for start in range(0, 512, 16):
            found.put(start, exact[start : start + 16].clone())
        found.allow(plain)
        assert found.refusal(ours) is None
        ours[-1] = 0
        assert found.refusal(ours) is not None
    assert largest == 1 << 10


def test_fresh_memory_holds_nan_meanwhile():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with poisoned():
        assert torch.empty(1000).isnan().all() and torch.empty(9, dtype=torch.bfloat16).isnan().all()
    assert before == (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)
    with pytest.raises(KeyError), poisoned():
        raise KeyError
    assert before[0] == torch.are_deterministic_algorithms_enabled()
