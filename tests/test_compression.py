"""The compressed save policies: what is written and read, the errors that are published, and calls with them."""

import math

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
    widened,
)
from torch import nn

import fastbp
from fastbp import compression
from fastbp.activations import TABLE, bind
from fastbp.forms import FORMS, GATED_LINEAR_ACT, LINEAR_ACT, MLP
from fastbp.problem import configure
from fastbp.residuals import output_and_kept, read_kept

SIDED = [row for row in TABLE if row.grad_from_side is not None]
NARROW = [dtype for dtype in DTYPES if dtype != torch.float64]
EXTRA = [bind(name) for name in ("hardswish", "relu", "tanh")]
CASES = compressed_cases([*(bind(row.name) for row in SIDED), *EXTRA])
GELU = bind("gelu")


def z_of(dtype, *, seed=0, rows=64, features=96):
    """Pre-activations from the far left to the far right, close to the minima, and ordinary ones."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    z[: rows // 4] *= 8
    near = torch.tensor([row.minimum_at for row in SIDED], dtype=torch.float64)[torch.arange(rows // 4) % len(SIDED)]
    z[rows // 4 : rows // 2] = near[:, None] + z[rows // 4 : rows // 2] * 1e-2
    return z.to(dtype)


def slopes(row, save, z):
    """The slope as backward computes it from what a policy keeps of z, in float64."""
    config = configure("linear_act", row.name, (), save, "reference")
    y, kept = output_and_kept(config, z)
    one = torch.ones(())
    if save == "fp8":
        return row.grad(one, compression.decode_fp8(*kept, torch.float32)).double()
    return row.grad_from_side(one, *read_kept(config, y, kept, z.dtype)[1][0]).double()


# What is written.


@each("dtype", NARROW)
@each("row", SIDED)
@each("features", [96, 1, 7])
def test_bits_are_the_side_and_the_next_digits_of_y(row, dtype, features):
    z = z_of(dtype)[:, :features]
    wide_y = row.value(z.float())
    y = wide_y.to(dtype)
    bits = compression.encode_bits(z, wide_y, y, row.minimum_at)
    assert bits.dtype == torch.uint8 and bits.shape == (len(z), -(-features // 2))
    if features % 2:
        assert (bits[:, -1] >> 4 == 0).all()
    read, right = compression.decode_bits(y, bits, -math.inf)
    assert torch.equal(right.bool(), z.float() >= row.minimum_at)
    # The digits leave an eighth of the rounding of y, half to either side of where they put it. Sixteen-bit numbers
    # that are powers of two have neighbours at half the distance on one side, and subnormal ones have fewer digits.
    unit = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(y.double().abs())))
    usual = (y.double().abs() >= torch.finfo(dtype).tiny) & (torch.frexp(y.float())[0].abs() != 0.5)
    gap = (read.double() - wide_y.double()).abs() / unit
    limit = 0.0 if dtype == torch.float32 else 1 / 16
    assert (gap[usual] <= limit).all()
    assert usual.float().mean() > 0.9


@each("dtype", NARROW)
@each("row", SIDED)
def test_lowest_bit_moves_y_by_at_most_a_unit_and_tells_the_side(row, dtype):
    z = torch.cat([z_of(dtype).flatten(), torch.tensor([-200.0, -40.0, -0.0, 0.0, -1e-30, 200.0]).to(dtype)])
    plain = row.value(z.float()).to(dtype)
    y = compression.encode_lsb(z, plain, row.minimum_at)
    whole, before = (t.view(torch.int16 if dtype.itemsize == 2 else torch.int32).long() for t in (y, plain))
    moved = y != plain  # -0.0 is 0.0
    assert moved.any() and (plain[moved] < 0).all()
    assert ((whole - before).abs()[moved] == 1).all()
    right = compression.decode_lsb(y, -math.inf)[1].bool()
    assert torch.equal(right, z.float() >= row.minimum_at)


@each("dtype", NARROW)
def test_fp8_is_the_nearest_in_each_block(dtype):
    powers = torch.linspace(-24, 24, 64) if dtype != torch.float16 else torch.linspace(-4, 2, 64)
    z = (z_of(torch.float32, features=77) * 10.0 ** powers[:, None]).to(dtype)
    codes, scales = compression.encode_fp8(z)
    assert codes.shape == z.shape and scales.shape == (64, 3) and codes.dtype == scales.dtype == torch.uint8
    read = compression.decode_fp8(codes, scales, torch.float64)
    for block in range(3):
        part, found = z[:, 32 * block : 32 * block + 32].double(), read[:, 32 * block : 32 * block + 32]
        largest = part.abs().amax(1, keepdim=True)
        # Three bits of mantissa: half a unit is 1/16 of a normal number, and of the least one below it. The scale
        # leaves the largest number of a block at least 224, and 2⁻⁶ is the least normal one.
        allowed = torch.maximum(part.abs() / 16, largest / 224 * 2.0**-10)
        usual = (largest > 1e-30).expand_as(part)
        assert ((found - part).abs() <= allowed)[usual].all()
        assert (found.abs() <= largest).all() or ((found.abs() - largest) <= largest / 16).all()


def test_fp8_codes_are_those_of_pytorch():
    """A block whose largest number is 448 has the scale 1: then every code is PyTorch's own, ties and all."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    between = (every[:-1] + every[1:]) / 2  # ties
    numbers = torch.cat([every, between, torch.randn(4096) * 20]).clamp(-448, 448)
    blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % 31)).view(-1, 31)
    blocks = torch.cat([torch.full((len(blocks), 1), 448.0), blocks], 1)
    codes, scales = compression.encode_fp8(blocks)
    assert (scales == 127).all()
    assert torch.equal(codes.view(torch.float8_e4m3fn).float(), blocks.to(torch.float8_e4m3fn).float())


