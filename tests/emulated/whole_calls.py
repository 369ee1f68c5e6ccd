"""Whole calls on tensors in the emulated GPU's memory, held to what every backend is held to."""

from __future__ import annotations

import torch
from support import assert_accurate, call, grads, like, roundings, tensors

from emulated.emulator import emulator
from fastbp.activations import Bound, bind
from fastbp.forms import FORMS

GELU, TANH = bind("gelu"), bind("tanh")
BF16, F32 = torch.bfloat16, torch.float32


def gapped(tensor):
    """The same numbers, and between their rows NaN that nobody may use."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 8), float("nan"), dtype=tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor.detach()
    return wide[..., : tensor.shape[-1]].requires_grad_(tensor.requires_grad)


def expanded(dy):
    """One row's gradient for all rows, as of a sum."""
    return dy.reshape(-1, dy.shape[-1])[:1].expand(dy.numel() // dy.shape[-1], -1).view(dy.shape)


def shifted(tensor):
    """The same numbers from an address that is no multiple of 16 bytes."""
    memory = torch.full((tensor.numel() + 1,), float("nan"), dtype=tensor.dtype)
    found = memory[1:].view(tensor.shape)
    found[:] = tensor.detach()
    return found.requires_grad_(tensor.requires_grad)


VIEWS = {"dense": lambda t: t, "gapped": gapped, "expanded": expanded, "shifted": shifted}


def run(
    backend: str, form: str, activation: Bound, save: str, dtype: torch.dtype, rows: tuple[int, ...],
    features: tuple[int, ...], *, bias: bool = True, x: str = "dense", dy: str = "dense",
) -> None:  # fmt: skip
    """A call forward and backward, on inputs that cannot be written; ``x`` and ``dy`` say how these lie.

    What e4m3 keeps is not what the yardstick has. There the gradients are those of the same policy in plain PyTorch.
    """
    of = FORMS[form]
    first, weights, biases = tensors(of, dtype, seed=91, rows=rows, features=features, bias=bias)
    if save == "fp8":  # of few digits, so that z is exact and is rounded alike
        first, *others = (
            (t.detach() * 8).round().div(16).requires_grad_() if t is not None else None
            for t in (first, *weights, *biases)
        )
        weights, biases = others[: len(weights)], others[len(weights) :]
    first = VIEWS[x](first)
    emulator().protect(first, *weights, *biases)
    if save != "fp8":
        given, units = (first, weights, biases), roundings(save, dtype)
        assert_accurate(of, activation, save, given, backend=backend, view=VIEWS[dy], spare_units=units)
        return
    inputs = [t for t in (first, *weights, *biases) if t is not None]
    ours, theirs = (
        call(of, first, weights, biases, activation=activation, save=save, backend=b) for b in (backend, "reference")
    )
    d = VIEWS[dy](like(ours, seed=2))
    pairs = zip([ours, *grads(ours, inputs, d)], [theirs, *grads(theirs, inputs, d)], strict=True)
    for mine, its in pairs:
        assert (mine.dtype, mine.shape) == (its.dtype, its.shape)
        torch.testing.assert_close(mine, its, rtol=0, atol=0.03 * its.abs().max().item())
