"""The compressed save policies in the Triton kernels: the codes are those of plain torch, and so are the gradients."""

import functools

import pytest
import torch
from bits import every_side_and_sign, whole
from routes import TRITON_DEVICE, each_triton_route
from support import (
    assert_as_good_as_eager,
    call,
    each,
    eager,
    error,
    flatten,
    grads,
    like,
    places,
    roundings,
    saved_row,
    special,
    stock,
    unflatten,
)
from support import tensors as draw

from fastbp import compression, ops, reference
from fastbp.activations import TABLE, bind
from fastbp.backends import triton
from fastbp.compression import DTYPES
from fastbp.forms import ACT_LINEAR, GATED_ACT_LINEAR, GATED_LINEAR_ACT, GATED_MLP, LINEAR_ACT, MLP
from fastbp.problem import configure
from fastbp.reference import Saved
from fastbp.residuals import read_kept, sides
from fastbp.saving import POLICIES, find_residuals, kept

if triton.unavailable is None:
    import triton.language as tl
    from triton import jit

    from fastbp.backends.triton import choice, codes, configs, launch, layers

    @jit
    def mark_kernel(z, y, marks, AT: tl.constexpr, DTYPE: tl.constexpr, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(marks + i, codes.mark_side(tl.load(y + i), tl.load(z + i), AT, DTYPE))


pytestmark = pytest.mark.skipif(triton.unavailable is not None, reason=f"triton: {triton.unavailable}")
tensors = functools.partial(draw, device=TRITON_DEVICE, requires_grad=False)

GELU = bind("gelu")
SIDED = [bind(row.name) for row in TABLE if row.grad_from_side is not None]
EVEN, ODD = (24, 40, 32, 16), (19, 35, 17, 11)
# One activation where the text of the kernels is the same; every one, in odd sizes, where it is its own.
ONE_EACH = [(form, GELU, save) for form in (MLP, ACT_LINEAR) for save in ("output_bits", "output_lsb", "fp8")]
ONE_EACH += [(form, bind("silu"), "fp8") for form in (GATED_MLP, GATED_ACT_LINEAR)]
LAYERS = [(LINEAR_ACT, bind("hardswish"), "fp8"), (GATED_LINEAR_ACT, bind("softplus", (2.0, 20.0)), "fp8")]
CASES = [(*case, features) for case in ONE_EACH for features in (EVEN, ODD)] + [(*case, ODD) for case in LAYERS]
CASES += [(LINEAR_ACT, a, save, ODD) for a, save in zip(SIDED, ["output_bits", "output_lsb"] * 3, strict=False)]
each_way = pytest.mark.parametrize(
    ("triton_route", "dtype"),
    [*(("library", dtype) for dtype in DTYPES), ("fused", torch.bfloat16)],
    indirect=["triton_route"],
    ids=str,
)


def config_of(form, activation, save, backend="triton"):
    return configure(form.name, activation.name, activation.params, save, backend)


def forward(form, activation, save, x, weights, biases):
    inputs, weights, biases = form.split([x, *weights, *biases])
    y, *residuals = ops.forward(config_of(form, activation, save), inputs, weights, biases)
    features = [t.shape[-1] for t in inputs] if form.given else [w.shape[0] for w in weights]
    assert [(r.shape[-1], r.dtype) for r in residuals] == [
        (r.features(features[r.linear]), r.dtype(x.dtype)) for r in find_residuals(form, save, len(weights))
    ]
    return y, residuals


def wide_value(activation, z):
    """f(z) as the kernels have it before it is rounded."""
    how = launch.arithmetic(config_of(LINEAR_ACT, activation, "preact"), z.dtype)
    types = launch.arithmetic(config_of(LINEAR_ACT, activation, "preact"), torch.float32).types
    y = torch.empty_like(z, dtype=torch.float32)
    launch.activation(how._replace(types=types), z.float(), None, y)()
    return y


@each_way
@each(("form", "activation", "save", "features"), CASES)
def test_codes_are_those_of_plain_torch(form, activation, save, features, dtype, triton_route):
    """Of z as the same kernels keep it, in the first layer; from far left to far right, with inf and NaN among it."""
    x, weights, biases = tensors(form, dtype, seed=71, rows=(3, 6), features=features)
    x[0, 1:4] *= 8
    x[1, 0, 0], x[1, 1, 1] = float("inf"), float("nan")
    if form is MLP and POLICIES[save].from_output:  # layers above see another h under output_lsb
        form, weights, biases = LINEAR_ACT, weights[:1], biases[:1]
    plain, zs = forward(form, activation, "preact", x, weights, biases)
    y, residuals = forward(form, activation, save, x, weights, biases)
    if form.given:
        zs = [x, *weights[: form.inputs - 1]]
        if POLICIES[save].from_output:
            y, *residuals = residuals  # the layer's output is what is kept
            plain = layers.output_of(config_of(form, activation, "preact"), zs)[0]
    z = zs[0]
    if save == "output_lsb":
        assert torch.equal(whole(y), whole(compression.encode_lsb(z, plain, activation.row.minimum_at)))
        return
    assert torch.equal(whole(y), whole(plain))
    if save == "fp8":
        for kept_z, codes, scales in zip(zs, residuals[0::2], residuals[1::2], strict=True):
            expected = compression.encode_fp8(kept_z)
            assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])
            # But for a row before them in each layer: where K is odd, PyTorch's product on AMX reads into the next row.
            assert (codes[0, :4] != 0x7F).all()
            assert (codes[1, :2] == 0x7F).any() or kept_z[1, :2].isfinite().all()  # up, where that is given
        return
    expected = compression.encode_bits(z, wide_value(activation, z), y, activation.row.minimum_at)
    if z.shape[-1] % 2:
        assert (residuals[0][..., -1] >> 4 == 0).all()
    finite = torch.nn.functional.pad(z.isfinite(), (0, z.shape[-1] % 2))
    finite = finite[..., 0::2] & finite[..., 1::2] | (z.shape[-1] % 2 == 1) & finite[..., 0::2]
    assert torch.equal((residuals[0] & 0x88)[finite], (expected & 0x88)[finite])
    steps = [((residuals[0] >> s & 7).int() - (expected >> s & 7).int()).abs()[finite] for s in (0, 4)]
    # A GPU may fuse a product and a sum in one kernel and not in the other.
    assert max(step.max() for step in steps) <= 1 and max((step > 0).float().mean() for step in steps) < 0.02


