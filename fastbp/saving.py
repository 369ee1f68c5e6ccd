"""The table of save policies: what forward keeps for backward, when that is legal, and what ``auto`` takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from fastbp.activations import Bound, nearest
from fastbp.compression import BLOCK, DTYPES
from fastbp.forms import LINEAR_ACT, Form


@dataclass(frozen=True)
class Policy:
    """One row. ``illegal`` says why a policy does not serve an activation in a form, or None.

    ``tensors``: what is kept of a hidden linear, as kinds of ``Residual``. ``compressed``: in fewer bits than the dtype
    has, so that gradients are not those of z, it is never taken unasked, float64 is not served, and a gradient that is
    to be differentiated again is computed from x.
    """

    name: str
    keeps: str
    reads: str
    legal: str
    illegal: Callable[[Bound, Form], str | None]
    tensors: tuple[str, ...] = ()
    compressed: bool = False

    @property
    def from_output(self) -> bool:
        """Whether backward reads the output."""
        return "h" in self.tensors


def _output_illegal(activation: Bound, form: Form) -> str | None:
    if form.gated:
        return "the output of a gated layer, f(gate) * up, does not give back its two factors"
    if activation.row.grad_from_output is None:
        return f"the output of {activation.name} does not determine its slope"
    return activation.row.output_lost(*activation.params)


def _side_illegal(activation: Bound, form: Form) -> str | None:
    if form.gated:
        return "the output of a gated layer, f(gate) * up, does not give back its two factors"
    if activation.row.grad_from_side is None:
        return f"the output of {activation.name} and one side of a minimum do not determine its slope"
    return None


def _fp8_illegal(activation: Bound, form: Form) -> str | None:
    exact = activation.row.grad_from_output is not None and _output_illegal(activation, form) is None
    return f"the output of {activation.name} gives its slope" if exact else None


TABLE_OF_POLICIES: tuple[Policy, ...] = (
    Policy("preact", "z", "z", "always", lambda activation, form: None, ("z",)),
    Policy("output", "nothing (y itself serves)", "y", "the slope is a function of y", _output_illegal, ("h",)),
    Policy("recompute", "nothing", "x and W: one more GEMM", "always", lambda activation, form: None),
    Policy(
        "output_bits", "4 bits a number: the side of the minimum and the next bits of y", "y and the bits",
        "y and the side of the minimum determine the slope", _side_illegal, ("h", "bits"), compressed=True,
    ),
    Policy(
        "output_lsb", "nothing: the lowest bit of a negative y is the side of the minimum", "y",
        "y and the side of the minimum determine the slope", _side_illegal, ("h",), compressed=True,
    ),
    Policy(
        "fp8", "z in e4m3 with a scale for 32 numbers", "that", "`output` is not",
        _fp8_illegal, ("fp8", "scales"), compressed=True,
    ),
)  # fmt: skip
POLICIES: dict[str, Policy] = {policy.name: policy for policy in TABLE_OF_POLICIES}


def legal_policies(activation: Bound, form: Form = LINEAR_ACT) -> tuple[str, ...]:
    """The names of the policies that serve this activation in this form."""
    return tuple(p.name for p in TABLE_OF_POLICIES if p.illegal(activation, form) is None)


def exact_policies(activation: Bound, form: Form = LINEAR_ACT) -> tuple[str, ...]:
    """Those of them whose gradients are as good as those of z."""
    return tuple(name for name in legal_policies(activation, form) if not POLICIES[name].compressed)


def check_name(save: object, where: str) -> str:
    """A policy's name or ``auto``; ValueError or TypeError otherwise, beginning with ``where``."""
    known = ["auto", *POLICIES]
    if isinstance(save, str) and save in known:
        return save
    if not isinstance(save, str):
        raise TypeError(f"{where}: save must be the name of a policy, got {type(save).__name__} {save!r}")
    raise ValueError(f"{where}: unknown save policy {save!r};{nearest(save, known)} there are {', '.join(known)}")


def check_dtype(save: str, dtype: torch.dtype, where: str) -> None:
    """ValueError, beginning with ``where``, for a dtype that a policy does not serve."""
    if POLICIES[save].compressed and dtype not in DTYPES:
        served = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"{where}: save={save!r} is for {served}, got {dtype}; use 'preact' or 'recompute'")


def _output_serves(activation: Bound, form: Form) -> bool:
    """Whether the output is as good as z, and where it is the caller's, as free to be written to as PyTorch's own."""
    row = activation.row
    unseen = form.projected or not row.grad_reads_output
    return row.output_exact and (unseen or row.torch_keeps_output) and _output_illegal(activation, form) is None


def resolve(save: str, activation: Bound, form: Form, where: str) -> str:
    """The policy that serves: the one asked for, or for ``auto`` one that is exact and that nobody notices.

    That is the one that keeps least without recomputing, but z where PyTorch lets the caller write to the output.
    """
    if check_name(save, where) == "auto":
        return "output" if _output_serves(activation, form) else "preact"
    reason = POLICIES[save].illegal(activation, form)
    if reason:
        raise ValueError(
            f"{where}: save={save!r} cannot serve {activation!r}: {reason}; "
            f"use {' or '.join(repr(p) for p in exact_policies(activation, form))} or 'auto'"
        )
    return save


class Residual(NamedTuple):
    """One tensor that forward returns for backward: a row of it for each row of x.

    ``kind`` is ``z``, ``h`` (the output of a hidden layer), or what ``compression`` writes: ``bits``, ``fp8``,
    ``scales``. ``linear`` is the linear whose rows it has.
    """

    kind: str
    linear: int

    def features(self, out_features: int) -> int:
        """The length of a row, given that of the linear's output."""
        return -(-out_features // {"bits": 2, "scales": BLOCK}.get(self.kind, 1))

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Its dtype, given that of the call."""
        return dtype if self.kind in ("z", "h") else torch.uint8


def find_residuals(form: Form, save: str, linears: int) -> tuple[Residual, ...]:
    """What forward returns besides y, in order, of a call with so many linears. The output of a layer alone is y."""
    kinds = [kind for kind in POLICIES[save].tensors if form.projected or kind != "h"]
    return tuple(Residual(kind, i) for i in range(form.hidden(linears) * form.width) for kind in kinds)


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
    # Which pre-activations are looked at; the gradient of up alone reads f(gate) only.
    pre = [used[0], needs[0] or need_weights[0] or need_biases[0] or inputs[1]] if form.gated else used
    if save == "recompute":
        for i in range(len(pre)):
            if pre[i] if form.gated else any(pre[i:]):  # a chain is replayed up to the deepest one
                weights[i] = biases[i] = x = True
    elif POLICIES[save].compressed and any(pre):  # what a second derivative takes, as far as it exists anyway
        weights, biases = [True] * count, [*[True] * len(pre), *biases[len(pre) :]]
    of_output = [inputs[layer + 1] or (slopes[layer] and reads_output) for layer in range(hidden)]
    needed = {"z": pre, "fp8": pre, "scales": pre, "h": of_output, "bits": slopes}
    residuals = [needed[kind][i] for kind, i in find_residuals(form, save, count)]
    y = POLICIES[save].from_output and not form.projected and slopes[0] and reads_output
    return (x, y, *weights, *biases, *residuals)


# Both are asked on every call. Graph capture takes the plain functions: it would trace through a cache and warn.
needed_below = lru_cache(maxsize=1024)(find_needed_below)
kept = lru_cache(maxsize=1024)(find_kept)
