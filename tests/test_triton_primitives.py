"""The activations for results of 16 bits, and the rounding to them, on every kind of number that 16 bits have."""

import pytest
import torch
from routes import TRITON_DEVICE
from support import ACTIVATIONS, each, places

from fastbp.backends import triton

pytestmark = pytest.mark.skipif(triton.unavailable is not None, reason=f"triton: {triton.unavailable}")
INF, NAN = float("inf"), float("nan")
SPECIAL = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    3.0,
    -3.0,
    6.0,
    -6.0,
    20.0,
    -20.0,
    65504.0,
    -65504.0,
    1e30,
    -1e30,
    2e38,
    -2e38,
    INF,
    -INF,
    NAN,
)
COUNT, BLOCK = 8192, 1024
# Half a unit of float16, an eighth of one of bfloat16, is what tanh.approx may be off; interpreted, all are nearer.
ALLOWED, ALLOWED_IN_TAILS = (2**-18, 2**-12) if triton.interpreting() else (2**-11, 2**-11)
each_dtype = each("dtype", [torch.bfloat16, torch.float16])

if triton.unavailable is None:
    import triton as language
    import triton.language as tl

    from fastbp.backends.triton import _activations_16
    from fastbp.backends.triton.blocks import parameters, rounded

    @language.jit
    def row_kernel(
        dy, z, out, p0: tl.float64, p1: tl.float64, VALUE: tl.constexpr, GRAD: tl.constexpr, FROM_OUTPUT: tl.constexpr,
        NUM_PARAMS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        dy_i, z_i, params = tl.load(dy + i), tl.load(z + i), parameters(p0, p1, NUM_PARAMS, tl.float32)
        tl.store(out + i, VALUE(z_i, *params))
        tl.store(out + COUNT + i, GRAD(dy_i, z_i, *params))
        if FROM_OUTPUT is not None:
            tl.store(out + 2 * COUNT + i, FROM_OUTPUT(dy_i, z_i, *params))

    @language.jit
    def rounding_kernel(x, y, size, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + i, rounded(tl.load(x + i, mask=i < size), DTYPE), mask=i < size)


def points(dtype, params):
    """Pairs (dy, z) in float32 that this dtype has: every special one with every special dy, a grid, random ones."""
    generator = torch.Generator().manual_seed(71)
    corners = torch.cartesian_prod(torch.tensor([1.0, -0.5, 0.0, INF, NAN]), torch.tensor([*SPECIAL, *params]))
    grid = torch.linspace(-12, 12, 2001)
    normal = torch.randn(COUNT - len(corners) - len(grid), generator=generator) * 3
    z = torch.cat([corners[:, 1], grid, normal])
    dy = torch.cat([corners[:, 0], torch.randn(COUNT - len(corners), generator=generator)])
    return tuple(t.to(dtype).float().to(TRITON_DEVICE) for t in (dy, z))


def evaluated(activation, dy, z):
    """Value, gradient and, where there is one, gradient from the output, for which z stands as well."""
    row, params = activation
    found = [row.value(z, *params), row.grad(dy, z, *params)]
    return [*found, row.grad_from_output(dy, z, *params)] if row.grad_from_output else found


def computed(activation, dy, z):
    """The same by Triton."""
    row, params = activation
    forms = ("value", "grad", "grad_from_output")
    functions = [getattr(_activations_16, f"{row.name}_{form}", None) for form in forms]
    assert (functions[2] is None) == (row.grad_from_output is None)
    out = torch.full((3, COUNT), NAN, device=TRITON_DEVICE)
    row_kernel[(COUNT // BLOCK,)](dy, z, out, *(*params, 0.0, 0.0)[:2], *functions, len(params), COUNT, BLOCK)
    return out[: 2 + (functions[2] is not None)]


def show(where, *tensors):
    return list(zip(*(t[where].tolist() for t in tensors), strict=True))[:5]


@each_dtype
@each("activation", ACTIVATIONS)
def test_every_activation(activation, dtype):
    """NaN and inf where the formula in float32 has them, the rest near it in float64, relative to its terms.

    These are of the size of dy (1 + |z|) and may cancel; beyond |z| = 20 nothing cancels any more. Of a dy of inf or
    NaN there is the same number of results that are not finite: inf · Φ(-20) depends on where Φ underflows.
    """
    dy, z = points(dtype, activation.params)
    forms = zip(
        computed(activation, dy, z), evaluated(activation, dy, z), evaluated(activation, dy.double(), z.double()),
        strict=True,
    )  # fmt: skip
    for number, (got, narrow, exact) in enumerate(forms):
        kinds = [torch.where((number == 0) | dy.isfinite(), places(t), t.isfinite()) for t in (got, narrow)]
        elsewhere = kinds[0] != kinds[1]
        assert not elsewhere.any(), f"{number}: (dy, z, result, formula) = {show(elsewhere, dy, z, got, narrow)}"
        terms = (1 if number == 0 else dy.abs()) * (1 + z.abs().clamp(max=20))
        allowed = ALLOWED * (exact.abs() + terms.nan_to_num(nan=0.0, posinf=0.0))
        wrong = narrow.isfinite() & ~((got - exact).abs() <= allowed)
        assert not wrong.any(), f"{number}: (dy, z, result, exact) = {show(wrong, dy, z, got, exact)}"


@each_dtype
@each("activation", ACTIVATIONS)
def test_the_tails_keep_their_digits(activation, dtype):
    """Relative to the value itself, which for gelu is -1.4e-6 at -5."""
    dy, z = points(dtype, ())
    near = z.abs() <= 5
    got, exact = computed(activation, dy, z)[0][near], evaluated(activation, dy.double(), z.double())[0][near]
    wrong = ~((got - exact).abs() <= ALLOWED_IN_TAILS * exact.abs())
    assert not wrong.any(), f"(z, result, exact) = {show(wrong, z[near], got, exact)}"


def halfway(dtype):
    """Every number of a dtype of 16 bits, what lies half way to the next, and what lies just beside that."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()].double().unique()
    middles = torch.cat([(numbers[1:] + numbers[:-1]) / 2, numbers]).float()
    return torch.cat([middles.nextafter(torch.tensor(end)) for end in (-INF, INF)] + [middles])


@each_dtype
def test_rounding_is_that_of_torch_to_the_bit(dtype):
    """Ties, and random bits: every exponent, subnormal numbers, inf, NaN of any payload."""
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(72)).to(torch.int32)
    special = torch.tensor([*SPECIAL, 65519.0, 65520.0, 65536.0, 2.0**-25, 2.0**-24, 2.0**-149, 3.4028235e38])
    payload = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    x = torch.cat([halfway(dtype), bits.view(torch.float32), special, -special, payload]).to(TRITON_DEVICE)
    expected, found = x.to(dtype), torch.empty_like(x, dtype=dtype)
    block = COUNT if triton.interpreting() else BLOCK
    name = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
    rounding_kernel[(-(-len(x) // block),)](x, found, len(x), name, block)
    wrong = (found.view(torch.int16) != expected.view(torch.int16)) & ~(found.isnan() & expected.isnan())
    assert not wrong.any(), f"(x, result, torch's) = {show(wrong, x, found, expected)}"
