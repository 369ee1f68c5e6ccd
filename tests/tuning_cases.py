"""What the tests of tuning share: problems, a cache of their own, and choices put into it."""

import pytest
import torch

from fastbp import backends
from fastbp.backends import native

CPU = torch.device("cpu")
KEYS = {
    "linear_act": "linear_act 6x8x16 gelu float32 preact",
    "gated_linear_act": "gated_linear_act 6x8x16 silu bfloat16 preact",
    "mlp": "mlp 6x8x16x4 relu float32 output",
    "gated_mlp": "gated_mlp 6x8x16x4 silu float32 recompute",
    "act_linear": "act_linear 6x8x16 gelu float32 preact",
    "gated_act_linear": "gated_act_linear 6x8x16 silu bfloat16 preact",
}
with_native = pytest.mark.skipif(native.unavailable is not None, reason=f"native: {native.unavailable}")


def put(key, fastest, **entry):
    backends.remember(CPU, key, {"fastest": fastest} | entry)


def spoiling(name, spoil, result):
    """A backend that computes as the reference does, and then spoils its output, or the gradient of x."""
    right = backends.BACKENDS["reference"]

    def forward(config, x, tensors):
        y, *kept = right.forward(config, x, tensors)
        if result == "output":
            spoil(y)
        return [y, *kept]

    def backward(*arguments, **options):
        grads = right.backward(*arguments, **options)
        if result == "gradient":
            spoil(grads[0])
        return grads

    module = type(backends)(name)
    module.__dict__.update(vars(right), forward=forward, backward=backward)
    return module
