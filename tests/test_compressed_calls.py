"""Whole calls under the compressed save policies: gradients, derivatives of any order, transforms, graphs, bytes."""

import pytest
import torch
from support import (
    DTYPES,
    call,
    compressed_cases,
    each,
    eager,
    error,
    exact,
    flatten,
    formula,
    grads,
    like,
    special,
    stock,
    tensors,
    unflatten,
    widened,
)
from torch import nn

import fastbp
from benchmarks.accuracy import slope
from fastbp import residuals
from fastbp.activations import TABLE, bind
from fastbp.forms import FORMS, GATED_LINEAR_ACT, LINEAR_ACT, MLP
from fastbp.problem import configure
from fastbp.residuals import output_and_kept
from fastbp.saving import leanest

SIDED = [row for row in TABLE if row.grad_from_side is not None]
NARROW = [dtype for dtype in DTYPES if dtype != torch.float64]
EXTRA = [bind(name) for name in ("hardswish", "relu", "tanh")]
CASES = compressed_cases([*(bind(row.name) for row in SIDED), *EXTRA])
GELU = bind("gelu")


def as_kept(form, activation, save, inputs):
    """Eager's output and gradients, but with what the policy makes of z: an independent way to the same numbers."""
    x, weights, biases = unflatten(form, inputs)
    row = activation.row

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            config = configure("mlp", row.name, activation.params, save, "reference")
            ctx.save_for_backward(z)
            return output_and_kept(config, z)[0]

        @staticmethod
        def backward(ctx, dy):
            (z,) = ctx.saved_tensors
            return (dy.double() * slope(row, save, z)).to(z.dtype)

    return eager(form, x, weights, biases, Kept.apply)


@each("dtype", NARROW)
@each("rows", [37, (2, 3, 5), 0, ()])
@each(("form", "activation", "save"), [c for c in CASES if not c[0].gated and c[2] != "fp8"])
def test_values_and_gradients(form, activation, save, rows, dtype):
    """As by the slope that the policy gives, to rounding."""
    inputs = flatten(*tensors(form, dtype, seed=1, rows=rows))
    ours = call(form, *unflatten(form, inputs), activation=activation, save=save)
    theirs = as_kept(form, activation, save, inputs)
    dy = like(ours, 2)
    for mine, other in zip([ours, *grads(ours, inputs, dy)], [theirs, *grads(theirs, inputs, dy)], strict=True):
        if not mine.numel():
            continue
        rms, _ = error(mine, other)
        # Where y differs by one rounding, another code; else some roundings of what is summed up.
        allowed = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert rms <= allowed * other.double().square().mean().sqrt() and mine.shape == other.shape


# How far a gradient of a whole call may be from float64's, over eager's own error; z ~ N(0, 1), 16 bits.
FACTORS = {"output_bits": 1.1, "output_lsb": 4.0, "fp8": 12.0}
OF_GIVEN = {"fp8": 17.0}  # eager's error is less where it rounds no z


@each(("form", "activation", "save"), CASES)
def test_gradients_beside_eagers(form, activation, save):
    """The published factors hold for every gradient of every form in bfloat16."""
    dtype = torch.bfloat16
    inputs = flatten(*tensors(form, dtype, seed=5, rows=512, features=(96, 128, 96, 64)))
    ours = call(form, *unflatten(form, inputs), activation=activation, save=save)
    theirs = eager(form, *unflatten(form, inputs), activation)
    wide = widened(inputs)
    truth = exact(form, *unflatten(form, wide), formula(activation))
    dy = like(ours, 6)
    found = zip(grads(ours, inputs, dy), grads(theirs, inputs, dy), grads(truth, wide, dy.double()), strict=True)
    for index, (mine, eagers, true) in enumerate(found):
        rms, _ = error(mine, true)
        factor = OF_GIVEN.get(save, FACTORS[save]) if form.given else FACTORS[save]
        limit = factor * error(eagers, true)[0] + 0.05 * torch.finfo(dtype).eps * true.square().mean().sqrt()
        assert rms <= limit, f"{index}: {rms / error(eagers, true)[0]:.2f} times eager's error"


