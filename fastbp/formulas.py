"""The mathematics of every activation, once.

Each function is written over the primitives imported below and serves three readers: it runs as it stands on tensors
(float32 or float64; 16-bit inputs are widened by the caller), ``tools/render.py`` turns it into Triton
(``fastbp/backends/triton/_activations.py``), and into C++ (``csrc/activations.h``).  So the bodies stay inside a small
language: assignments, one ``return``, arithmetic, comparisons, constants of this module, and the primitives.

Names: z pre-activation, y output, dy gradient of y; what follows are the activation's parameters, as numbers.
``X`` is the value, ``X_grad`` is dz from dy and z, ``X_grad_from_output`` is dz from dy and y.

Two rules the tests hold every row to:
- NaN and inf stand where PyTorch has them, so a gradient is ``dz(dy, z)`` and not a slope (``inf * 0`` must not appear
  where PyTorch returns 0), and comparisons are on the side that PyTorch chose for NaN and for the kinks.
- The gradients are differentiated again for higher orders, so no branch that ``select`` discards may overflow:
  ``select`` passes ``0 * inf = NaN`` back through it.
"""

from torch import Tensor, erf, exp, expm1, log1p, sigmoid, sqrt, tanh
from torch import abs as absolute
from torch import where as select

# The primitives of the language; each target has a hand-written file with the same names (primitives.py, primitives.h).
PRIMITIVES = (
    *("absolute", "exp", "expm1", "log1p", "maximum", "minimum", "normal_cdf", "normal_pdf", "select", "sigmoid"),
    *("sqrt", "tanh", "tanh_cdf", "tanh_pdf"),
)


def maximum(a: Tensor, b: float) -> Tensor:
    """max(a, b), NaN kept, gradient to a at a tie."""
    return a.clamp(min=b)


def minimum(a: Tensor, b: float) -> Tensor:
    """min(a, b), NaN kept, gradient to a at a tie."""
    return a.clamp(max=b)


def normal_cdf(x: Tensor) -> Tensor:
    """Φ(x) = (1 + erf(x / √2)) / 2, as PyTorch's GELU has it."""
    return 0.5 * (1.0 + erf(x * SQRT_HALF))


def normal_pdf(x: Tensor) -> Tensor:
    """Φ'(x) = exp(-x² / 2) / √(2 π)."""
    return INV_SQRT_2PI * exp(-0.5 * x * x)


def tanh_cdf(x: Tensor) -> Tensor:
    """(1 + tanh x) / 2, as PyTorch's tanh-GELU has it."""
    return 0.5 * (1.0 + tanh(x))


def tanh_pdf(x: Tensor) -> Tensor:
    """The derivative of ``tanh_cdf``: (1 - tanh² x) / 2."""
    t = tanh(x)
    return 0.5 * (1.0 - t * t)


SQRT_HALF = 0.7071067811865476  # 1 / sqrt(2)
INV_SQRT_2PI = 0.3989422804014327  # 1 / sqrt(2 pi)
SQRT_2_OVER_PI = 0.7978845608028654
GELU_CUBIC = 0.044715  # Hendrycks and Gimpel, arXiv:1606.08415, section 2
QUICK_GELU_SCALE = 1.702  # the same paper: x * sigmoid(1.702 x)
SELU_ALPHA = 1.6732632423543772  # Klambauer et al., arXiv:1706.02515
SELU_SCALE = 1.0507009873554805


def identity(z: Tensor) -> Tensor:
    return z


def identity_grad(dy: Tensor, z: Tensor) -> Tensor:
    return dy


def identity_grad_from_output(dy: Tensor, y: Tensor) -> Tensor:
    return dy


def relu(z: Tensor) -> Tensor:
    return select(z <= 0.0, 0.0, z)


def relu_grad(dy: Tensor, z: Tensor) -> Tensor:
    return select(z <= 0.0, 0.0, dy)


def relu_grad_from_output(dy: Tensor, y: Tensor) -> Tensor:
    return select(y <= 0.0, 0.0, dy)


