"""The table of save policies: what forward keeps for backward, when that is legal, and what ``auto`` takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from fastbp.activations import Bound, nearest
from fastbp.forms import LINEAR_ACT, Form


@dataclass(frozen=True)
class Policy:
    """One row. ``illegal`` says why a policy does not serve an activation in a form, or None."""

    name: str
    keeps: str
    reads: str
    legal: str
    illegal: Callable[[Bound, Form], str | None]


def _output_illegal(activation: Bound, form: Form) -> str | None:
    if form.gated:
        return "the output of a gated layer, f(gate) * up, does not give back its two factors"
    if activation.row.grad_from_output is None:
        return f"the output of {activation.name} does not determine its slope"
    return activation.row.output_lost(*activation.params)


TABLE_OF_POLICIES: tuple[Policy, ...] = (
    Policy("preact", "z", "z", "always", lambda activation, form: None),
    Policy("output", "nothing (y itself serves)", "y", "the slope is a function of y", _output_illegal),
    Policy("recompute", "nothing", "x and W: one more GEMM", "always", lambda activation, form: None),
)
POLICIES: dict[str, Policy] = {policy.name: policy for policy in TABLE_OF_POLICIES}
NOT_YET = ("output_bits", "output_lsb", "fp8")


def legal_policies(activation: Bound, form: Form = LINEAR_ACT) -> tuple[str, ...]:
    """The names of the policies that serve this activation in this form."""
    return tuple(p.name for p in TABLE_OF_POLICIES if p.illegal(activation, form) is None)


def check_name(save: object, where: str) -> str:
    """A policy's name or ``auto``; ValueError or TypeError otherwise, beginning with ``where``."""
    known = ["auto", *POLICIES]
    if isinstance(save, str) and save in known:
        return save
    if not isinstance(save, str):
        raise TypeError(f"{where}: save must be the name of a policy, got {type(save).__name__} {save!r}")
    if save in NOT_YET:
        raise ValueError(f"{where}: save policy {save!r} is not in this version; there are {', '.join(known)}")
    raise ValueError(f"{where}: unknown save policy {save!r};{nearest(save, known)} there are {', '.join(known)}")


def resolve(save: str, activation: Bound, form: Form, where: str) -> str:
    """The policy that serves: the one asked for, or for ``auto`` the exact one that keeps least without recomputing."""
    if check_name(save, where) == "auto":
        exact = activation.row.output_exact and _output_illegal(activation, form) is None
        return "output" if exact else "preact"
    reason = POLICIES[save].illegal(activation, form)
    if reason:
        raise ValueError(
            f"{where}: save={save!r} cannot serve {activation!r}: {reason}; "
            f"use {' or '.join(repr(p) for p in legal_policies(activation, form))} or 'auto'"
        )
    return save


def find_needed_below(form: Form, needs: tuple[bool, ...]) -> tuple[bool, ...]:
    """For each layer, and last for the whole call: whether anything beneath it takes a gradient.

    ``needs`` says which gradients are wanted: of x, then of each weight, then of each bias.
    """
    count = len(needs) // 2
    hidden = form.hidden(count)
    below = [needs[0]]
    for layer in range(hidden + form.projected):
        first = layer * form.width
        own = range(first, first + form.width) if layer < hidden else range(first, count)
        below.append(below[-1] or any(needs[1 + i] or needs[1 + count + i] for i in own))
    return tuple(below)


def find_kept(form: Form, save: str, reads_output: bool, needs: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which of x, y, the weights, the biases and the residuals backward reads for the gradients ``needs``.

    The residuals come as forward returns them.

    A frozen weight needs no input of its layer; a layer with nothing to train in it or beneath it needs no slope.
    """
    count = len(needs) // 2
    need_weights, need_biases = needs[1 : 1 + count], needs[1 + count :]
    hidden = form.hidden(count)
    layer_of = [min(i // form.width, hidden) for i in range(count)]  # the last plain linear is a layer of its own
    below = find_needed_below(form, needs)
    inputs = [any(need_weights[i] for i in range(count) if layer_of[i] == layer) for layer in range(hidden + 1)]
    weights = [below[layer_of[i]] for i in range(count)]
    biases = [False] * count
    slopes = below[1 : hidden + 1]
    used = [slopes[layer] or inputs[layer + 1] for layer in range(hidden)]

    x = inputs[0]
    residuals: list[bool] = []
    # Which pre-activations are looked at; the gradient of up alone reads f(gate) only.
    pre = [used[0], needs[0] or need_weights[0] or need_biases[0] or inputs[1]] if form.gated else used
    if save == "recompute":
        for i in range(len(pre)):
            if pre[i] if form.gated else any(pre[i:]):  # a chain is replayed up to the deepest one
                weights[i] = biases[i] = x = True
    elif save == "preact":
        residuals = pre
    elif form.projected:  # output: the residuals are the outputs of the hidden layers
        residuals = [inputs[layer + 1] or (slopes[layer] and reads_output) for layer in range(hidden)]
    y = save == "output" and not form.projected and slopes[0] and reads_output
    return (x, y, *weights, *biases, *residuals)


# Both are asked on every call. Graph capture takes the plain functions: it would trace through a cache and warn.
needed_below = lru_cache(maxsize=1024)(find_needed_below)
kept = lru_cache(maxsize=1024)(find_kept)