def exact(form, activation, save, dy, saved, needs):
    """The gradients in float64, from what was kept as ``compression`` reads it."""
    config = config_of(form, activation, save, "reference")
    inputs, weights, biases = (
        [None if t is None else t.double() for t in some] for some in (saved.inputs, saved.weights, saved.biases)
    )
    outputs, slopes = read_kept(config, saved.y, saved.residuals, dy.dtype)
    if save == "fp8":
        z = [t.double() for t in outputs]
        plain = config_of(form, activation, "preact", "reference")
        there = Saved(z if form.given else inputs, None, weights, biases, () if form.given else z)
        return reference.backward(plain, dy.double(), there, needs)
    count, given = len(weights), int(form.given)
    rows = [t.double().flatten(0, -2) for t in (*inputs[given:], *outputs)]
    d, found = dy.double().flatten(0, -2), [None] * len(needs)
    for layer in range(count - 1 + given, -1, -1):
        i = layer - given
        if layer < len(slopes):
            d = activation.row.grad_from_side(d, *(t.double().flatten(0, -2) for t in sides(config, *slopes[layer])))
        if i >= 0:
            found[1 + i], found[1 + count + i] = d.mT @ rows[i], d.sum(0)
            d = d @ weights[i]
    found[0] = d.view(*dy.shape[:-1], d.shape[-1])
    return found


def saved_call(form, activation, save, given, needs=None):
    """A call's Saved, with all that backward does not ask for left out, a dy, and what is asked for."""
    tensors = flatten(*given)
    chosen = range(len(tensors)) if needs is None else needs(*form.split(range(len(tensors))))
    needs = tuple(i in chosen for i in range(len(tensors)))
    y, residuals = forward(form, activation, save, *given)
    keep = kept(form, save, True, needs)
    flat = [t if k else None for t, k in zip(saved_row(form, tensors, y, residuals), keep, strict=True)]
    return reference.unflatten(form, flat, len(tensors)), like(y, 72), needs