def leaky_relu(z: Tensor, negative_slope: float) -> Tensor:
    return select(z > 0.0, z, negative_slope * z)


def leaky_relu_grad(dy: Tensor, z: Tensor, negative_slope: float) -> Tensor:
    return select(z > 0.0, dy, negative_slope * dy)


def leaky_relu_grad_from_output(dy: Tensor, y: Tensor, negative_slope: float) -> Tensor:
    return select(y > 0.0, dy, negative_slope * dy)


def hardtanh(z: Tensor, min_val: float, max_val: float) -> Tensor:
    return select(z < min_val, min_val, select(z > max_val, max_val, z))


def hardtanh_grad(dy: Tensor, z: Tensor, min_val: float, max_val: float) -> Tensor:
    return select(z > min_val, select(z < max_val, dy, 0.0), 0.0)


def hardtanh_grad_from_output(dy: Tensor, y: Tensor, min_val: float, max_val: float) -> Tensor:
    return select(y > min_val, select(y < max_val, dy, 0.0), 0.0)


def elu(z: Tensor, alpha: float) -> Tensor:
    return select(z > 0.0, z, alpha * expm1(minimum(z, 0.0)))


def elu_grad(dy: Tensor, z: Tensor, alpha: float) -> Tensor:
    return select(z > 0.0, dy, dy * alpha * exp(minimum(z, 0.0)))


def elu_grad_from_output(dy: Tensor, y: Tensor, alpha: float) -> Tensor:
    return select(y > 0.0, dy, dy * (y + alpha))


def celu(z: Tensor, alpha: float) -> Tensor:
    return select(z > 0.0, z, alpha * expm1(minimum(z, 0.0) / alpha))


def celu_grad(dy: Tensor, z: Tensor, alpha: float) -> Tensor:
    return select(z > 0.0, dy, dy * exp(minimum(z, 0.0) / alpha))


def celu_grad_from_output(dy: Tensor, y: Tensor, alpha: float) -> Tensor:
    return select(y > 0.0, dy, dy * (y / alpha + 1.0))


def selu(z: Tensor) -> Tensor:
    return SELU_SCALE * select(z > 0.0, z, SELU_ALPHA * expm1(minimum(z, 0.0)))


def selu_grad(dy: Tensor, z: Tensor) -> Tensor:
    return SELU_SCALE * select(z > 0.0, dy, dy * SELU_ALPHA * exp(minimum(z, 0.0)))


def selu_grad_from_output(dy: Tensor, y: Tensor) -> Tensor:
    return select(y > 0.0, SELU_SCALE * dy, dy * (y + SELU_SCALE * SELU_ALPHA))


# The next two are named with an underscore because their plain names are primitives; the table knows them as such.
def sigmoid_(z: Tensor) -> Tensor:
    return sigmoid(z)


def sigmoid_grad(dy: Tensor, z: Tensor) -> Tensor:
    s = sigmoid(z)
    return dy * (1.0 - s) * s


def sigmoid_grad_from_output(dy: Tensor, y: Tensor) -> Tensor:
    return dy * (1.0 - y) * y


def tanh_(z: Tensor) -> Tensor:
    return tanh(z)


def tanh_grad(dy: Tensor, z: Tensor) -> Tensor:
    t = tanh(z)
    return dy * (1.0 - t * t)


def tanh_grad_from_output(dy: Tensor, y: Tensor) -> Tensor:
    return dy * (1.0 - y * y)


def softplus(z: Tensor, beta: float, threshold: float) -> Tensor:
    return select(z * beta > threshold, z, log1p(exp(minimum(z * beta, threshold))) / beta)


def softplus_grad(dy: Tensor, z: Tensor, beta: float, threshold: float) -> Tensor:
    return select(z * beta > threshold, dy, dy * sigmoid(z * beta))


def softplus_grad_from_output(dy: Tensor, y: Tensor, beta: float, threshold: float) -> Tensor:
    return select(y * beta > threshold, dy, dy * -expm1(-beta * y))


def softsign(z: Tensor) -> Tensor:
    return z / (1.0 + absolute(z))


