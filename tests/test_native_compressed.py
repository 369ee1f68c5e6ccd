"""The compressed save policies in the C++ kernels: what every way of computing keeps, and the gradients from it."""

import pytest
import torch
from bits import whole
from routes import ROWS, each_route_of
from support import assert_as_good_as_eager, compressed_cases, each, like, places, roundings, saved_row, tensors

from fastbp.activations import ROWS as ACTIVATIONS
from fastbp.activations import Bound, bind
from fastbp.backends import native, reference
from fastbp.compression import DTYPES, decode_bits, encode_bits, encode_fp8, encode_lsb
from fastbp.forms import FORMS, GATED_MLP, LINEAR_ACT, MLP
from fastbp.problem import configure
from fastbp.residuals import read_kept, sides
from fastbp.saving import POLICIES, find_kept

pytestmark = pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}")
GELU = bind("gelu")
SIDED = [bind(row.name) for row in ACTIVATIONS.values() if row.grad_from_side is not None]
CASES = compressed_cases([*SIDED, bind("relu"), bind("softplus", (2.0, 20.0))])
FEW_CASES = [c for c in CASES if c[1] == GELU]
LARGE = (24, 135, 98, 40)
each_compressed_route = each_route_of(DTYPES)


def config_of(form, activation, save, backend="native"):
    return configure(form.name, activation.name, activation.params, save, backend)


def drawn(form, dtype, seed, **sizes):
    """x, and the weights and the biases behind one another."""
    x, weights, biases = tensors(form, dtype, seed=seed, requires_grad=False, **sizes)
    return x, [*weights, *biases]


def exact(config, dy, saved, residuals):
    """The gradients in float64 of what the residuals say."""
    form, count = config.form, len(saved.weights)
    inputs, slopes = read_kept(config, saved.y, residuals, dy.dtype)
    x, d = saved.inputs[0], dy.double()
    x = None if x is None else x.double()
    weights = [w.double() for w in saved.weights]
    value, grad = config.row.value, config.row.grad
    first, of_given = form.inputs, int(form.given)  # of a given form the first layer has no linear
    grads = [None] * (first + 2 * count)

    def take(i, d, h):
        grads[first + i], grads[first + count + i] = d.mT @ h, d.sum(0)

    if form.gated:
        g, u = (z.double() for z in inputs)
        if form.projected:
            take(count - 1, d, value(g, *config.params) * u)
            d = d @ weights[-1]
        dg, du = grad(d * u, g, *config.params), d * value(g, *config.params)
        if form.given:
            return [dg, du, *grads[2:]]
        take(0, dg, x)
        take(1, du, x)
        return [dg @ weights[0] + du @ weights[1], *grads[1:]]
    for layer in reversed(range(count + of_given)):
        i = layer - of_given
        if layer < len(inputs):
            if config.save == "fp8":
                d = grad(d, inputs[layer].double(), *config.params)
            else:
                d = config.row.grad_from_side(d, *(t.double() for t in sides(config, *slopes[layer])))
        if i < 0:
            break
        below = inputs[layer - 1].double() if layer else x
        take(i, d, value(below, *config.params) if layer and config.save == "fp8" else below)
        d = d @ weights[i]
    return [d, *grads[1:]]


def check_kept(config, tensors, y, residuals):
    """y, and what is kept of every layer, beside the preact policy's y and z."""
    form, activation, save = config.form, Bound(config.row, config.params), config.save
    plain, *zs = native.forward(config_of(form, activation, "preact"), *tensors)
    zs = [tensors[0], *tensors[1][: form.inputs - 1]] if form.given else zs
    if save == "fp8":
        assert torch.equal(y, plain)
        for found, expected in zip(residuals, [t for z in zs for t in encode_fp8(z)], strict=True):
            assert torch.equal(found, expected)
        return
    at, dtype = config.row.minimum_at, y.dtype
    if save == "output_lsb":
        outputs = residuals if form.projected else [y]
        kept_z = zs if not form.projected else zs[:1]  # of the layers above, z is that of another input
        h = first_output(config, activation, tensors)
        assert same_bits(outputs[0], encode_lsb(kept_z[0], h, at))
        return
    assert torch.equal(y, plain)
    outputs, bits = (residuals[0::2], residuals[1::2]) if form.projected else ([y], residuals)
    for z, h, b in zip(zs, outputs, bits, strict=True):
        wide = config.row.value(z.float())
        expected = encode_bits(z, wide, h, at)
        assert b.shape == expected.shape
        found, right = decode_bits(h, b, -1.0)
        assert torch.equal(right, (z.float() >= at).float())
        if h.shape[-1] % 2:
            assert not (b[..., -1] >> 4).any()
        if dtype == torch.float32:
            assert torch.equal(found, h) and torch.equal(b, expected)
            continue
        # A step is an eighth of y's last place; the 16-bit loops' f has five digits, which a small y far left shows.
        step = torch.exp2(h.float().frexp()[1] - (10.0 if dtype == torch.bfloat16 else 13.0))
        near = wide.to(dtype) == h
        step += 2.0**-25 if dtype == torch.float16 else 0.0  # the last place of a subnormal
        assert near.float().mean() > 0.9 and ((found - wide).abs() <= step + (4e-5 * z).abs())[near].all()


