"""What is kept of the hidden layers, written and read, in plain torch: the policies of ``saving``, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbp.activations import wide
from fastbp.compression import decode_bits, decode_fp8, decode_lsb, encode_bits, encode_fp8, encode_lsb, floor
from fastbp.problem import Config
from fastbp.saving import POLICIES

Maybe = Tensor | None


def output_and_kept(config: Config, z: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """f(z), as the policy has it, and what is kept of the layer (``saving.find_residuals``)."""
    save, at = config.save, config.row.minimum_at
    if save == "output_bits":
        assert at is not None, config.row.name
        wide_h = config.value(z.to(wide(z.dtype)))
        h = wide_h.to(z.dtype)
        bits = encode_bits(z, wide_h, h, at)
        return h, (h, bits) if config.form.projected else (bits,)
    h = config.value(z)
    if save == "output_lsb":
        assert at is not None, config.row.name
        h = encode_lsb(z, h, at)
    if save == "preact":
        return h, (z,)
    if save == "fp8":
        return h, encode_fp8(z)
    return h, (h,) if config.form.projected and POLICIES[save].from_output else ()


def gated_kept(config: Config, gate: Tensor, up: Tensor) -> Sequence[Tensor]:
    """What is kept of a gated layer."""
    if config.save == "preact":
        return gate, up
    return (*encode_fp8(gate), *encode_fp8(up)) if config.save == "fp8" else ()


def read_kept(config: Config, y: Maybe, kept: Sequence[Any], dtype: torch.dtype) -> tuple[Sequence[Any], Sequence[Any]]:
    """For each hidden linear z or the output, and what the slope is computed from: the same, or y and its side."""
    if config.save == "fp8":
        zs = [None if c is None else decode_fp8(c, s, dtype) for c, s in zip(kept[0::2], kept[1::2], strict=True)]
        return zs, zs
    if not POLICIES[config.save].from_output:
        return kept, kept
    bits: Sequence[Any] = kept if config.save == "output_bits" else ()
    if not config.form.projected:
        outputs: Sequence[Any] = (y,)
    elif bits:
        outputs, bits = kept[0::2], kept[1::2]
    else:
        outputs = kept
    if config.save == "output":
        return outputs, outputs
    assert config.row.lowest is not None, config.row.name
    least = floor(config.row.lowest, dtype, config.save)
    if config.save == "output_lsb":
        return outputs, [None if h is None else decode_lsb(h, least) for h in outputs]
    return outputs, [None if b is None else decode_bits(h, b, least) for h, b in zip(outputs, bits, strict=True)]


def grad_from_side(config: Config, dy: Tensor, kept: tuple[Tensor, Tensor]) -> Tensor:
    """dz from dy, and from y and its side of the minimum, as ``compression`` decodes them."""
    formula = config.row.grad_from_side
    assert formula is not None, config.row.name
    return formula(dy.to(kept[0].dtype), *kept).to(dy.dtype)