@each("dtype", NARROW)
@each(("form", "activation", "save"), [c for c in CASES if c[0] in (LINEAR_ACT, GATED_LINEAR_ACT)])
def test_at_special_points(form, activation, save, dtype):
    """What is finite in eager is finite here, and where z is not finite no number comes out where eager has NaN."""
    x = special(activation, dtype)[:, None].requires_grad_()
    weights, biases = [torch.ones(64, 1, dtype=dtype)] * form.width, [None] * form.width
    ours = call(form, x, weights, biases, activation=activation, save=save)
    dy = like(ours, 7).abs() / 64
    mine = grads(ours, [x], dy)[0]
    for theirs in (eager(form, x, weights, biases, f) for f in (stock(activation), formula(activation))):
        other = grads(theirs, [x], dy)[0]
        assert mine[x.isfinite() & other.isfinite()].isfinite().all()
        assert not mine[~x.isfinite() & other.isnan()].isfinite().any()


@each(("form", "save"), [(LINEAR_ACT, "output_bits"), (LINEAR_ACT, "output_lsb"), (MLP, "fp8"), (MLP, "output_bits")])
def test_derivatives_of_any_order_are_those_of_z(form, save):
    def second(save):
        inputs = flatten(*tensors(form, torch.float32, seed=8, rows=5))
        y = call(form, *unflatten(form, inputs), activation=GELU, save=save)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]

    pairs = list(zip(second(save), second("recompute"), strict=True))
    for index, (mine, other) in enumerate(pairs):
        first = index < len(pairs) // 2
        # The first are from z, to rounding. Through the second runs a first derivative, as the policy has it.
        limit = 3e-6 if first and save != "output_lsb" else {"fp8": 0.1}.get(save, 1e-4)
        assert (mine - other).norm() <= limit * other.norm(), index


