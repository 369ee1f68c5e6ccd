"""Activation modules whose kernel ``fuse`` exchanges: how the tests make and ask them."""

import torch
from support import ACTIVATIONS
from torch import nn

import fastbp
from fastbp.activations import bind
from fastbp.elementwise import is_faster

PASSES = [a for a in ACTIVATIONS if a.row.cpu_pass]


MODULES = [a for a in PASSES if a.row.module is not None]


GELU, TANH = bind("gelu"), bind("tanh")


def exchanged(act):
    model = nn.Sequential(act)
    fastbp.fuse(model)
    return model


def is_exchanged(y):
    return type(y.grad_fn).__name__ == "ActivatedBackward"


def faster(activation):
    """Whether this CPU has the pass: GELU's takes AVX-512."""
    return is_faster(activation, None, torch.ones(3))


def numbers(dtype=torch.float32, *shape):
    """More than two pieces of a pass, and no multiple of a register."""
    return (4 * torch.randn(shape or (83, 241), dtype=torch.float64)).to(dtype)


def value_and_gradient(act, z):
    given = z.clone().requires_grad_()
    y = act(given)
    return [y, *torch.autograd.grad(y, given, torch.linspace(-2, 2, y.numel()).to(y).view_as(y))]
