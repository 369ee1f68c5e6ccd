"""What is kept of the hidden layers, written and read, in plain torch: the policies of ``saving``, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastbp.activations import wide
from fastbp.compression import decode_bits, decode_fp8, decode_lsb, encode_bits, encode_fp8, encode_lsb, floor
from fastbp.problem import Config
from fastbp.saving import POLICIES

Maybe = Tensor | None
IN_A_BLOCK = 1 << 18  # numbers


def in_blocks(f: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> list[Tensor]:
    """f(tensors), row after row of the last dimension, in blocks: what f makes on the way is never of whole tensors."""
    shape = tensors[0].shape
    step = max(1, IN_A_BLOCK // max(1, shape[-1]))
    rows = prod(shape[:-1])  # Size.numel() would make a number of a symbol
    if type(rows) is not int or rows <= step:  # a graph of symbolic sizes would hold as many blocks as this call has
        return [*f(*tensors)]
    blocks = zip(*(t.reshape(-1, t.shape[-1]).split(step) for t in tensors), strict=True)
    results: list[Tensor] = []
    for begin, found in enumerate(f(*block) for block in blocks):
        if not results:
            results = [t.new_empty(rows, t.shape[-1]) for t in found]
        for result, part in zip(results, found, strict=True):
            result[begin * step : begin * step + len(part)] = part
    return [t.view(*shape[:-1], t.shape[-1]) for t in results]


def output_and_kept(config: Config, z: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """f(z), as the policy has it, and what is kept of the layer (``saving.find_residuals``)."""
    if config.save == "preact":
        return config.value(z), () if config.form.given else (z,)
    if config.save == "fp8":
        return config.value(z), in_blocks(encode_fp8, z)
    kept: Sequence[Tensor] = ()
    if POLICIES[config.save].compressed:
        h, *kept = in_blocks(partial(_output_and_codes, config), z)
    else:
        h = config.value(z)
    if config.form.projected and POLICIES[config.save].from_output:
        kept = (h, *kept)
    return h, kept


def _output_and_codes(config: Config, z: Tensor) -> Sequence[Tensor]:
    """The output with its side in its lowest bit, or the output and its bits."""
    at = config.row.minimum_at
    assert at is not None, config.row.name
    if config.save == "output_lsb":
        return (encode_lsb(z, config.value(z), at),)
    wide_h = config.value(z.to(wide(z.dtype)))
    h = wide_h.to(z.dtype)
    return h, encode_bits(z, wide_h, h, at)


def gated_kept(config: Config, gate: Tensor, up: Tensor) -> Sequence[Tensor]:
    """What is kept of a gated layer."""
    if config.save == "preact":
        return () if config.form.given else (gate, up)
    return (*in_blocks(encode_fp8, gate), *in_blocks(encode_fp8, up)) if config.save == "fp8" else ()


def kept_of_given(config: Config, inputs: Sequence[Tensor], h: Maybe = None) -> tuple[Tensor, ...]:
    """What forward of a given form keeps, for a caller who computes y itself.

    ``inputs`` are z, or gate and up. ``h`` is the hidden layer's output, if the caller has made it already: then it is
    not made again, where the policy keeps it as it is. Under ``output_lsb``, which changes the output, y has to be
    computed from the tensor that is returned.
    """
    if config.form.gated:
        return tuple(gated_kept(config, *inputs))
    if config.save == "preact":
        return ()
    if config.save == "fp8":
        return tuple(in_blocks(encode_fp8, *inputs))
    if config.save == "output" and h is not None:
        return (h,)
    return tuple(output_and_kept(config, *inputs)[1])


def read_kept(config: Config, y: Maybe, kept: Sequence[Any], dtype: torch.dtype) -> tuple[Sequence[Any], Sequence[Any]]:
    """Of each hidden linear z or the output, and what the slope is computed from: the same, or what ``sides`` reads."""
    if config.save == "fp8":

        def of_block(codes: Tensor, scales: Tensor) -> Sequence[Tensor]:
            return (decode_fp8(codes, scales, dtype),)

        pairs = zip(kept[0::2], kept[1::2], strict=True)
        zs = [None if c is None else in_blocks(of_block, c, s)[0] for c, s in pairs]
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
    if config.save == "output_lsb":
        return outputs, [None if h is None else (h,) for h in outputs]
    return outputs, [None if b is None else (h, b) for h, b in zip(outputs, bits, strict=True)]


def sides(config: Config, h: Tensor, bits: Maybe = None) -> tuple[Tensor, Tensor]:
    """The output in float32, and 1.0 where z is not left of the minimum, as ``compression`` decodes them."""
    assert config.row.lowest is not None, config.row.name
    least = floor(config.row.lowest, h.dtype, config.save)
    return decode_lsb(h, least) if bits is None else decode_bits(h, bits, least)


def grad_from_side(config: Config, dy: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
    """dz from dy, and from the output and its side of the minimum."""
    formula = config.row.grad_from_side
    assert formula is not None, config.row.name

    def of_block(dy: Tensor, *kept: Tensor) -> Sequence[Tensor]:
        from_y, right = sides(config, *kept)
        return (formula(dy.to(from_y.dtype), from_y, right).to(dy.dtype),)

    return in_blocks(of_block, dy, *kept)[0]
