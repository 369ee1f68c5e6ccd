"""The forms of a fused call: hidden layers of one or two linears each, and perhaps a last plain linear.

A call's tensors come in one row, the inputs before the weights and the weights before the biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Form:
    """One row. A hidden layer is ``f(z)``, or ``f(gate) * up`` where gated; a projected form ends in a plain linear.

    Of a given form z, or gate and up, are the caller's: its one hidden layer has no linears.
    """

    name: str
    gated: bool
    projected: bool
    parts: tuple[str, ...]  # what the caller's weights are called; empty: a list of any length
    given: bool = False

    def argument(self, kind: str, index: int) -> str:
        """The caller's name of a weight or bias: ``weight``, ``gate_bias``, ``weights[2]``."""
        if not self.parts:
            return f"{'biases' if kind == 'bias' else 'weights'}[{index}]"
        part = self.parts[index]
        return f"{part}_{kind}" if part else kind

    @property
    def names_of_inputs(self) -> tuple[str, ...]:
        """What the caller's tensors before the weights are called."""
        if not self.given:
            return ("x",)
        return ("gate", "up") if self.gated else ("z",)

    @property
    def inputs(self) -> int:
        """How many there are."""
        return 2 if self.given and self.gated else 1

    @property
    def width(self) -> int:
        """Pre-activations of a hidden layer; each has a linear of its own, unless they are given."""
        return 2 if self.gated else 1

    def hidden(self, linears: int) -> int:
        """Hidden layers of a call with so many linears."""
        return 1 if self.given else (linears - self.projected) // self.width

    def linears_of(self, layer: int, linears: int) -> range:
        """The linears of a layer; the last plain linear is a layer of its own, above the hidden ones."""
        if layer == self.hidden(linears):
            return range(linears - 1, linears)
        return range(0) if self.given else range(layer * self.width, (layer + 1) * self.width)

    def linears(self, tensors: int) -> int:
        """The linears of a call of so many inputs, weights and biases."""
        return (tensors - self.inputs) // 2

    def split(self, tensors: Sequence[_T]) -> tuple[tuple[_T, ...], tuple[_T, ...], tuple[_T, ...]]:
        """Inputs, weights and biases, of a call's tensors or of what is said of each."""
        end = self.inputs + self.linears(len(tensors))
        return tuple(tensors[: self.inputs]), tuple(tensors[self.inputs : end]), tuple(tensors[end:])


LINEAR_ACT = Form("linear_act", gated=False, projected=False, parts=("",))
GATED_LINEAR_ACT = Form("gated_linear_act", gated=True, projected=False, parts=("gate", "up"))
MLP = Form("mlp", gated=False, projected=True, parts=())
GATED_MLP = Form("gated_mlp", gated=True, projected=True, parts=("gate", "up", "down"))
ACT_LINEAR = Form("act_linear", gated=False, projected=True, parts=("",), given=True)
GATED_ACT_LINEAR = Form("gated_act_linear", gated=True, projected=True, parts=("",), given=True)
FORMS: dict[str, Form] = {
    form.name: form for form in (LINEAR_ACT, GATED_LINEAR_ACT, MLP, GATED_MLP, ACT_LINEAR, GATED_ACT_LINEAR)
}