def first_output(config, activation, tensors):
    """Of the first hidden layer, as the kernels compute it."""
    x, flat = tensors
    if config.form.given:
        one = torch.eye(x.shape[-1], dtype=x.dtype)
        return native.forward(config_of(MLP, activation, "output"), x, [one, one, None, None])[1]
    linear = [flat[0], flat[len(flat) // 2]]
    return native.forward(config_of(LINEAR_ACT, activation, "preact"), x, linear)[0]


def same_bits(a, b):
    return torch.equal(whole(a), whole(b))


def saved_for(config, x, flat, y, residuals, needs):
    """What autograd would hand to backward, and None in the place of the rest."""
    everything = saved_row(config.form, [x, *flat], y, residuals)
    kept = find_kept(config.form, config.save, config.row.grad_reads_output, needs)
    return [t if k else None for t, k in zip(everything, kept, strict=True)]


def check(form, activation, save, x, flat):
    config = config_of(form, activation, save)
    y, *residuals = native.forward(config, x, flat)
    check_kept(config, (x, flat), y, residuals)
    dy, needs = like(y, 52), (True,) * (1 + len(flat))
    saved = saved_for(config, x, flat, y, residuals, needs)
    ours = native.backward(config, dy, saved, needs)
    theirs = reference.backward(config, dy, saved, needs)
    whole = reference.reference.unflatten(form, saved_row(form, [x, *flat], y, residuals), len(needs))
    assert_as_good_as_eager(ours, theirs, exact(config, dy, whole, residuals), roundings(save, x.dtype))


@each_compressed_route
@each(("form", "activation", "save"), CASES)
def test_every_route(form, activation, save, dtype, route):
    sizes = {"rows": ROWS[route], "features": (130, 370, 350, 140)} if route in ROWS else {}
    check(form, activation, save, *drawn(form, dtype, 51, **sizes))


@each_compressed_route
@each(("form", "activation", "save"), FEW_CASES)
def test_more_than_every_block(form, activation, save, dtype, route):
    """Rows beyond a group, columns beyond a stretch and a strip, no multiple of what shares a byte or a scale."""
    check(form, activation, save, *drawn(form, dtype, 53, rows=ROWS.get(route, 1030), features=LARGE))
    check(form, activation, save, *drawn(form, dtype, 54, rows=ROWS.get(route, 98), features=(32, 64, 800, 64)))


@each_compressed_route
@each(("form", "activation", "save"), FEW_CASES)
def test_every_choice_of_what_is_needed(form, activation, save, dtype, route):
    x, flat = drawn(form, dtype, 55, rows=ROWS.get(route, 5))
    config = config_of(form, activation, save)
    y, *residuals = native.forward(config, x, flat)
    dy = like(y, 56)
    complete = native.backward(config, dy, saved_row(form, [x, *flat], y, residuals), (True,) * (1 + len(flat)))
    for some in range(1, 2 ** (1 + len(flat)), 7):
        needs = tuple(bool(some >> i & 1) for i in range(1 + len(flat)))
        found = native.backward(config, dy, saved_for(config, x, flat, y, residuals, needs), needs)
        for need, one, all_of_them in zip(needs, found, complete, strict=True):
            assert torch.equal(one, all_of_them) if need else one is None


POINTS = [0.0, -0.0, 1.0, -1.0, -0.75, -1.19, -1.3, 0.5, -5.0, -14.0, -100.0, 20.0, 65504.0, -65504.0]
POINTS += [float("inf"), float("-inf"), float("nan"), 1e-30, -1e-30]


@each_compressed_route
@each(("activation", "save"), [(a, s) for f, a, s in CASES if f is LINEAR_ACT and a in SIDED])
def test_special_points(activation, save, dtype, route):
    """Each as z of a row of its own, among others in the row, where it shares a scale, and at its odd end."""
    points = torch.tensor(POINTS, dtype=torch.float64).to(dtype)
    config = config_of(LINEAR_ACT, activation, save)
    plain = config_of(LINEAR_ACT, activation, "preact")
    for x in points[:, None].split(1) if route in ROWS else [points[:, None]]:
        for weight in (torch.ones(35, 1, dtype=dtype), torch.linspace(0.5, 1, 65)[:, None].to(dtype)):
            flat = [weight, None]
            y, *residuals = native.forward(config, x, flat)
            expected, z = native.forward(plain, x, flat)
            if save == "output_lsb":
                assert torch.equal(places(y), places(expected))
                same = y.isnan() | (encode_lsb(z, expected, config.row.minimum_at) == y)
                assert same.all() and torch.equal(
                    y.signbit() | y.isnan(), expected_sign(z, expected, config) | y.isnan()
                )
            else:
                assert torch.equal(places(y), places(expected)) and torch.equal(y.nan_to_num(), expected.nan_to_num())
            if save == "fp8":
                for found, wanted in zip(residuals, encode_fp8(z), strict=True):
                    assert torch.equal(found, wanted)
            if save == "output_bits":
                right = decode_bits(y, residuals[0], -1.0)[1]
                assert torch.equal(right, (z.float() >= config.row.minimum_at).float())
            dy = like(y, 57).abs()
            saved = [x, y, *flat, *residuals]
            needs = (True, False, False)
            ours, theirs = (b.backward(config, dy, saved, needs)[0] for b in (native, reference))
            assert torch.equal(places(ours), places(theirs))
            # A slope from a side is off by so much at most.
            off = (2e-5 if dtype == torch.float32 else 2e-4) * dy.float().nan_to_num().sum(-1).max().item()
            torch.testing.assert_close(ours, theirs, rtol=0.01, atol=off, equal_nan=True)


def expected_sign(z, y, config):
    return encode_lsb(z, y, config.row.minimum_at).signbit()


@each_compressed_route
@each("save", [name for name, policy in POLICIES.items() if policy.compressed])
def test_strides_and_dimensions(save, dtype, route):
    """Residuals, y and dy as views that are not contiguous, of rows of more than one dimension."""
    config = config_of(MLP, GELU, save)
    x, flat = drawn(MLP, dtype, 58, rows=(1, 1, 1) if route in ROWS else (3, 2, 5))
    y, *residuals = native.forward(config, x, flat)
    dy, needs = like(y, 59), (True,) * (1 + len(flat))
    plain = native.backward(config, dy, [x, None, *flat, *residuals], needs)
    apart = [r.repeat_interleave(2, -1)[..., ::2] for r in (dy, *residuals)]
    found = native.backward(config, apart[0], [x, None, *flat, *apart[1:]], needs)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(dtype).eps * float(b.abs().max()))


@each_compressed_route
@each(("form", "save"), [(LINEAR_ACT, "output_bits"), (MLP, "output_lsb"), (MLP, "fp8"), (GATED_MLP, "fp8")])
def test_nothing_in_it(form, save, dtype, route):
    """No rows, and layers of no features."""
    for sizes in ({"rows": 0}, {"features": (3, 0, 2, 2)}, {"features": (0, 5, 4, 3)}):
        x, flat = drawn(form, dtype, 60, **sizes)
        config = config_of(form, GELU, save)
        y, *residuals = native.forward(config, x, flat)
        needs = (True,) * (1 + len(flat))
        ours, theirs = (
            b.backward(config, like(y, 61), saved_row(form, [x, *flat], y, residuals), needs)
            for b in (native, reference)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


BAD = {
    "bits of other rows": lambda bits: bits[:2],
    "bits of other columns": lambda bits: bits[:, :2],
    "bits of another dtype": lambda bits: bits.int(),
    "bits on another device": lambda bits: bits.to("meta"),
    "bits absent": lambda bits: None,
}


@each("case", BAD)
@each("save", ["output_bits", "fp8"])
def test_the_ops_refuse_by_themselves(save, case):
    x, flat = drawn(LINEAR_ACT, torch.float32, 62, rows=3)
    config = config_of(LINEAR_ACT, GELU, save)
    y, *residuals = native.forward(config, x, flat)
    dy, needs = like(y, 63), (True,) * 3
    native.backward(config, dy, [x, y, *flat, *residuals], needs)
    for i in range(len(residuals)):
        changed = [BAD[case](r) if i == j else r for j, r in enumerate(residuals)]
        if case == "bits of other columns" and changed[i].shape == residuals[i].shape:
            continue
        with pytest.raises((RuntimeError, ValueError), match=r"residual|compressed|fp8|Meta|meta"):
            native.backward(config, dy, [x, y, *flat, *changed], needs)


@each(("form", "save"), [(form, s) for form in FORMS.values() for s in ("output_bits", "output_lsb") if form.gated])
def test_the_ops_refuse_what_no_policy_serves(form, save):
    x, flat = drawn(form, torch.float32, 64)
    with pytest.raises(RuntimeError, match="do not determine"):
        native.forward(config_of(form, GELU, save), x, flat)
    x, flat = drawn(LINEAR_ACT, torch.float32, 64)
    with pytest.raises(RuntimeError, match="do not determine"):
        native.forward(config_of(LINEAR_ACT, bind("relu"), save), x, flat)
    x, flat = drawn(LINEAR_ACT, torch.float64, 64)
    with pytest.raises(RuntimeError, match="float64"):
        native.forward(config_of(LINEAR_ACT, GELU, save), x, flat)
