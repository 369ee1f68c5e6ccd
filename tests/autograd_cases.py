"""Calls to hold against autograd's rules, and what autograd keeps of one."""

import torch
from support import FEW, assert_close, call, cases, on_flat

from fastbp.activations import bind

CASES = cases(FEW)
FORM_CASES = cases([bind("gelu"), bind("tanh")])


def ours_of(form, activation, save):
    return on_flat(call, form, activation=activation, save=save)


def assert_equal(ours, theirs):
    """Bit for bit, and None in the same places."""
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, other)


def assert_all_close(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if other is not None:
            assert_close(mine, other)


def kept_tensors(function, inputs):
    """What autograd keeps of one call, and the result."""
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        return function(*inputs), found
