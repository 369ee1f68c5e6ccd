"""What autograd promises its users, kept: one graph twice, in-place changes, frozen inputs, strides, hooks."""

import gc
import itertools
import random
import weakref

import pytest
import torch
from autograd_cases import CASES, FORM_CASES, assert_all_close, assert_equal, kept_tensors, ours_of
from support import (
    FEATURES,
    FEW,
    SMALL,
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

from fastbp import reference
from fastbp.forms import MLP
from fastbp.problem import configure
from fastbp.saving import kept

# One graph, several backwards.


@each("dtype", [torch.float32, torch.bfloat16])
@each(("form", "activation", "save"), CASES)
def test_two_backwards_give_equal_bits(form, activation, save, dtype):
    inputs = flatten(*tensors(form, dtype, seed=41))
    y = ours_of(form, activation, save)(*inputs)
    dy = like(y, 42)
    first = [g.clone() for g in grads(y, inputs, dy, retain_graph=True)]
    assert_equal(grads(y, inputs, dy, retain_graph=True), first)


@each(("form", "activation", "save"), FORM_CASES)
def test_freed_graph_is_refused(form, activation, save):
    inputs = flatten(*tensors(form, seed=43))
    y = ours_of(form, activation, save)(*inputs)
    grads(y, inputs, torch.ones_like(y))
    with pytest.raises(RuntimeError, match="second time"):
        grads(y, inputs, torch.ones_like(y))


# In-place changes between forward and backward.


@each(("form", "activation", "save"), CASES)
def test_changing_a_kept_tensor_raises_and_another_is_free(form, activation, save):
    def fresh():
        inputs = flatten(*tensors(form, seed=44, rows=5))
        return inputs, ours_of(form, activation, save)(*inputs)

    inputs, y = fresh()
    expected = grads(y, inputs, like(y, 45))
    keep = kept(form, save, activation.row.grad_reads_output, (True,) * len(inputs))
    for index in range(len(inputs) + 1):  # inputs, y, weights, biases
        inputs, y = fresh()
        with torch.no_grad():
            (*inputs[: form.inputs], y, *inputs[form.inputs :])[index].mul_(2)
        if keep[index]:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(y, inputs, like(y, 45))
        else:
            assert_equal(grads(y, inputs, like(y, 45)), expected)


@each("rows", [(), 1, 37, (2, 3)])
@each(("form", "activation", "save"), CASES)
def test_changing_y_in_place(form, activation, save, rows):
    inputs = flatten(*tensors(form, seed=46, rows=rows))
    may = not kept(form, save, activation.row.grad_reads_output, (True,) * len(inputs))[form.inputs]
    for change in (lambda y: y.mul_(2), torch.nn.functional.relu_, lambda y: y.add_(y.detach().clone())):
        ours = change(ours_of(form, activation, save)(*inputs))
        if not may:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                grads(ours, inputs, like(ours, 47))
            continue
        theirs = change(on_flat(eager, form, activation=activation)(*inputs).clone())
        assert_all_close(
            [ours, *grads(ours, inputs, like(ours, 47))], [theirs, *grads(theirs, inputs, like(theirs, 47))]
        )


# Memory.


@each("create_graph", [False, True])
@each(("form", "activation", "save"), FORM_CASES)
def test_no_reference_cycles(form, activation, save, create_graph):
    def use_and_drop():
        inputs = flatten(*tensors(form, seed=48))
        y = ours_of(form, activation, save)(*[t * 1 for t in inputs])
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
    given, weights, biases = form.split(leaves)
    y, residuals = reference.forward(config, given, weights, biases)
    dy = like(y, 50)
    choices = list(itertools.product((False, True), repeat=len(leaves)))
    for needs in choices if len(choices) <= 32 else random.Random(52).sample(choices, 24):
        inputs = [t.detach().requires_grad_(need) for t, need in zip(leaves, needs, strict=True)]
        ours, packed = kept_tensors(ours_of(form, activation, save), inputs)
        assert ours.requires_grad == any(needs)
        if not any(needs):
            assert not packed
            continue
        theirs = on_flat(eager, form, activation=activation)(*inputs)
        expected = grads(theirs, inputs, dy)
        assert_all_close(grads(ours, inputs, dy), expected)

        keep = kept(form, save, activation.row.grad_reads_output, needs)
        assert len(packed) == sum(keep)
        everything = [*given, y, *weights, *biases, *residuals]
        enough = [t if k else None for t, k in zip(everything, keep, strict=True)]

        def check_backward(tensors, needs=needs, expected=expected):
            saved = reference.unflatten(form, tensors, len(needs))
            assert_all_close(reference.backward(config, dy, saved, needs), expected)

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
    ours, theirs = ours_of(form, activation, save)(*inputs), on_flat(eager, form, activation=activation)(*inputs)
    dy = like(theirs, 53) if dy is None else dy(theirs)
    assert_all_close([ours, *grads(ours, inputs, dy)], [theirs, *grads(theirs, inputs, dy)])


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
    ours, theirs = ours_of(form, activation, save)(*inputs), on_flat(eager, form, activation=activation)(*inputs)
    ours.sum().backward()
    assert_all_close([t.grad for t in inputs], torch.autograd.grad(theirs.sum(), inputs))


@each(("form", "activation", "save"), CASES)
def test_inputs_that_share_a_tensor(form, activation, save):
    """One square matrix for x and every weight, one vector for every bias."""
    matrix, vector = (
        t.requires_grad_() for t in (like(torch.empty(4, 4).double(), 57), like(torch.empty(4).double(), 58))
    )
    _, weights, biases = tensors(form, seed=0)
    others = *[matrix] * len(weights), *[vector] * len(biases)

    def gradients(function):
        return torch.autograd.grad(function(matrix, *others).sum(), (matrix, vector))

    assert_all_close(gradients(ours_of(form, activation, save)), gradients(on_flat(eager, form, activation=activation)))


# Around it: hooks, checkpoints.


@each(("form", "activation", "save"), FORM_CASES)
def test_hooks(form, activation, save):
    inputs = flatten(*tensors(form, seed=61))
    plain = grads(ours_of(form, activation, save)(*inputs), inputs, torch.ones(37, _width(form)).double())
    seen = []
    inputs[1].register_hook(lambda g: g * 2)
    inputs[1].register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.clone()))
    x = inputs[0] * 1
    x.retain_grad()
    y = ours_of(form, activation, save)(x, *inputs[1:])
    y.retain_grad()
    y.register_hook(lambda g: g * 3)
    y.sum().backward()
    assert torch.equal(y.grad, torch.full_like(y, 3))
    assert_all_close([x.grad, *[t.grad for t in inputs[1:]]], [plain[0] * 3, plain[1] * 6, *[g * 3 for g in plain[2:]]])
    assert_equal(seen, [inputs[1].grad])


def _width(form):
    return FEATURES[-1] if form.projected else FEATURES[1]


@each("use_reentrant", [False, True])
@each(("form", "activation", "save"), CASES)
def test_checkpoint(form, activation, save, use_reentrant):
    inputs = flatten(*tensors(form, seed=62))
    function = ours_of(form, activation, save)
    y = checkpoint(function, *inputs, use_reentrant=use_reentrant)
    y.backward(like(y, 63))
    plain = function(*inputs)
    assert_equal([y, *[t.grad for t in inputs]], [plain, *grads(plain, inputs, like(y, 63))])