@each("save", ["output_bits", "output_lsb", "fp8"])
def test_a_gradient_to_be_differentiated_says_that_x_was_not_kept(save):
    x, (w,), (b,) = tensors(LINEAR_ACT, torch.float32, seed=9)
    y = fastbp.linear_act(x, w.detach(), b.detach(), save=save)
    with pytest.raises(RuntimeError, match=f"fastbp.linear_act: .*create_graph.* save='{save}'.* save='preact'"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.autograd.grad(fastbp.linear_act(x, w.detach(), save=save).sum(), x)[0].isfinite().all()


@each(("form", "activation", "save"), [c for c in CASES if c[1].name in ("gelu", "relu")])
def test_transforms_compute_as_if_nothing_were_written(form, activation, save):
    x, weights, biases = tensors(form, torch.float32, seed=10, rows=4)

    def loss(x, save):
        return call(form, x, weights, biases, activation=activation, save=save).square().sum()

    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        mine, other = (transform(lambda x, save=save: loss(x, save))(x) for save in (save, leanest(form)))
        assert torch.equal(mine, other)


@each("change", ["mul_", "relu_"])
@each("save", ["output_bits", "output_lsb"])
def test_changing_y_in_place_before_backward_raises(save, change):
    x, (w,), (b,) = tensors(LINEAR_ACT, torch.bfloat16, seed=11)
    y = fastbp.linear_act(x, w, b, save=save)
    changed = y.mul_(2) if change == "mul_" else torch.relu_(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed.sum().backward()


@each(("form", "activation", "save"), [c for c in CASES if c[1].name == "gelu"])
def test_two_backward_calls_give_equal_bits(form, activation, save):
    inputs = flatten(*tensors(form, torch.bfloat16, seed=12))
    y = call(form, *unflatten(form, inputs), activation=activation, save=save)
    first, second = (torch.autograd.grad(y, inputs, like(y, 13), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each("dtype", NARROW)
@each("row", SIDED)
def test_lowest_bit_outputs(row, dtype):
    """The output differs from the plain one by at most one unit in the last place, and only where it is negative."""
    x, weights, biases = tensors(LINEAR_ACT, dtype, seed=14, rows=200)
    plain = fastbp.linear_act(x, *weights, *biases, activation=row.name, save="output_bits")
    marked = fastbp.linear_act(x, *weights, *biases, activation=row.name, save="output_lsb")
    whole, before = (t.view(torch.int16 if dtype.itemsize == 2 else torch.int32).long() for t in (marked, plain))
    differs = marked != plain
    assert differs.any() and (plain[differs] < 0).all() and ((whole - before).abs()[differs] == 1).all()
    with torch.no_grad():  # where no backward can follow, nothing is marked
        assert torch.equal(fastbp.linear_act(x, *weights, *biases, activation=row.name, save="output_lsb"), plain)


# Bytes.

BYTES = [
    ("mlp", "gelu", "output_bits", 2.5), ("mlp", "gelu", "output_lsb", 2.0), ("mlp", "gelu", "fp8", 1.03125),
    ("gated_mlp", "silu", "fp8", 2.0625), ("gated_mlp", "relu", "fp8", 2.0625),
    ("gated_linear_act", "silu", "fp8", 2.0625),
    ("act_linear", "gelu", "output_bits", 2.5), ("act_linear", "gelu", "output_lsb", 2.0),
    ("act_linear", "gelu", "fp8", 1.03125), ("gated_act_linear", "silu", "fp8", 2.0625),
    ("linear_act", "gelu", "fp8", 1.03125), ("linear_act", "gelu", "output_bits", 2.5),
]  # fmt: skip


@each(("name", "activation", "save", "expected"), BYTES)
def test_bytes_for_each_hidden_element(name, activation, save, expected):
    """In bfloat16, beyond the input; under output_bits a layer's y counts, which the next layer keeps anyway."""
    form = FORMS[name]
    x, weights, biases = tensors(form, torch.bfloat16, seed=15, rows=32, features=(64, 128, 128, 64))
    with fastbp.SavedBytes(exclude=flatten(x, weights, biases)) as kept:
        call(form, x, weights, biases, activation=activation, save=save)
    assert kept.total == expected * 32 * 128 * form.hidden(len(weights))


@each(("save", "expected"), [("output_bits", 2.5), ("output_lsb", 2.0), ("preact", 4.0)])
def test_bytes_of_a_layer_with_a_linear_after_it(save, expected):
    model = nn.Sequential(fastbp.LinearAct(64, 128, save=save), nn.Linear(128, 32)).bfloat16()
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    with fastbp.SavedBytes(exclude=[model, x]) as kept:
        y = model(x)
    assert kept.total == expected * 32 * 128
    y.sum().backward()


@each(("form", "activation", "save"), [c for c in CASES if c[1].name in ("gelu", "relu")])
def test_compiled_calls_keep_and_compute_the_same(form, activation, save):
    inputs = flatten(*tensors(form, torch.bfloat16, seed=16))

    def step(*inputs):
        return call(form, *unflatten(form, inputs), activation=activation, save=save, backend="reference")

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, eagers = compiled(*inputs), step(*inputs)
    assert torch.equal(ours, eagers)
    for a, b in zip(grads(ours, inputs, like(ours, 17)), grads(eagers, inputs, like(ours, 17)), strict=True):
        assert torch.equal(a, b)


@each("dtype", NARROW)
@each(("form", "activation", "save"), CASES)
def test_blocks_of_rows_give_what_the_whole_gives(form, activation, save, dtype, monkeypatch):
    """In plain torch rows are taken in blocks; here of two rows and one, and the last one is cut short."""
    inputs = flatten(*tensors(form, dtype, seed=8, rows=(3, 7), features=(5, 33, 34, 6)))

    def step():
        y = call(form, *unflatten(form, inputs), activation=activation, save=save, backend="reference")
        return [y, *grads(y, inputs, like(y, 9))]

    whole = step()
    monkeypatch.setattr(residuals, "IN_A_BLOCK", 67)
    for mine, other in zip(step(), whole, strict=True):  # equal, but for the last places at the end of a register
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