def check_gradients(form, activation, save, given):
    saved, dy, needs = saved_call(form, activation, save, given)
    found = [
        ops.backward(config_of(form, activation, save, backend), dy, saved, needs)
        for backend in ("triton", "reference")
    ]
    truth = exact(form, activation, save, dy, saved, needs)
    assert_as_good_as_eager(*found, truth, roundings(save, dy.dtype))


@each_way
@each(("form", "activation", "save", "features"), CASES)
def test_gradients(form, activation, save, features, dtype, triton_route):
    """As good as the reference's, both measured by float64 from the same codes; of rows that no tile divides."""
    check_gradients(form, activation, save, tensors(form, dtype, seed=73, rows=(3, 6), features=features))


@each_triton_route("fused by pointers", "fused in parts", "fused, persistent", dtypes=[torch.bfloat16])
@each(("form", "activation", "save"), ONE_EACH)
def test_every_route(form, activation, save, dtype, triton_route):
    given = tensors(form, dtype, seed=74, rows=18, features=(24, 72, 40, 16))
    check_gradients(form, activation, save, given)
    with choice.forced("library"):
        expected = forward(form, activation, save, *given)[1]
    found = forward(form, activation, save, *given)[1]
    differ = [(a != b).float().mean() for a, b in zip(found, expected, strict=True)]
    assert max(differ) < 0.02, "another order of summation moves a few roundings, and their codes, no more"


@each_way
@each(("form", "save"), [(LINEAR_ACT, "output_bits"), (LINEAR_ACT, "output_lsb"), (LINEAR_ACT, "fp8"),
                         (GATED_LINEAR_ACT, "fp8")])  # fmt: skip
def test_nan_and_inf(form, save, dtype, triton_route):
    """What is finite in eager is finite here; where z is not finite no number comes out where eager has NaN."""
    activation = GELU
    x = special(activation, dtype).to(TRITON_DEVICE)[:, None].requires_grad_()
    weights, biases = [torch.ones(64, 1, dtype=dtype, device=TRITON_DEVICE)] * form.width, [None] * form.width
    ours = call(form, x, weights, biases, activation=activation, save=save, backend="triton")
    theirs = eager(form, x, weights, biases, lambda z: stock(activation)(z.mT).mT)
    dy = like(ours, 75).abs() / 64
    (mine,), (others,) = grads(ours, [x], dy), grads(theirs, [x], dy)
    assert torch.equal(places(ours)[x[:, 0].isfinite()], places(theirs)[x[:, 0].isfinite()])
    assert mine[x.isfinite() & others.isfinite()].isfinite().all() and mine.isfinite().any()
    assert not mine[~x.isfinite() & others.isnan()].isfinite().any()
    assert mine[x.isnan()].isnan().all()


# Of inputs, weights and biases, those that take a gradient.
NEEDS = {
    "x alone": lambda inputs, weights, biases: inputs[:1],
    "the last input": lambda inputs, weights, biases: inputs[-1:],
    "the last weight": lambda inputs, weights, biases: weights[-1:],
    "the first bias": lambda inputs, weights, biases: biases[:1],
    "up's bias": lambda inputs, weights, biases: biases[1:2],
    "weights": lambda inputs, weights, biases: weights,
}


FROZEN = [(*case, needs) for case in ONE_EACH if case[2] != "output_lsb" for needs in NEEDS]


@each_triton_route("library", "fused", dtypes=[torch.bfloat16])
@each(("form", "activation", "save", "needs"), FROZEN)
def test_frozen_inputs(form, activation, save, needs, dtype, triton_route):
    """The same gradients when fewer are asked for and less is kept."""
    given = tensors(form, dtype, seed=76, rows=9, features=EVEN)
    config = config_of(form, activation, save)
    saved, dy, every = saved_call(form, activation, save, given)
    expected = ops.backward(config, dy, saved, every)
    saved, dy, needed = saved_call(form, activation, save, given, NEEDS[needs])
    found = ops.backward(config, dy, saved, needed)
    for mine, other, need in zip(found, expected, needed, strict=True):
        if need:
            assert error(mine, other)[0] <= 0.02 * other.double().square().mean().sqrt()


