"""The Triton kernels, interpreted where there is no GPU: every activation, policy, dtype, form and route."""

import functools

import pytest
import torch
from routes import TRITON_DEVICE, each_triton_route
from special_points import EXACT, assert_one_of, at_special_points
from support import ACTIVATIONS, FEW, assert_accurate, call, cases, each, flatten, grads, like, places, unflatten
from support import tensors as draw

from fastbp.activations import bind
from fastbp.backends import triton
from fastbp.forms import FORMS, GATED_MLP, LINEAR_ACT, MLP

pytestmark = pytest.mark.skipif(triton.unavailable is not None, reason=f"triton: {triton.unavailable}")

GELU = bind("gelu")
ALIGNED = (24, 40, 32, 16)  # TMA can describe these in 16 bits; a tile of 16 or 32 does not divide them
accurate = functools.partial(assert_accurate, backend="triton")
tensors = functools.partial(draw, device=TRITON_DEVICE)


@each_triton_route("library", "fused")
@each(("form", "activation", "save"), cases(ACTIVATIONS))
def test_every_activation(form, activation, save, dtype, triton_route):
    features = ALIGNED if form.projected else (19, 23, 17, 11)
    accurate(form, activation, save, tensors(form, dtype, seed=31, features=features))


@each_triton_route("library", "fused")
@each(("form", "activation", "save"), EXACT)
def test_nan_and_inf_stand_where_eager_has_them(form, activation, save, dtype, triton_route):
    where = dict(backend="triton", device=TRITON_DEVICE)
    for dy in (None, float("inf"), float("nan")):

        def make_dy(y, dy=dy):
            return like(y, seed=4).abs() / 64 if dy is None else torch.full_like(y, dy)

        x, results = at_special_points(form, activation, save, dtype, make_dy, **where)
        same = places if dy is None else torch.isfinite
        for found in list(zip(*results, strict=True))[0 if dy is None else 1 :]:
            assert_one_of(*map(same, found), x)


@each_triton_route("fused by pointers", "fused in parts", "fused, persistent")
@each(("form", "activation", "save"), cases(FEW))
def test_every_route(form, activation, save, dtype, triton_route):
    features = (19, 23, 17, 11) if "pointers" in triton_route else ALIGNED
    accurate(form, activation, save, tensors(form, dtype, seed=32, features=features, bias=False))


@each_triton_route()
@each(
    ("rows", "features"),
    [((), ALIGNED), (1, (16, 32, 16, 32)), (16, (1, 33, 8, 1)), (33, (130, 17, 64, 5)), (70, (8, 40, 72, 24))],
)
@each("form", FORMS.values())
def test_sizes_around_every_edge(form, rows, features, dtype, triton_route):
    """A vector, one row, less and more than a tile; features at and around one; sums of one number and of many."""
    accurate(form, GELU, "preact", tensors(form, dtype, seed=33, rows=rows, features=features))


@each_triton_route("library", "fused")
@each("size", [(0, 8, 8), (4, 0, 8), (4, 8, 0)])
@each("form", FORMS.values())
def test_sizes_of_zero(form, size, dtype, triton_route):
    rows, k, n = size
    # From no features every row is the same: what h is off by adds up in dW, in float32 seen beside an eager whose h is
    # exact by chance of the CPU.
    units = 4 if k == 0 and dtype == torch.float32 else 1
    accurate(form, GELU, "preact", tensors(form, dtype, seed=34, rows=rows, features=(k, n, n, 5)), spare_units=units)


# Views of other strides with the same numbers: x, dy, weights and biases as they may come.
VIEWS = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "outer gap": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "not at 16 bytes": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
}


@each_triton_route()
@each("view", VIEWS)
@each("form", FORMS.values())
def test_strides(form, view, dtype, triton_route):
    def viewed(tensor):
        return VIEWS[view](tensor.detach()).requires_grad_()

    x, weights, biases = tensors(form, dtype, seed=35, rows=(3, 2, 5), features=ALIGNED)
    strided = viewed(x), [viewed(w) for w in weights], [viewed(b) for b in biases]
    assert torch.equal(strided[0], x)
    accurate(form, GELU, "preact", strided, view=lambda dy: viewed(dy).detach())


@each_triton_route()
@each("form", FORMS.values())
def test_a_gradient_of_no_strides(form, dtype, triton_route):
    accurate(form, GELU, "preact", tensors(form, dtype, seed=36), view=lambda dy: dy.flatten()[:1].expand(dy.shape))


@each_triton_route("library", "fused", "fused, persistent")
@each(("form", "activation", "save"), cases([GELU, bind("tanh")]))
def test_the_same_bits_again_with_and_without_keeping_the_graph(
    form, activation, save, dtype, triton_route, monkeypatch
):
    """A retained graph is left as it was; without one, dz may be written over z."""
    monkeypatch.setattr("fastbp.autograd._WORTH_ASKING", 1)
    inputs = flatten(*tensors(form, dtype, seed=38, features=ALIGNED))

    def step():
        return call(form, *unflatten(form, inputs), activation=activation, save=save, backend="triton")

    y = step()
    dy = like(y, 37)
    runs = [grads(y, inputs, dy, retain_graph=True) for _ in range(2)]
    again = step()
    runs.append(grads(again, inputs, dy))
    assert torch.equal(y, again)
    for first, *others in zip(*runs, strict=True):
        assert all(torch.equal(first, other) for other in others)


# Of inputs, weights and biases, those that take a gradient.
NEEDS = {
    "x alone": lambda inputs, weights, biases: inputs[:1],
    "the last input": lambda inputs, weights, biases: inputs[-1:],
    "weights alone": lambda inputs, weights, biases: weights,
    "biases alone": lambda inputs, weights, biases: biases,
    "the last weight": lambda inputs, weights, biases: weights[-1:],
    "the first weight": lambda inputs, weights, biases: weights[:1],
    "the second bias": lambda inputs, weights, biases: biases[1:2] or (*inputs, *weights, *biases),
}


@each_triton_route("library", "fused", dtypes=[torch.bfloat16])
@each("needs", NEEDS)
@each(("form", "activation", "save"), [*cases([bind("tanh")]), (LINEAR_ACT, bind("identity"), "output"),
                                       (MLP, bind("identity"), "output")])  # fmt: skip
def test_frozen_inputs(form, activation, save, needs, dtype, triton_route):
    """Of identity's output nothing is read, so it may not be there."""
    inputs = flatten(*tensors(form, dtype, seed=39, features=ALIGNED))
    chosen = NEEDS[needs](*form.split(range(len(inputs))))
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i in chosen)
    accurate(form, activation, save, unflatten(form, inputs))


@each("dtype", [torch.float16, torch.float32])
@each("form", [LINEAR_ACT, MLP, GATED_MLP])
def test_unforced_small_calls_are_left_to_pytorch(form, dtype, monkeypatch):
    from fastbp.backends.triton import launch

    monkeypatch.setattr(launch.Launch, "__call__", lambda self: pytest.fail("a kernel for a small call"))
    accurate(form, GELU, "preact", tensors(form, dtype, seed=40))
