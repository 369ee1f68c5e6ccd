"""Forward mode in plain torch: what a call makes of tangents of its tensors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbp.problem import Config
from fastbp.reference import Maybe, Saved, add, formula_grad


def jvp(config: Config, primals: Saved, tangents: Saved) -> tuple[Tensor, ...]:
    """The tangents of y and of the residuals: ż = ẋ Wᵀ + x Ẇᵀ + ḃ, ḣ = f'(z) · ż."""
    form = config.form
    tresiduals: list[Tensor] = []

    def linear(i: int, h: Any, th: Maybe) -> tuple[Tensor, Tensor]:
        weight, tweight, tbias = primals.weights[i], tangents.weights[i], tangents.biases[i]
        z = F.linear(h, weight, primals.biases[i])
        tz = None if th is None else F.linear(th, weight)
        tz = add(tz, None if tweight is None else F.linear(h, tweight))
        tz = add(tz, None if tbias is None else tbias.expand_as(z))
        return z, torch.zeros_like(z) if tz is None else tz

    h: Any = primals.inputs[0]
    th: Any = tangents.inputs[0]
    if form.given:
        pairs = zip(primals.inputs, tangents.inputs, strict=True)
        zs = [(z, torch.zeros_like(z) if tz is None else tz) for z, tz in pairs]
    if form.gated:
        (g, tg), (u, tu) = zs if form.given else (linear(0, h, th), linear(1, h, th))
        th = formula_grad(config, tg * u, g) + config.value(g) * tu
        h = config.value(g) * u
        tresiduals = [tg, tu] if config.save == "preact" and not form.given else []
    elif form.given:
        ((z, tz),) = zs
        h, th = config.value(z), formula_grad(config, tz, z)
        tresiduals = [th] if config.save == "output" else []
    else:
        for i in range(len(primals.weights) - form.projected):
            z, tz = linear(i, h, th)
            h, th = config.value(z), formula_grad(config, tz, z)
            if config.save == "preact":
                tresiduals.append(tz)
            elif config.save == "output" and form.projected:
                tresiduals.append(th)
    return (linear(len(primals.weights) - 1, h, th)[1] if form.projected else th), *tresiduals
