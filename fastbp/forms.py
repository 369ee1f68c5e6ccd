"""The forms of a fused call: hidden layers of one or two linears each, and perhaps a last plain linear."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Form:
    """One row. A hidden layer is ``f(z)``, or ``f(gate) * up`` where gated; a projected form ends in a plain linear."""

    name: str
    gated: bool
    projected: bool
    parts: tuple[str, ...]  # what the caller's weights are called; empty: a list of any length

    def argument(self, kind: str, index: int) -> str:
        """The caller's name of a weight or bias: ``weight``, ``gate_bias``, ``weights[2]``."""
        if not self.parts:
            return f"{'biases' if kind == 'bias' else 'weights'}[{index}]"
        part = self.parts[index]
        return f"{part}_{kind}" if part else kind

    @property
    def width(self) -> int:
        """Linears in a hidden layer."""
        return 2 if self.gated else 1

    def hidden(self, linears: int) -> int:
        """Hidden layers of a call with so many linears."""
        return (linears - self.projected) // self.width


LINEAR_ACT = Form("linear_act", gated=False, projected=False, parts=("",))
GATED_LINEAR_ACT = Form("gated_linear_act", gated=True, projected=False, parts=("gate", "up"))
MLP = Form("mlp", gated=False, projected=True, parts=())
GATED_MLP = Form("gated_mlp", gated=True, projected=True, parts=("gate", "up", "down"))
FORMS: dict[str, Form] = {form.name: form for form in (LINEAR_ACT, GATED_LINEAR_ACT, MLP, GATED_MLP)}