def softsign_grad(dy: Tensor, z: Tensor) -> Tensor:
    r = 1.0 / (1.0 + absolute(z))
    y = z * r
    return select(y == y, dy * r * r, y)  # y is NaN at ±inf, and there PyTorch's dz is NaN too


def softsign_grad_from_output(dy: Tensor, y: Tensor) -> Tensor:
    t = 1.0 - absolute(y)
    return dy * t * t


def silu(z: Tensor) -> Tensor:
    return z * sigmoid(z)


def silu_grad(dy: Tensor, z: Tensor) -> Tensor:
    s = sigmoid(z)
    return dy * s * (1.0 + z * (1.0 - s))


def gelu(z: Tensor) -> Tensor:
    return z * normal_cdf(z)


def gelu_grad(dy: Tensor, z: Tensor) -> Tensor:
    return dy * (normal_cdf(z) + z * normal_pdf(z))


def gelu_tanh(z: Tensor) -> Tensor:
    return z * tanh_cdf(z * (SQRT_2_OVER_PI + SQRT_2_OVER_PI * GELU_CUBIC * (z * z)))


def gelu_tanh_grad(dy: Tensor, z: Tensor) -> Tensor:
    square = z * z
    u = z * (SQRT_2_OVER_PI + SQRT_2_OVER_PI * GELU_CUBIC * square)
    return dy * (tanh_cdf(u) + z * tanh_pdf(u) * (SQRT_2_OVER_PI + 3.0 * SQRT_2_OVER_PI * GELU_CUBIC * square))


def quick_gelu(z: Tensor) -> Tensor:
    return z * sigmoid(QUICK_GELU_SCALE * z)


def quick_gelu_grad(dy: Tensor, z: Tensor) -> Tensor:
    s = sigmoid(QUICK_GELU_SCALE * z)
    return dy * (s + z * (QUICK_GELU_SCALE * (s * (1.0 - s))))  # 1.702 z may overflow, where its slope is 0


# mish: tanh(log(1 + e)) = n / (n + 2) with n = e (e + 2); beyond z = 20 the quotient is 1 in float64.
def mish(z: Tensor) -> Tensor:
    e = exp(minimum(z, 20.0))
    n = e * (e + 2.0)
    return z * (n / (n + 2.0))


def mish_grad(dy: Tensor, z: Tensor) -> Tensor:
    e = exp(minimum(z, 20.0))
    n = e * (e + 2.0)
    t = select(z > 20.0, 1.0, n / (n + 2.0))  # not a unit less where division is approximate: inf (1 - t²) must be NaN
    return dy * (t + z * sigmoid(z) * (1.0 - t * t))


def hardswish(z: Tensor) -> Tensor:
    return z * minimum(maximum(z + 3.0, 0.0), 6.0) / 6.0


def hardswish_grad(dy: Tensor, z: Tensor) -> Tensor:
    return select(z <= -3.0, 0.0, select(z >= 3.0, dy, dy * (z / 3.0 + 0.5)))


def hardsigmoid(z: Tensor) -> Tensor:
    return minimum(maximum(z + 3.0, 0.0), 6.0) / 6.0


def hardsigmoid_grad(dy: Tensor, z: Tensor) -> Tensor:
    return select(z > -3.0, select(z < 3.0, dy / 6.0, 0.0), 0.0)


def hardsigmoid_grad_from_output(dy: Tensor, y: Tensor) -> Tensor:
    return select(y > 0.0, select(y < 1.0, dy / 6.0, 0.0), 0.0)


def relu2(z: Tensor) -> Tensor:
    return select(z <= 0.0, 0.0, z * z)


def relu2_grad(dy: Tensor, z: Tensor) -> Tensor:
    return select(z <= 0.0, 0.0, dy * (2.0 * z))


def relu2_grad_from_output(dy: Tensor, y: Tensor) -> Tensor:
    return select(y <= 0.0, 0.0, dy * (2.0 * sqrt(select(y <= 0.0, 1.0, y))))
