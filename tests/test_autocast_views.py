"""Casts under autocast of views of a weight, as gate and up of one parameter are: one cast of the whole in a region."""

import contextlib
import functools
import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from autocast_cases import Casts, region
from fusible import Packed
from support import assert_as_good_as_eager, call, each, eager, exact, formula, grads, like, tensors, widened
from test_autocast_cache import SITUATIONS, nothing_is_left  # noqa: F401
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastbp
from fastbp.activations import bind
from fastbp.forms import GATED_LINEAR_ACT, GATED_MLP, LINEAR_ACT
from fastbp.linear import of_any_size

SILU = bind("silu")
F32 = torch.float32
each_form = each("form", [GATED_LINEAR_ACT, GATED_MLP])

SPLITS = {
    "slices": lambda p: (p[: len(p) // 2], p[len(p) // 2 :]),
    "slices, up first": lambda p: (p[len(p) // 2 :], p[: len(p) // 2]),
    "chunk": lambda p: p.chunk(2),
    "interleaved": lambda p: p.unflatten(0, (-1, 2)).unbind(1),
    "narrow of a view": lambda p: (
        p.view_as(p).narrow(0, 0, len(p) // 2),
        p.view_as(p).narrow(0, len(p) // 2, len(p) // 2),
    ),
}
each_split = pytest.mark.parametrize("split", SPLITS)


def packed_leaves(form, dtype=F32, seed=7):
    """x, and as leaves: gate and up as one weight, one bias; down and its bias."""
    x, weights, biases = tensors(form, dtype, seed=seed)
    leaves = [torch.cat([t.detach() for t in pair[:2]]).requires_grad_() for pair in (weights, biases)]
    return x.detach(), [*leaves, *weights[2:], *biases[2:]]


def of_leaves(form, function, split, **options):
    """A call of the form on the packed leaves."""

    def f(x, leaves):
        weight, bias, *down = leaves
        weights, biases = [*SPLITS[split](weight), *down[:1]], [*SPLITS[split](bias), *down[1:]]
        return function(form, x, weights, biases, activation=options.get("activation", SILU))

    return f


def of_packed_linear(form):
    """What models write: one linear and chunk of its output."""

    def f(x, leaves):
        weight, bias, *down = leaves
        gate, up = F.linear(x, weight, bias).chunk(2, -1)
        h = F.silu(gate) * up
        return F.linear(h, *down) if form.projected else h

    return f


def outcome(situation, function, x, leaves):
    """Results of a situation, the gradients that it leaves, and the casts it took."""

    def tune(on):
        for leaf in leaves:
            leaf.requires_grad_(on)

    with Casts() as seen:
        y = situation(lambda seed: function(like(x, seed), leaves), tune)
        if isinstance(y, torch.Tensor) and y.requires_grad:
            y.backward(like(y, seed=3))
    results = [t.detach() for t in (y or [] if not isinstance(y, torch.Tensor) else [y])]
    return [*results, *(leaf.grad for leaf in leaves)], seen.count


@each_form
@each_split
@each("situation", SITUATIONS)
def test_no_more_casts_than_stock_and_as_good_numbers(form, split, situation):
    mine, my_casts = outcome(situation, of_leaves(form, call, split), *packed_leaves(form))
    theirs, their_casts = outcome(situation, of_leaves(form, eager, split), *packed_leaves(form))
    assert 0 < my_casts <= their_casts
    x, leaves = packed_leaves(form)
    wide_x, *wide = widened([x, *leaves])
    yardstick = of_leaves(form, lambda *t, activation: exact(*t, formula(activation)), split)
    truth, _ = outcome(situation, yardstick, wide_x, wide)
    assert_as_good_as_eager(mine, theirs, truth)


def kept_by(function, x, leaves, calls):
    """Bytes kept, and casts made, by forward calls whose input takes a gradient."""
    xs = [like(x, seed).requires_grad_() for seed in range(calls)]
    with fastbp.SavedBytes(exclude=[*xs, *leaves]) as saved, region(), Casts() as seen:
        ys = [function(x, leaves) for x in xs]
    del ys
    return saved.total, seen.count


@each_form
@each_split
@each("calls", [1, 2, 7])
def test_bytes_are_no_more_than_a_packed_linear_keeps(form, split, calls):
    """A call more keeps g and u, and its input; the casts of the parameters are there once."""
    x, leaves = packed_leaves(form)
    kept, made = kept_by(of_leaves(form, call, split), x, leaves, calls)
    their_kept, their_made = kept_by(of_packed_linear(form), x, leaves, calls)
    assert kept <= their_kept and made == their_made == len(leaves) + calls
    more, _ = kept_by(of_leaves(form, call, split), x, leaves, calls + 1)
    rows, hidden = x.shape[0], leaves[0].shape[0] // 2
    assert more - kept == 2 * rows * (2 * hidden + x.shape[1])


@each("bias", [False, True])
@each(("interleaved", "gate_first"), list(itertools.product([False, True], repeat=2)))
def test_fused_blocks_that_are_packed(bias, interleaved, gate_first):
    """As many casts as the block itself takes, forward and backward, and no more bytes."""
    torch.manual_seed(0)
    block = Packed(interleaved, gate_first, bias=bias).eval()  # the dropout of training draws
    x = torch.randn(5, next(block.parameters()).shape[1])

    def steps():
        block.zero_grad()
        with of_any_size(), Casts() as seen, fastbp.SavedBytes(exclude=[x, block]) as saved:
            with region():
                loss = sum(block(like(x, seed)).float().square().sum() for seed in range(3))
            loss.backward()
        return [p.grad for p in block.parameters()], seen.count, saved.total

    expected, their_casts, their_bytes = steps()
    assert fastbp.fuse(block).linears == 2
    found, my_casts, my_bytes = steps()
    assert my_casts <= their_casts and my_bytes <= their_bytes
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= 0.02 * theirs.norm()


class OfConv1D(nn.Module):
    """Transformers' block, whose weights are (in, out)."""

    def __init__(self):
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.c_fc, self.c_proj, self.act = conv1d(20, 12), conv1d(12, 20), nn.GELU()

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)))


class UnknownOfConv1D(OfConv1D):
    """The same, in words that are not known."""

    def forward(self, x):
        for module in (self.c_fc, self.act, self.c_proj):
            x = module(x)
        return x


@each("kind", [OfConv1D, UnknownOfConv1D])
@each("mode", [torch.enable_grad, torch.no_grad])
@each("smallest", [True, False])
def test_conv1d_whose_weights_are_read_as_their_transposed(kind, mode, smallest):
    """No more casts in a region than stock's; calls that are too small to be read are among them."""
    torch.manual_seed(0)
    block, x = kind(), torch.randn(5, 12)
    trained = [*block.parameters()]

    def steps():
        with of_any_size() if smallest else contextlib.nullcontext(), Casts() as seen:
            with region(), mode():
                ys = [block(like(x, seed)) for seed in range(3)]
            loss = sum(y.float().square().sum() for y in ys)
            grads = torch.autograd.grad(loss, trained) if loss.requires_grad else []
        return [*ys, *grads], seen.count

    expected, their_casts = steps()
    assert fastbp.fuse(block).linears == 2
    found, my_casts = steps()
    assert len(found) == len(expected) and 0 < my_casts <= their_casts
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= 0.02 * theirs.norm() > 0


def derivatives(form, split, **options):
    """Output, first and second derivatives."""
    x, leaves = packed_leaves(form)
    x.requires_grad_()
    with region(**options):
        of_leaves(form, call, split)(x, leaves)
        ys = [of_leaves(form, call, split)(x, leaves)]
    inputs = [x, *leaves]
    first = torch.autograd.grad(ys, inputs, [like(y, 3) for y in ys], create_graph=True)
    bent = inputs[: -1 if form.projected else None]  # all but the bias of down
    differentiable = [g for g in first if g.requires_grad]
    second = torch.autograd.grad(differentiable, bent, [like(g, 4) for g in differentiable])
    return [*ys, *first, *second]


@each_form
@each_split
def test_derivatives_of_two_orders_are_those_of_casts_of_their_own(form, split):
    """To the bit."""
    for mine, expected in zip(derivatives(form, split), derivatives(form, split, cache_enabled=False), strict=True):
        assert mine.abs().sum() > 0 and torch.equal(mine, expected)


def of_halves(function, x, gate, up):
    return function(GATED_LINEAR_ACT, x, [gate, up], [None, None], activation=SILU)


@each("how", ["grad", "hook", "later hook", "retain_grad", "leaves"])
def test_whoever_holds_a_view_finds_it_in_the_graph(how):
    def run(function):
        x, (weight, _) = packed_leaves(GATED_LINEAR_ACT)
        seen = []
        with torch.set_grad_enabled(how != "leaves"):
            gate, up = weight[:23], weight[23:]
        if how == "leaves":  # views, but none of the graph's: their gradients are their own
            gate.requires_grad_(), up.requires_grad_()
        if how == "hook":
            gate.register_hook(lambda g: seen.append(g) or g * 2)
        with region():
            y = of_halves(function, x, gate, up)
        if how == "later hook":
            gate.register_hook(seen.append)
        if how == "retain_grad":
            gate.retain_grad()
        if how == "grad":
            return torch.autograd.grad(y, [gate, up], like(y, 5))
        y.backward(like(y, 5))
        return [*seen, *(t.grad for t in (weight, gate, up) if t.is_leaf or t.retains_grad)]

    found, expected = run(call), run(eager)
    assert len(found) == len(expected) >= (1 if how == "hook" else 2)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None) == (how == "leaves" and mine is None)
        if theirs is not None:
            assert (mine - theirs).norm() <= 0.02 * theirs.norm() > 0


CHANGES = {
    "the weight": lambda weight: weight.mul_(2),
    "a view": lambda weight: weight[:23].mul_(2),
    "its storage": lambda weight: setattr(weight, "data", weight.data * 2),
}


@pytest.mark.parametrize("change", [*CHANGES, "a step"])
def test_a_changed_weight_is_cast_anew(change):
    x, (weight, _) = packed_leaves(GATED_LINEAR_ACT)
    with region():
        before = of_halves(call, x, *weight.chunk(2))
        before.sum().backward()
        if change == "a step":
            torch.optim.AdamW([weight], lr=0.5, fused=True).step()
        else:
            with torch.no_grad():
                CHANGES[change](weight)
        after = of_halves(call, x, *weight.chunk(2))
    with region(cache_enabled=False):
        fresh = of_halves(call, x, *weight.chunk(2))
    assert torch.equal(after, fresh) and not torch.equal(after, before)


def test_a_weight_of_which_a_call_uses_little_is_not_cast_whole():
    """An expert of many, or gate without up."""
    x = torch.randn(4, 6)
    experts = torch.randn(5, 2, 8, 6, requires_grad=True)
    numbers = []

    class Sizes(Casts):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                numbers.append(args[0].numel())
            return super().__torch_dispatch__(func, types, args, kwargs)

    with region(), Sizes():
        of_halves(call, x, *experts[3])
        call(LINEAR_ACT, x, [experts[0, 0]], [None], activation=SILU)
        call(LINEAR_ACT, x, [experts[0, 0]], [None], activation=SILU)
    assert sorted(numbers) == [24] * 3 + [48] * 4


def reaching_beyond():
    """Views of one half of a storage that reach into the other."""
    whole = torch.randn(16, 6)
    weight = whole[:8].detach().requires_grad_()
    return [weight.as_strided((4, 6), (6, 1), offset) for offset in (24, 48)]


def with_gaps():
    """A weight whose cast lies otherwise than it does."""
    return torch.randn(8, 12)[:, ::2].detach().requires_grad_().chunk(2)


def turned():
    return torch.randn(6, 8).mT.detach().requires_grad_().chunk(2)


def negated():
    weight = torch.randn(8, 6, requires_grad=True)
    return [torch._neg_view(half) for half in weight.chunk(2)]


def later_in_storage():
    return torch.randn(20, 6)[4:12].detach().requires_grad_().chunk(2)


@each("views", [reaching_beyond, with_gaps, turned, negated, later_in_storage])
def test_views_of_every_kind(views):
    torch.manual_seed(3)
    x, halves = torch.randn(5, 6), views()
    results = []
    for cache_enabled in (True, False):
        with region(cache_enabled=cache_enabled):
            y = of_halves(call, x, *halves)
        results.append([y, *grads(y, halves, like(y, 2), retain_graph=True)])
    for mine, expected in zip(*results, strict=True):
        assert torch.equal(mine, expected)


def test_in_inference_mode_and_out_of_it():
    """Casts that inference mode made serve no gradient; with gradients on in it nothing is recorded."""
    x, (weight, _) = packed_leaves(GATED_LINEAR_ACT)
    outside = weight.chunk(2)
    with region():
        with torch.inference_mode():
            first = of_halves(call, x, *weight.chunk(2))
            with torch.enable_grad():
                second, third = of_halves(call, x, *weight.chunk(2)), of_halves(call, x, *outside)
        with torch.no_grad():
            fourth = of_halves(call, x, *weight.chunk(2))
        y = of_halves(call, x, *weight.chunk(2))
    assert y.requires_grad and not any(t.requires_grad for t in (first, second, third, fourth))
    y.sum().backward()
    assert weight.grad.abs().sum() > 0
    for t in (first, second, third, fourth):
        assert torch.equal(t.clone(), y)


def test_forward_mode_casts_the_tangent_of_a_view():
    x, (weight, _) = packed_leaves(GATED_LINEAR_ACT)
    tangent = like(weight, 9)

    def run(function):
        with region(), forward_ad.dual_level():
            dual = forward_ad.make_dual(weight, tangent)
            return forward_ad.unpack_dual(of_halves(function, x, *dual.chunk(2))).tangent

    found, expected = run(call).float(), run(eager).float()
    assert (found - expected).norm() <= 0.02 * expected.norm() > 0


def test_checkpoints_compute_again_with_the_same_casts():
    x, (weight, _) = packed_leaves(GATED_LINEAR_ACT)
    x.requires_grad_()

    def step(function):
        with region():
            y = function(lambda x: of_halves(call, x, *weight.chunk(2)), x)
            y = y + function(lambda x: of_halves(call, x * 2, *weight.chunk(2)), x)
        return torch.autograd.grad(y, [x, weight], like(y, 4))

    again = step(functools.partial(checkpoint, use_reentrant=False))
    for mine, expected in zip(again, step(lambda f, x: f(x)), strict=True):
        assert torch.equal(mine, expected)
