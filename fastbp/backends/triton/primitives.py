"""The primitives of ``fastbp/formulas.py`` for Triton, on blocks of float32 or float64, for results as precise.

They are built from what the language itself has, since libdevice does not exist in the interpreter: so the text that
TRITON_INTERPRET=1 tests is the text that runs on a GPU.  Each is within a few units in the last place of the exact
value, and has PyTorch's values at ±inf and NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastbp.backends.triton._polynomials import erf_far, erf_near, tanh_near


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def erf(x):
    """In float32 by two polynomials without a branch, as on the CPU; in float64 the language's own."""
    if x.dtype == tl.float32:
        t = minimum(tl.abs(x), 4.0)
        near = t + t * erf_near(t * t)
        far = 1.0 - exp(-erf_far(t - 1.0))
        y = tl.where(t < 1.0, near, far)
        y = tl.where(x < 0.0, -y, y)
    else:
        y = tl.erf(x)
    return y


@triton.jit
def exp(x):
    """eˣ. In float32 ``tl.exp(x)`` is 2^(x / ln 2) with the quotient rounded, off by |x| units in the last place.

    So there e^x = 2ⁿ · eʳ with n = round(x / ln 2), x = n ln 2 + r, as Cody and Waite do: n times the first part of
    ln 2, which has 9 bits to spare, is exact.  2ⁿ goes in by halves, for it may leave the range where the product does
    not.  The limits are where the result is 0 and inf already.
    """
    if x.dtype == tl.float32:
        x = maximum(minimum(x, 89.0), -104.0)
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        r = (x - n * 0.693145751953125) - n * 1.4286068203094173e-06
        half = tl.floor(n * 0.5)
        y = tl.exp(r) * tl.exp2(half) * tl.exp2(n - half)
    else:
        y = tl.exp(x)
    return y


@triton.jit
def expm1(x):
    """eˣ − 1. Near 0 by Kahan: u = eˣ, however rounded, is e^(log u), and (u − 1) / log u changes slowly with u."""
    u = exp(x)
    near = tl.where(u == 1.0, x, (u - 1.0) * (x / tl.log(u)))
    return tl.where(tl.abs(x) > 1.0, u - 1.0, near)


@triton.jit
def log1p(x):
    """log(1 + x). Near 0 by Kahan: u = 1 + x, however rounded, and log(u) / (u − 1) changes slowly with u."""
    u = 1.0 + x
    near = tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))
    return tl.where(tl.abs(x) > 1.0, tl.log(u), near)


@triton.jit
def maximum(a, b):
    """max(a, b) with b a number, NaN kept.  b takes a's dtype first: ``tl.maximum`` rounds a literal to float32."""
    return tl.maximum(a, tl.full(a.shape, b, a.dtype), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    """min(a, b) with b a number, NaN kept, as ``maximum``."""
    return tl.minimum(a, tl.full(a.shape, b, a.dtype), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def normal_cdf(x):
    """Φ(x) = (1 + erf(x / √2)) / 2, as PyTorch's GELU has it."""
    return 0.5 * (1.0 + erf(x * 0.7071067811865476))


@triton.jit
def normal_pdf(x):
    """Φ'(x) = exp(-x² / 2) / √(2 π)."""
    return 0.3989422804014327 * exp(-0.5 * x * x)


@triton.jit
def select(condition, a, b):
    """a where the condition holds, else b; a or b may be a number."""
    return tl.where(condition, a, b)


@triton.jit
def sigmoid(x):
    """1 / (1 + e⁻ˣ). Where e⁻ˣ overflows, 1 / inf is the 0 that belongs there."""
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def tanh(x):
    """In float32 a polynomial near 0 and 1 − 2 / (e^2|x| + 1) beyond, as on the CPU, for an error near one unit.

    In float64, with t = e^(−2|x|) − 1, which lies in (−1, 0]: tanh |x| = −t / (t + 2).
    """
    size = tl.abs(x)
    if x.dtype == tl.float32:
        y = tl.where(size < 0.6, size + size * tanh_near(size * size), 1.0 - 2.0 / (exp(2.0 * size) + 1.0))
    else:
        t = expm1(-2.0 * size)
        y = -t / (t + 2.0)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def tanh_cdf(x):
    """(1 + tanh x) / 2, as PyTorch's tanh-GELU has it."""
    return 0.5 * (1.0 + tanh(x))


@triton.jit
def tanh_pdf(x):
    """The derivative of ``tanh_cdf``: (1 - tanh² x) / 2."""
    t = tanh(x)
    return 0.5 * (1.0 - t * t)
