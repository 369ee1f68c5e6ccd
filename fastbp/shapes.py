"""What a call makes, found from shapes alone: results, gradients, and the operations of its products.

For the fakes of the ops, and for what counts operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from fastbp.forms import Form
from fastbp.saving import find_kept, find_needed_below, find_residuals

Shape = Sequence[int]


def new_results(form: Form, save: str, x: Tensor, weights: Sequence[Shape]) -> list[Tensor]:
    """y and the residuals, unwritten, as forward returns them, given the first input."""
    *leading, features = x.shape
    residuals = [
        x.new_empty(*leading, r.features(features if form.given else weights[r.linear][0]), dtype=r.dtype(x.dtype))
        for r in find_residuals(form, save, len(weights))
    ]
    return [x.new_empty(*leading, weights[-1][0]), *residuals]


def gradient_shapes(dy: Shape, weights: Sequence[Shape], needs: Sequence[bool]) -> list[Shape | None]:
    """Of the gradients, in the order of ``needs``; None where that does not ask."""
    inputs = len(needs) - 2 * len(weights)  # each is as wide as what the first linear takes
    every: list[Shape] = [(*dy[:-1], weights[0][1])] * inputs
    every += [*weights, *((w[0],) for w in weights)]
    return [shape if need else None for shape, need in zip(every, needs, strict=True)]


def find_weights(
    form: Form,
    save: str,
    reads_output: bool,
    needs: tuple[bool, ...],
    dy: Shape,
    inputs: Sequence[Shape],
    weights: Sequence[Shape | None],
    residuals: Sequence[Shape],
) -> list[Shape]:
    """The shapes of all weights, given those that backward reads, and of what else it reads.

    What ``saving.kept`` does not name may have any shape here. A size that nothing tells is asked of nothing, and 0.
    """
    count, hidden = len(weights), form.hidden(len(weights))
    layers = _layers_of(form, count)
    kept = find_kept(form, save, reads_output, needs)
    # Of each layer the features that go in and come out, from the outside to the inside.
    out, into = [0] * (hidden + 1), [0] * (hidden + 1)
    out[layers[-1]] = dy[-1]
    for shape, there in zip(inputs, kept, strict=False):
        if there:  # of a given form they are what the hidden layer makes of nothing
            (out if form.given else into)[0] = shape[-1]
    found = find_residuals(form, save, count)
    for residual, shape, there in zip(found, residuals, kept[len(kept) - len(found) :], strict=False):
        if there and residual.kind not in ("bits", "scales"):
            out[residual.linear // form.width] = shape[-1]
    for layer, weight in zip(layers, weights, strict=True):
        if weight is not None:
            out[layer], into[layer] = weight
        if layer and into[layer]:
            out[layer - 1] = into[layer]
    return [(out[layer], into[layer] or (out[layer - 1] if layer else 0)) for layer in layers]


def _layers_of(form: Form, linears: int) -> list[int]:
    """The layer of each linear."""
    layers = range(form.hidden(linears) + form.projected)
    return [layer for layer in layers for _ in form.linears_of(layer, linears)]


def forward_flops(rows: int, weights: Sequence[Shape]) -> int:
    """Two for each product of two numbers, as PyTorch counts those of ``F.linear``."""
    return sum(2 * rows * prod(weight) for weight in weights)


def backward_flops(form: Form, save: str, rows: int, weights: Sequence[Shape], needs: tuple[bool, ...]) -> int:
    """The same of backward: dx and dW of each linear where they are needed, and under ``recompute`` z again."""
    _, need_weights, _ = form.split(needs)
    below = find_needed_below(form, needs)
    layers = _layers_of(form, len(weights))
    times = [below[layer] + need for layer, need in zip(layers, need_weights, strict=True)]
    if save == "recompute":
        hidden = form.hidden(len(weights)) * form.width
        slopes = find_kept(form, "preact", True, needs)[-hidden:]
        for i in range(hidden):  # a chain is replayed up to the deepest one
            times[i] += slopes[i] if form.gated else any(slopes[i:])
    return sum(n * 2 * rows * prod(weight) for n, weight in zip(times, weights, strict=True))