def test_fp8_keeps_what_is_finite_apart_from_what_is_not():
    z = torch.randn(2, 64)
    z[0, 3], z[0, 40], z[1, 5] = math.inf, math.nan, -math.inf
    read = compression.decode_fp8(*compression.encode_fp8(z), torch.float32)
    assert torch.equal(read.isnan(), ~z.isfinite())
    clean = compression.decode_fp8(*compression.encode_fp8(torch.where(z.isfinite(), z, 0.0)), torch.float32)
    assert torch.equal(read[z.isfinite()], clean[z.isfinite()])


# The slope.


@each("grade", ["grad_from_side", "grad_from_side_16"])
@each("row", SIDED)
def test_the_polynomials_give_the_slope_over_the_whole_range(row, grade):
    """From the y of float64, at the minimum and in the tails too; left of it relative to the slope itself."""
    d = torch.logspace(-6, 2, 4001, dtype=torch.float64)
    one, at = torch.ones((), dtype=torch.float64), row.minimum_at
    fine = grade == "grad_from_side"
    for side, z in ((1.0, at + d), (0.0, at - d)):
        y = row.value(z).clamp(min=row.lowest)
        found = getattr(row, grade)(one, y, torch.full_like(y, side))
        gap = (found - row.grad(one, z)).abs()
        assert (gap < (5e-6 if fine else 1.2e-4)).all()
        if side == 0:
            assert (gap < (2e-7 if fine else 3e-5)).all()
            tail = (y < -1e-6) & (z < at - 0.5)
            assert ((gap / row.grad(one, z).abs())[tail] < (1e-5 if fine else 2e-2)).all()
            assert (found[y > -1e-30].abs() < 1e-27).all()


# Relative error of the slope, z ~ N(0, 1), as docs/numerics.md publishes it, with a third to spare.
PUBLISHED = {
    ("output_bits", torch.bfloat16): 9e-4,
    ("output_bits", torch.float16): 1.6e-4,
    ("output_bits", torch.float32): 7e-6,
    ("output_lsb", torch.bfloat16): 6.5e-3,
    ("output_lsb", torch.float16): 1.7e-3,
    ("output_lsb", torch.float32): 7e-6,
    ("fp8", torch.bfloat16): 1.25e-2,
    ("fp8", torch.float16): 1.25e-2,
    ("fp8", torch.float32): 1.25e-2,
}


