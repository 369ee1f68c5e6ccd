"""What the compressed save policies write and read, and the slope that comes of it."""

import math

import torch
from bits import every_side_and_sign, whole
from support import (
    DTYPES,
    each,
)

from benchmarks.accuracy import slope
from fastbp import compression
from fastbp.activations import ROWS, TABLE

SIDED = [row for row in TABLE if row.grad_from_side is not None]
NARROW = [dtype for dtype in DTYPES if dtype != torch.float64]


def z_of(dtype, *, seed=0, rows=64, features=96):
    """Pre-activations from the far left to the far right, close to the minima, and ordinary ones."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    z[: rows // 4] *= 8
    near = torch.tensor([row.minimum_at for row in SIDED], dtype=torch.float64)[torch.arange(rows // 4) % len(SIDED)]
    z[rows // 4 : rows // 2] = near[:, None] + z[rows // 4 : rows // 2] * 1e-2
    return z.to(dtype)


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
    after, before = (whole(t).long() for t in (y, plain))
    moved = y != plain  # -0.0 is 0.0
    assert moved.any() and (plain[moved] < 0).all()
    assert ((after - before).abs()[moved] == 1).all()
    right = compression.decode_lsb(y, -math.inf)[1].bool()
    assert torch.equal(right, z.float() >= row.minimum_at)


@each("dtype", NARROW)
def test_lowest_bit_tells_the_side_of_a_y_that_has_no_sign_of_its_own(dtype):
    """PyTorch's own GELU is +0.0 far to the left in float32; and a rounded y must not be taken for a right one."""
    z, plain = every_side_and_sign(dtype)
    right = z.float() >= -0.75
    y = compression.encode_lsb(z, plain, -0.75)
    assert torch.equal(compression.decode_lsb(y, -math.inf)[1].bool()[~y.isnan()], right[~y.isnan()])
    moved = (y != plain) & ~y.isnan()
    assert torch.equal(moved & (plain >= 0), ~right & (plain > 0))  # which are no outputs
    assert ((whole(y).long() - whole(plain).long()).abs() <= 1)[plain < 0].all()


@each("dtype", NARROW)
@each("row", SIDED)
def test_the_output_of_pytorch_itself_gives_the_slope_of_every_z(row, dtype):
    """Also where its y is 0. Beside the minimum the slope is steep in y: a tenth, at most."""
    z = torch.linspace(-30, 30, 60001, dtype=torch.float64).to(dtype)
    for save in ("output_bits", "output_lsb"):
        gap = (slope(row, save, z) - row.grad(torch.ones((), dtype=torch.float64), z.double())).abs()
        assert gap.max() < (1e-3 if dtype == torch.float32 else 0.1), (save, z[gap.argmax()])


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


@each("dtype", NARROW)
def test_fp8_gives_back_the_largest_numbers_of_a_dtype_as_numbers(dtype):
    """Rounded to three bits of mantissa they would be beyond it."""
    largest = torch.finfo(dtype).max
    z = torch.tensor([largest, -largest, 1.0, 0.0]).to(dtype)
    read = compression.decode_fp8(*compression.encode_fp8(z), dtype)
    assert (read[:2].abs() >= largest / 16 * 15).all() and (read[:2].abs() <= largest).all()
    assert torch.equal(read.sign(), torch.tensor([1.0, -1.0, read[2].sign(), 0.0]).to(dtype))


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


@each(("save", "limit"), [("output_bits", 8e-4), ("output_lsb", 5e-3)])
def test_error_of_gelus_slope_in_bfloat16(save, limit):
    """Relative, z ~ N(0, 1) before it is rounded; all errors by activation and dtype are in docs/numerics.md."""
    row = ROWS["gelu"]
    z = torch.randn(1 << 12, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = row.grad(torch.ones((), dtype=torch.float64), z)
    gap = slope(row, save, z.bfloat16()) - truth
    assert gap.norm() / truth.norm() < limit
