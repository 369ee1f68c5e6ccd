"""Casts of weights under autocast: no more of them than F.linear's, and as good numbers."""

import pytest
import torch
from autocast_cases import F16, F32, F64, RELU, Casts, region
from graphs import each_form
from support import assert_as_good_as_eager, call, each, eager, exact, formula, like, tensors, widened
from torch.utils.checkpoint import checkpoint

from fastbp import casts


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert casts._current() is None, "casts outlive their region"


# Each situation gets a call with the same weights for any seed of x, and what lets them take gradients or not.


def used_twice(f, tune):
    with region():
        return f(1) + f(2)


def micro_batches(f, tune):
    with region():
        for seed in range(3):
            f(seed).sum().backward()


def backward_after_the_region(f, tune):
    with region():
        losses = [f(seed).sum() for seed in range(3)]
    for loss in losses:
        loss.backward()


def inference(f, tune):
    with region(), torch.inference_mode():
        return [f(seed) for seed in range(3)]


def evaluation_then_training(f, tune):
    with region():
        with torch.inference_mode():
            f(1)
        with torch.no_grad():
            f(2)
        f(3).sum().backward()
        with torch.no_grad():
            return f(4)


def without_gradients_then_with(f, tune):
    with region():
        with torch.no_grad():
            f(1)
        f(2).sum().backward()


def two_regions(f, tune):
    for seed in range(2):
        with region():
            f(seed).sum().backward()


def nested_regions(f, tune):
    with region():
        y = f(1)
        with region(), torch.autocast("cpu", enabled=False):
            pass
        with region():
            y = y + f(2)
        return y + f(3)


def without_cache(f, tune):
    with region(cache_enabled=False):
        return f(1) + f(2)


def without_cache_inside(f, tune):
    with region():
        y = f(1)
        with region(cache_enabled=False):
            y = y + f(2)
        return y + f(3)


def cleared(f, tune):
    with region():
        y = f(1)
        torch.clear_autocast_cache()
        return y + f(2)


def checkpointed(f, tune):
    with region():
        x = torch.ones((), requires_grad=True)
        checkpoint(lambda x: f(1) * x, x, use_reentrant=False).sum().backward()


def frozen(f, tune):
    tune(False)
    with region():
        y = f(1) + f(2)
    tune(True)
    return y


def thawed(f, tune):
    with region():
        y = f(1)
        tune(False)
        y = y + f(2)
        tune(True)
        return y + f(3)


def in_float16(f, tune):
    with region(F16):
        return f(1) + f(2)


def switched_by_hand(f, tune):
    torch.set_autocast_enabled("cpu", True)
    try:
        return f(1) + f(2)
    finally:
        torch.set_autocast_enabled("cpu", False)
        torch.clear_autocast_cache()


SITUATIONS = [
    used_twice, micro_batches, backward_after_the_region, inference, evaluation_then_training,
    without_gradients_then_with, two_regions, nested_regions, without_cache, without_cache_inside, cleared,
    checkpointed, frozen, thawed, in_float16, switched_by_hand,
]  # fmt: skip


def outcome(situation, function, dtype=F32):
    """Results of a situation, the gradients that it leaves in the weights and biases, and the casts it took."""
    x, weights, biases = tensors(function.form, F32, seed=7)
    if dtype == F64:
        x, *wide = widened([x, *weights, *biases])
        weights, biases = wide[: len(weights)], wide[len(weights) :]
    leaves = [*weights, *biases]

    def f(seed):
        return function(like(x, seed), weights, biases)

    def tune(on):
        for leaf in leaves:
            leaf.requires_grad_(on)

    with Casts() as seen:
        y = situation(f, tune)
        if isinstance(y, torch.Tensor) and y.requires_grad:
            y.backward(like(y, seed=3))
    results = [t.detach() for t in (y or [] if not isinstance(y, torch.Tensor) else [y])]
    return [*results, *(leaf.grad for leaf in leaves)], seen.count


class Of:
    """One form's call: ours, or plain PyTorch's."""

    def __init__(self, form, function, activation):
        self.form, self.function, self.activation = form, function, activation

    def __call__(self, x, weights, biases):
        return self.function(self.form, x, weights, biases, activation=self.activation)


def stock(form, x, weights, biases, activation):
    """Plain PyTorch; what a given form is given is an argument as those of F.linear are, and cast as they are."""
    if form.given and torch.is_autocast_enabled("cpu"):
        dtype, others = torch.get_autocast_dtype("cpu"), form.inputs - 1
        x, weights = x.to(dtype), [*(t.to(dtype) for t in weights[:others]), *weights[others:]]
    return eager(form, x, weights, biases, activation=activation)


@each_form
@each("situation", SITUATIONS)
def test_no_more_casts_than_stock_and_as_good_numbers(form, situation):
    mine, my_casts = outcome(situation, Of(form, call, RELU))
    theirs, their_casts = outcome(situation, Of(form, stock, RELU))
    assert 0 < my_casts <= their_casts
    truth, _ = outcome(situation, Of(form, lambda *given, activation: exact(*given, formula(activation)), RELU), F64)
    assert_as_good_as_eager(mine, theirs, truth)
