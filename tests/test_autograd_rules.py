"""What autograd promises its users, kept: one graph twice, in-place changes, frozen inputs, strides, modes, hooks."""

import gc
import itertools
import random
import threading
import types
import weakref

import pytest
import torch
from support import (
    FEATURES,
    FEW,
    SMALL,
    assert_close,
    call,
    cases,
    each,
    eager,
    flatten,
    grads,
    like,
    on_flat,
    tensors,
)
from torch.utils.checkpoint import checkpoint

import fastbp
from fastbp import backends, functional, reference
from fastbp.activations import bind
from fastbp.forms import LINEAR_ACT, MLP
from fastbp.problem import configure
from fastbp.reference import Saved
from fastbp.saving import kept

CASES = cases(FEW)
FORM_CASES = cases([bind("gelu"), bind("tanh")])


def _ours(form, activation, save):
    return on_flat(call, form, activation=activation, save=save)


def _assert_equal(ours, theirs):
    """Bit for bit, and None in the same places."""
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, other)


def _assert_close(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if other is not None:
            assert_close(mine, other)


def _kept_tensors(function, inputs):
    """What autograd keeps of one call, and the result."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        return function(*inputs), found


# One graph, several backwards.


@each("dtype", [torch.float32, torch.bfloat16])
@each(("form", "activation", "save"), CASES)
def test_two_backwards_give_equal_bits(form, activation, save, dtype):
    inputs = flatten(*tensors(form, dtype, seed=41))
    y = _ours(form, activation, save)(*inputs)
    dy = like(y, 42)
    first = [g.clone() for g in grads(y, inputs, dy, retain_graph=True)]
    _assert_equal(grads(y, inputs, dy, retain_graph=True), first)


@each(("form", "activation", "save"), FORM_CASES)
def test_freed_graph_is_refused(form, activation, save):
    inputs = flatten(*tensors(form, seed=43))
    y = _ours(form, activation, save)(*inputs)
    grads(y, inputs, torch.ones_like(y))
    with pytest.raises(RuntimeError, match="second time"):
        grads(y, inputs, torch.ones_like(y))


# In-place changes between forward and backward.


@each(("form", "activation", "save"), CASES)
def test_changing_a_kept_tensor_raises_and_another_is_free(form, activation, save):
    def fresh():
        inputs = flatten(*tensors(form, seed=44, rows=5))
        return inputs, _ours(form, activation, save)(*inputs)

    inputs, y = fresh()
    expected = grads(y, inputs, like(y, 45))
    keep = kept(form, save, activation.row.grad_reads_output, (True,) * len(inputs))
    for index in range(len(inputs) + 1):  # x, y, weights, biases
        inputs, y = fresh()
        with torch.no_grad():
            (inputs[0], y, *inputs[1:])[index].mul_(2)
        if keep[index]:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(y, inputs, like(y, 45))
        else:
            _assert_equal(grads(y, inputs, like(y, 45)), expected)


@each("rows", [(), 1, 37, (2, 3)])
@each(("form", "activation", "save"), CASES)
def test_changing_y_in_place(form, activation, save, rows):
    inputs = flatten(*tensors(form, seed=46, rows=rows))
    may = not kept(form, save, activation.row.grad_reads_output, (True,) * len(inputs))[1]
    for change in (lambda y: y.mul_(2), torch.nn.functional.relu_, lambda y: y.add_(y.detach().clone())):
        ours = change(_ours(form, activation, save)(*inputs))
        if not may:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                grads(ours, inputs, like(ours, 47))
            continue
        theirs = change(on_flat(eager, form, activation=activation)(*inputs).clone())
        _assert_close([ours, *grads(ours, inputs, like(ours, 47))], [theirs, *grads(theirs, inputs, like(theirs, 47))])


# Memory.


@each("create_graph", [False, True])
@each(("form", "activation", "save"), FORM_CASES)
def test_no_reference_cycles(form, activation, save, create_graph):
    def use_and_drop():
        inputs = flatten(*tensors(form, seed=48))
        y = _ours(form, activation, save)(*[t * 1 for t in inputs])
        alive = [weakref.ref(t) for t in (*inputs, y, y.grad_fn)]
        if create_graph:
            first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
            torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        else:
            y.sum().backward()
        return alive

    use_and_drop()
    gc.collect()
    gc.disable()
    try:
        assert [i for i, dropped in enumerate(use_and_drop()) if dropped() is not None] == []
    finally:
        gc.enable()


@each(("form", "activation", "save"), CASES)
def test_frozen_inputs(form, activation, save):
    """For every choice of what is trained: right gradients, and nothing kept or computed that they do not need."""
    leaves = flatten(*tensors(form, seed=49, rows=5, requires_grad=False))
    config = configure(form.name, activation.name, activation.params, save, "reference")
    count = len(leaves) // 2
    weights, biases = leaves[1 : 1 + count], leaves[1 + count :]
    y, residuals = reference.forward(config, leaves[0], weights, biases)
    dy = like(y, 50)
    choices = list(itertools.product((False, True), repeat=len(leaves)))
    for needs in choices if len(choices) <= 32 else random.Random(52).sample(choices, 24):
        inputs = [t.detach().requires_grad_(need) for t, need in zip(leaves, needs, strict=True)]
        ours, packed = _kept_tensors(_ours(form, activation, save), inputs)
        assert ours.requires_grad == any(needs)
        if not any(needs):
            assert not packed
            continue
        theirs = on_flat(eager, form, activation=activation)(*inputs)
        expected = grads(theirs, inputs, dy)
        _assert_close(grads(ours, inputs, dy), expected)

        keep = kept(form, save, activation.row.grad_reads_output, needs)
        assert len(packed) == sum(keep)
        everything = [leaves[0], y, *weights, *biases, *residuals]
        enough = [t if k else None for t, k in zip(everything, keep, strict=True)]

        def check_backward(tensors, needs=needs, expected=expected):
            x, y, *rest = tensors
            saved = Saved(x, y, rest[:count], rest[count : 2 * count], rest[2 * count :])
            _assert_close(reference.backward(config, dy, saved, needs), expected)

        check_backward(enough)
        if activation.name == "identity" and save != "output":
            continue  # whose z is kept because the caller said so
        for index in [i for i, k in enumerate(keep) if k]:  # without any one of them it fails or is wrong
            with pytest.raises((AssertionError, AttributeError, RuntimeError, TypeError)):
                check_backward([None if i == index else t for i, t in enumerate(enough)])


# Shapes and strides.


@each("rows", [(), 1, 5, (2, 3), (2, 3, 4), (1, 1, 1), 0, (0, 3), (3, 0, 2)])
@each(("form", "activation", "save"), CASES)
def test_leading_shapes(form, activation, save, rows):
    inputs = flatten(*tensors(form, seed=51, rows=rows, features=SMALL))
    _compare(form, activation, save, inputs)


@each("features", [(0, 3, 2, 4), (3, 0, 2, 4), (3, 2, 0, 4), (3, 2, 4, 0), (1, 1, 1, 1)])
@each(("form", "activation", "save"), CASES)
def test_empty_features(form, activation, save, features):
    for rows in (5, (2, 3), ()):
        _compare(form, activation, save, flatten(*tensors(form, seed=52, rows=rows, features=features)))


def _compare(form, activation, save, inputs, dy=None):
    ours, theirs = _ours(form, activation, save)(*inputs), on_flat(eager, form, activation=activation)(*inputs)
    dy = like(theirs, 53) if dy is None else dy(theirs)
    _assert_close([ours, *grads(ours, inputs, dy)], [theirs, *grads(theirs, inputs, dy)])


# Each as a view that holds the same numbers, or other ones where that cannot be.
STRIDES = {
    "transposed": lambda t: t.detach().mT.contiguous().mT if t.dim() > 1 else t,
    "every other": lambda t: t.detach().repeat_interleave(2, -1)[..., ::2],
    "a slice": lambda t: torch.cat([t.detach(), t.detach()], 0)[t.shape[0] :],
    "one row": lambda t: t.detach()[:1].expand_as(t),
    "one number": lambda t: t.detach().flatten()[0].expand_as(t),
    "one column": lambda t: t.detach()[..., :1].expand_as(t),
}


@each("strides", STRIDES)
@each("rows", [5, (2, 3)])
@each(("form", "activation", "save"), CASES)
def test_strides(form, activation, save, rows, strides):
    inputs = flatten(*tensors(form, seed=54, rows=rows))
    view = STRIDES[strides]
    for index in range(len(inputs)):
        strided = list(inputs)
        strided[index] = view(inputs[index]).requires_grad_()
        _compare(form, activation, save, strided)
    _compare(form, activation, save, inputs, dy=lambda y: view(like(y, 55)))


@each("depth", [1, 2, 4])
@each(("activation", "save"), [(activation, save) for _, activation, save in cases(FEW, [MLP])])
def test_mlp_of_any_depth(activation, save, depth):
    _compare(MLP, activation, save, flatten(*tensors(MLP, seed=66, features=(5, 4, 3, 7, 2)[: depth + 1])))


@each(("form", "activation", "save"), CASES)
def test_any_bias_may_be_missing(form, activation, save):
    x, weights, biases = tensors(form, seed=67)
    for present in itertools.product((False, True), repeat=len(biases)):
        some = [bias if here else None for bias, here in zip(biases, present, strict=True)]
        _compare(form, activation, save, flatten(x, weights, some))


@each(("form", "activation", "save"), CASES)
def test_gradient_of_a_sum(form, activation, save):
    inputs = flatten(*tensors(form, seed=56))
    ours, theirs = _ours(form, activation, save)(*inputs), on_flat(eager, form, activation=activation)(*inputs)
    ours.sum().backward()
    _assert_close([t.grad for t in inputs], torch.autograd.grad(theirs.sum(), inputs))


@each(("form", "activation", "save"), CASES)
def test_inputs_that_share_a_tensor(form, activation, save):
    """One square matrix for x and every weight, one vector for every bias."""
    matrix, vector = (
        t.requires_grad_() for t in (like(torch.empty(4, 4).double(), 57), like(torch.empty(4).double(), 58))
    )
    count = len(tensors(form, seed=0)[1])

    def gradients(function):
        return torch.autograd.grad(function(matrix, *[matrix] * count, *[vector] * count).sum(), (matrix, vector))

    _assert_close(gradients(_ours(form, activation, save)), gradients(on_flat(eager, form, activation=activation)))


# Modes and settings.


@each("mode", [torch.no_grad, torch.inference_mode])
@each(("form", "activation", "save"), CASES)
def test_without_grad_nothing_is_kept(form, activation, save, mode):
    inputs = flatten(*tensors(form, seed=59))
    function = _ours(form, activation, save)
    with mode():
        y, packed = _kept_tensors(function, inputs)
        y.mul_(1)  # nobody else holds it
    assert not packed and not y.requires_grad
    assert torch.equal(y, function(*inputs))


def _bytes(**options):
    """What linear_act + gelu keeps beyond its inputs: z under preact, nothing under recompute."""
    x, weights, biases = tensors(LINEAR_ACT, seed=60)
    with fastbp.SavedBytes(exclude=[x, *weights, *biases]) as saved:
        y = fastbp.linear_act(x, *weights, *biases, **{"activation": "gelu", **options})
    return saved.total // (y.numel() * y.element_size())


def test_use_sets_what_a_call_leaves_open():
    assert _bytes() == 1
    with fastbp.use(save="recompute"):
        assert _bytes() == 0
        assert _bytes(save="preact") == 1
        with fastbp.use(save="preact"):
            assert _bytes() == 1
            with fastbp.use(backend="reference"):
                assert _bytes() == 1
        assert _bytes() == 0
    assert _bytes() == 1


def test_use_ends_with_an_exception():
    with pytest.raises(KeyError), fastbp.use(save="recompute"):
        raise KeyError
    assert _bytes() == 1


def test_use_may_be_entered_again(monkeypatch):
    monkeypatch.setattr(functional._defaults, "save", None)  # and is so again for the tests that follow
    recompute = fastbp.use(save="recompute")
    with recompute, recompute:
        assert _bytes() == 0
    assert _bytes() == 1


def test_use_is_per_thread():
    seen = {}

    def other():
        seen["default"] = _bytes()
        with fastbp.use(save="recompute"):
            inside.set()
            done.wait(60)
            seen["used"] = _bytes()

    inside, done = threading.Event(), threading.Event()
    with fastbp.use(save="recompute"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(60)
    assert _bytes() == 1
    done.set()
    thread.join(60)
    assert seen == {"default": 1, "used": 0}


def test_use_refuses_what_a_call_would():
    with pytest.raises(ValueError, match=r"fastbp\.use: neither backend nor save"):
        fastbp.use()
    with pytest.raises(ValueError, match=r"fastbp\.use: unknown save policy 'preakt'; did you mean 'preact'"):
        fastbp.use(save="preakt")
    with pytest.raises(ValueError, match=r"fastbp\.use: unknown backend 'referense'; did you mean 'reference'"):
        fastbp.use(backend="referense")
    with fastbp.use(save="output"), pytest.raises(ValueError, match="save='output' cannot serve gelu"):
        _bytes()


@pytest.fixture
def spies(monkeypatch):
    """Two backends made of the reference, and two lists: who did what, and the problems they were asked about."""
    done, problems = [], []

    def spy(name):
        def noting(step):
            return lambda *args: done.append((name, step)) or getattr(reference, step)(*args)

        backend = types.ModuleType(name)
        backend.supports = problems.append  # whose None means yes
        backend.forward, backend.backward = noting("forward"), noting("backward")
        return backend

    for name in ("native", "triton"):
        monkeypatch.setitem(backends.BACKENDS, name, spy(name))
    monkeypatch.setattr(backends, "_ONLY_REFERENCE", False, raising=False)
    monkeypatch.setattr(functional, "_settled", {})  # no setting of these backends outlives the test
    return done, problems


def test_use_names_the_backend(spies):
    _bytes()
    with fastbp.use(backend="triton"):
        _bytes()
        _bytes(backend="native")
        _bytes(backend="reference")
    assert [name for name, _ in spies[0]] == ["native", "triton", "native"]


@each(("form", "activation", "save"), FORM_CASES)
def test_backward_goes_where_forward_went(form, activation, save, spies):
    done, problems = spies
    leaves = flatten(*tensors(form, seed=64, requires_grad=False))
    for trained in range(len(leaves)):
        inputs = [t.detach().requires_grad_(i == trained) for i, t in enumerate(leaves)]
        y = on_flat(call, form, activation=activation, save=save, backend="triton")(*inputs)
        grads(y, inputs, like(y, 65))
    assert done == [("triton", "forward"), ("triton", "backward")] * len(leaves)
    assert all(problem == problems[0] for problem in problems)  # whatever backward was left of it


@each(("form", "activation", "save"), cases([bind("gelu")]))
def test_batched_gradients_reach_no_backend(form, activation, save, spies):
    """Kernels know nothing of vmap, nor of the older one behind is_grads_batched."""
    inputs = flatten(*tensors(form, seed=68))
    y = on_flat(call, form, activation=activation, save=save, backend="triton")(*inputs)
    dys = torch.stack([like(y, 69), like(y, 70)])
    older = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
    newer = torch.vmap(lambda dy: torch.autograd.grad(y, inputs, dy, retain_graph=True))(dys)
    assert [step for _, step in spies[0]] == ["forward"]
    for batched in (older, newer):
        for index, dy in enumerate(dys):
            _assert_close([g[index] for g in batched], grads(y, inputs, dy, retain_graph=True))


# Around it: hooks, checkpoints.


@each(("form", "activation", "save"), FORM_CASES)
def test_hooks(form, activation, save):
    inputs = flatten(*tensors(form, seed=61))
    plain = grads(_ours(form, activation, save)(*inputs), inputs, torch.ones(37, _width(form)).double())
    seen = []
    inputs[1].register_hook(lambda g: g * 2)
    inputs[1].register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.clone()))
    x = inputs[0] * 1
    x.retain_grad()
    y = _ours(form, activation, save)(x, *inputs[1:])
    y.retain_grad()
    y.register_hook(lambda g: g * 3)
    y.sum().backward()
    assert torch.equal(y.grad, torch.full_like(y, 3))
    _assert_close([x.grad, *[t.grad for t in inputs[1:]]], [plain[0] * 3, plain[1] * 6, *[g * 3 for g in plain[2:]]])
    _assert_equal(seen, [inputs[1].grad])


def _width(form):
    return FEATURES[-1] if form.projected else FEATURES[1]


@each("use_reentrant", [False, True])
@each(("form", "activation", "save"), CASES)
def test_checkpoint(form, activation, save, use_reentrant):
    inputs = flatten(*tensors(form, seed=62))
    function = _ours(form, activation, save)
    y = checkpoint(function, *inputs, use_reentrant=use_reentrant)
    y.backward(like(y, 63))
    plain = function(*inputs)
    _assert_equal([y, *[t.grad for t in inputs]], [plain, *grads(plain, inputs, like(y, 63))])