@each(("save", "dtype"), PUBLISHED)
@each("row", SIDED)
def test_error_of_the_slope(row, save, dtype):
    z = torch.randn(1 << 18, 64 // 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64).view(-1, 64)
    truth = row.grad(torch.ones((), dtype=torch.float64), z)
    found = slopes(row, save, z.to(dtype))
    relative = ((found - truth).norm() / truth.norm()).item()
    assert relative < PUBLISHED[save, dtype]
    if row.name == "gelu" and dtype == torch.bfloat16 and save != "fp8":
        assert relative < {"output_bits": 8e-4, "output_lsb": 5e-3}[save]


# Whole calls.


def as_kept(form, activation, save, inputs):
    """Eager's output and gradients, but with what the policy makes of z: an independent way to the same numbers."""
    x, *rest = inputs
    weights, biases = rest[: len(rest) // 2], rest[len(rest) // 2 :]
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
            return (dy.double() * slopes(row, save, z)).to(z.dtype)

    return eager(form, x, weights, biases, Kept.apply)


@each("dtype", NARROW)
@each("rows", [37, (2, 3, 5), 0, ()])
@each(("form", "activation", "save"), [c for c in CASES if c[0] in (LINEAR_ACT, MLP) and c[2] != "fp8"])
def test_values_and_gradients(form, activation, save, rows, dtype):
    """As by the slope that the policy gives, to rounding."""
    inputs = flatten(*tensors(form, dtype, seed=1, rows=rows))
    half = 1 + len(inputs) // 2
    ours = call(form, inputs[0], inputs[1:half], inputs[half:], activation=activation, save=save)
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


@each(("form", "activation", "save"), CASES)
def test_gradients_beside_eagers(form, activation, save):
    """The published factors hold for every gradient of every form in bfloat16."""
    dtype = torch.bfloat16
    inputs = flatten(*tensors(form, dtype, seed=5, rows=512, features=(96, 128, 96, 64)))
    half = 1 + len(inputs) // 2
    ours = call(form, inputs[0], inputs[1:half], inputs[half:], activation=activation, save=save)
    theirs = eager(form, inputs[0], inputs[1:half], inputs[half:], activation)
    wide = widened(inputs)
    truth = exact(form, wide[0], wide[1:half], wide[half:], formula(activation))
    dy = like(ours, 6)
    found = zip(grads(ours, inputs, dy), grads(theirs, inputs, dy), grads(truth, wide, dy.double()), strict=True)
    for index, (mine, eagers, true) in enumerate(found):
        rms, _ = error(mine, true)
        limit = FACTORS[save] * error(eagers, true)[0] + 0.05 * torch.finfo(dtype).eps * true.square().mean().sqrt()
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
        half = 1 + len(inputs) // 2
        y = call(form, inputs[0], inputs[1:half], inputs[half:], activation=GELU, save=save)
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
def test_transforms_compute_as_recompute_does(form, activation, save):
    x, weights, biases = tensors(form, torch.float32, seed=10, rows=4)

    def loss(x, save):
        return call(form, x, weights, biases, activation=activation, save=save).square().sum()

    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        mine, other = (transform(lambda x, save=save: loss(x, save))(x) for save in (save, "recompute"))
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
    half = 1 + len(inputs) // 2
    y = call(form, inputs[0], inputs[1:half], inputs[half:], activation=activation, save=save)
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
    half = 1 + len(inputs) // 2

    def step(*inputs):
        return call(
            form, inputs[0], inputs[1:half], inputs[half:], activation=activation, save=save, backend="reference"
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, eagers = compiled(*inputs), step(*inputs)
    assert torch.equal(ours, eagers)
    for a, b in zip(grads(ours, inputs, like(ours, 17)), grads(eagers, inputs, like(ours, 17)), strict=True):
        assert torch.equal(a, b)