@each_triton_route("library", "fused", dtypes=[torch.float16])
@each(("form", "activation", "save"), ONE_EACH)
def test_through_autograd_the_same_bits_again(form, activation, save, dtype, triton_route):
    inputs = flatten(*draw(form, dtype, seed=77, rows=9, features=EVEN, device=TRITON_DEVICE))
    y = call(form, *unflatten(form, inputs), activation=activation, save=save, backend="triton")
    first, second = (grads(y, inputs, like(y, 78), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    saved, _, needs = saved_call(form, activation, save, unflatten(form, [t.detach() for t in inputs]))
    with torch.no_grad():
        again = ops.backward(config_of(form, activation, save), like(y, 78), saved, needs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@each("dtype", DTYPES)
def test_marks_of_every_side_and_sign(dtype):
    """Of y that f should not give, too: where the side and the sign disagree."""
    z, y = (t.to(TRITON_DEVICE) for t in every_side_and_sign(dtype))
    marks = torch.full_like(y, 5.0)
    mark_kernel[(1,)](z, y, marks, -0.75, getattr(tl, str(dtype).removeprefix("torch.")), y.numel())
    assert torch.equal(whole(marks), whole(compression.encode_lsb(z, y, -0.75)))


@each("save", ["output_bits", "output_lsb", "fp8"])
def test_no_code_for_the_ping_pong_kernel(save):
    """Its epilogue knows none: where it is named, or was the fastest, a compressed policy takes another tile."""
    (pingpong,) = configs.ONLY_MEASURED["sm_90", "forward"]
    code = launch.CODES[save]
    config = configure("linear_act", "gelu", (), save, "triton")
    matrices = [torch.empty(256, 256, dtype=torch.bfloat16) for _ in range(2)]
    with choice.forced("fused", pingpong):
        assert choice.tile_for("forward", config, (256, 256, 256), *matrices) == pingpong
        tile = choice.tile_for("forward", config, (256, 256, 256), *matrices, code=code)
    assert tile is not None and not tile.pingpong
    assert configs.for_code(pingpong, "forward", code) is None


@each("kind", ["forward", "gated_forward", "dgrad", "gated_dgrad"])
@each("code", ["bits", "lsb", "fp8"])
def test_the_tiles_of_a_code(kind, code):
    """Of the same products; no more columns at a time than share a scale, and where e4m3 is written no fewer."""
    for tile in (tile for tile in configs.every_tile(kind) if not tile.pingpong):
        found = configs.for_code(tile, kind, code)
        assert (found.block_m, found.block_n, found.block_k) == (tile.block_m, tile.block_n, tile.block_k)
        columns = found.block_n // found.parts
        assert found == tile if code == "lsb" else columns <= compression.BLOCK
        assert columns == compression.BLOCK or code != "fp8" or "dgrad" in kind
        assert 32 * found.warps * found.blocks_per_sm * found.options["maxnreg"] <= 65536
    narrow = configs.Tile(32, 16, 32, 4, 2)
    assert (configs.for_code(narrow, kind, code) is None) == (code == "fp8" and "forward" in kind)


@each("save", ["output_bits", "output_lsb", "fp8"])
def test_small_calls_are_left_to_pytorch(save, monkeypatch):
    monkeypatch.setattr(launch.Launch, "__call__", lambda self: pytest.fail("a kernel for a small call"))
    monkeypatch.setattr(layers, "new", lambda *shape: pytest.fail("memory for a small call"))
    form, given = MLP, tensors(MLP, torch.bfloat16, seed=79)
    saved, dy, needs = saved_call(form, GELU, save, given)
    found = [ops.backward(config_of(form, GELU, save, b), dy, saved, needs) for b in ("triton", "reference")]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
