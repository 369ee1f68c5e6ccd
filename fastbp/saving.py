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


def _recompute_illegal(activation: Bound, form: Form) -> str | None:
    return "z is made again by the layer before it, and a call that is given z has none" if form.given else None


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
    Policy("recompute", "nothing", "x and W: one more GEMM", "x, and not z, is given", _recompute_illegal),
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


def leanest(form: Form) -> str:
    """The policy of which forward writes nothing but y."""
    return "preact" if form.given else "recompute"


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


def safe_policies(form: Form) -> str:
    """Those that serve every activation and dtype, in words."""
    return "'preact'" if form.given else "'preact' or 'recompute'"


def check_dtype(save: str, dtype: torch.dtype, form: Form) -> None:
    """ValueError, in the name of the form, for a dtype that a policy does not serve."""
    if POLICIES[save].compressed and dtype not in DTYPES:
        served = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"fastbp.{form.name}: save={save!r} is for {served}, got {dtype}; use {safe_policies(form)}")


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
    ``scales``. ``linear`` is the linear whose rows it has, or the input, where that is a pre-activation.
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
    """What forward returns besides y, in order, of a call with so many linears.

    The output of a layer alone is y, and z that is given is an input.
    """
    kept = {"h": form.projected, "z": not form.given}
    kinds = [kind for kind in POLICIES[save].tensors if kept.get(kind, True)]
    return tuple(Residual(kind, i) for i in range(form.hidden(linears) * form.width) for kind in kinds)


def find_needed_below(form: Form, needs: tuple[bool, ...]) -> tuple[bool, ...]:
    """For each layer, and last for the whole call: whether anything beneath it takes a gradient.

    ``needs`` says which gradients are wanted: of the inputs, then of each weight, then of each bias.
    """
    inputs, weights, biases = form.split(needs)
    count = len(weights)
    below = [any(inputs)]
    for layer in range(form.hidden(count) + form.projected):
        below.append(below[-1] or any(weights[i] or biases[i] for i in form.linears_of(layer, count)))
    return tuple(below)


def find_kept(form: Form, save: str, reads_output: bool, needs: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which of the inputs, y, the weights, the biases and the residuals backward reads for the gradients ``needs``.

    The residuals come as forward returns them.

    A frozen weight needs no input of its layer; a layer with nothing to train in it or beneath it needs no slope.
    """
    need_inputs, need_weights, need_biases = form.split(needs)
    count = len(need_weights)
    hidden = form.hidden(count)
    layers = [form.linears_of(layer, count) for layer in range(hidden + form.projected)]
    below = find_needed_below(form, needs)
    reads = [any(need_weights[i] for i in layer) for layer in layers] + [False]  # the input of each layer; and y
    weights = [below[layer] for layer, linears in enumerate(layers) for _ in linears]
    biases = [False] * count
    slopes = below[1 : hidden + 1]
    used = [slopes[layer] or reads[layer + 1] for layer in range(hidden)]

    x = reads[0]
    pre = used  # which pre-activations are looked at
    if form.gated:  # the gradient of up alone reads f(gate) only
        of_gate = need_inputs[0] or (not form.given and (need_weights[0] or need_biases[0]))
        pre = [used[0], of_gate or reads[1]]
    if save == "recompute":
        for i in range(len(pre)):
            if pre[i] if form.gated else any(pre[i:]):  # a chain is replayed up to the deepest one
                weights[i] = biases[i] = x = True
    elif POLICIES[save].compressed and any(pre) and not form.given:
        # What a second derivative takes, as far as it exists anyway.
        weights, biases = [True] * count, [*[True] * len(pre), *biases[len(pre) :]]
    of_output = [reads[layer + 1] or (slopes[layer] and reads_output) for layer in range(hidden)]
    needed = {"z": pre, "fp8": pre, "scales": pre, "h": of_output, "bits": slopes}
    residuals = [needed[kind][i] for kind, i in find_residuals(form, save, count)]
    y = POLICIES[save].from_output and not form.projected and slopes[0] and reads_output
    inputs = [kept and save == "preact" for kept in pre] if form.given else [x]
    return (*inputs, y, *weights, *biases, *residuals)


# Both are asked on every call. Graph capture takes the plain functions: it would trace through a cache and warn.
needed_below = lru_cache(maxsize=1024)(find_needed_below)
kept = lru_cache(maxsize=1024)(find_kept)
