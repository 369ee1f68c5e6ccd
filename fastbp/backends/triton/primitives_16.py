"""The primitives for results of 16 bits, in float32: few instructions, each exact to a fraction of float16's unit.

What the special function unit of an NVIDIA GPU has is taken as it is: ``ex2``, ``rcp``, ``tanh`` and ``lg2`` by their
``.approx`` forms (PTX ISA, "Floating Point Instructions"), one instruction each. The interpreter, which knows no PTX,
computes those four by exact functions; all else is the same text. Errors are relative to the result, so that the tails
of sigmoid and of the normal distribution keep their digits: ``tanh.approx`` alone, off by 2⁻¹¹, would leave none of
1 + tanh(u) at u = −4, and serves only for tanh itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastbp.backends.triton._polynomials import NORMAL_END_SQUARED, normal_logit
from fastbp.backends.triton.blocks import INTERPRETED
from fastbp.backends.triton.primitives import (  # noqa: F401 (most are passed on)
    absolute,
    maximum,
    minimum,
    select,
    sqrt,
)
from fastbp.backends.triton.primitives import tanh as precise_tanh


@triton.jit
def power_of_two(x):
    """2ˣ, ``ex2.approx.ftz``: off by 2⁻²², 0 below 2⁻¹²⁶."""
    return tl.exp2(x)


@triton.jit
def reciprocal(x):
    """1 / x, off by 1 unit in the last place of float32; 0 where that is below 2⁻¹²⁶, which ``.ftz`` makes 0."""
    if INTERPRETED:
        y = tl.where(tl.abs(x) > 8.507059173023462e37, tl.where(x > 0.0, 0.0, -0.0), 1.0 / x)
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def divide(a, b):
    """a / b, off by 2 units in the last place of float32, for any b from 2⁻¹²⁴ on, whose quarter has a reciprocal."""
    return a * 0.25 * reciprocal(b * 0.25)


@triton.jit
def exp(x):
    return power_of_two(x * 1.4426950408889634)


@triton.jit
def expm1(x):
    """eˣ − 1, near 0 by its series: there the difference cancels."""
    near = x + x * x * (0.5 + x * 0.16666666666666666)
    return tl.where(tl.abs(x) < 0.03125, near, exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x), near 0 by its series: there the sum has lost the digits of x."""
    if INTERPRETED:
        far = tl.log(1.0 + x)
    else:
        binary = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + x], dtype=tl.float32, is_pure=True, pack=1
        )
        far = binary * 0.6931471805599453
    return tl.where(tl.abs(x) < 0.015625, x - x * x * (0.5 - x * 0.3333333333333333), far)


@triton.jit
def normal_cdf(x):
    """Φ(x) as 1 / (1 + e^(−x p(x²))): its logit over x is smooth and even, and the error is relative to the tail."""
    square = minimum(x * x, NORMAL_END_SQUARED)
    return reciprocal(1.0 + power_of_two(x * normal_logit(square)))


@triton.jit
def normal_pdf(x):
    """Φ'(x) = exp(-x² / 2) / √(2 π)."""
    return power_of_two(x * x * -0.7213475204444817 - 1.3257480647361592)


@triton.jit
def sigmoid(x):
    """1 / (1 + e⁻ˣ). Where e⁻ˣ overflows, 1 / inf is the 0 that belongs there."""
    return reciprocal(1.0 + power_of_two(x * -1.4426950408889634))


@triton.jit
def tanh(x):
    """``tanh.approx``: off by 2⁻¹¹ of itself, near 0 too."""
    if INTERPRETED:
        y = precise_tanh(x)
    else:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def tanh_cdf(x):
    """(1 + tanh x) / 2 = 1 / (1 + e⁻²ˣ), which keeps the digits of the tail."""
    return reciprocal(1.0 + power_of_two(x * -2.8853900817779268))


@triton.jit
def tanh_pdf(x):
    """The derivative of ``tanh_cdf``, 2 c (1 − c) with c its value, which is computed once for both."""
    c = tanh_cdf(x)
    return 2.0 * c * (1.0 - c)
