"""A layer under autocast on the CPU, and the casts that are counted."""

import torch
from support import call, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from fastbp.activations import bind
from fastbp.forms import LINEAR_ACT

RELU = bind("relu")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Casts(TorchDispatchMode):
    """How many there were, forward and backward."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        copies = func is torch.ops.aten._to_copy.default
        self.count += copies or (func is torch.ops.aten.to.dtype and result is not args[0])  # as inference mode has it
        return result


def region(dtype=BF16, **options):
    return torch.autocast("cpu", dtype, **options)


def linear(x, weight, bias):
    return call(LINEAR_ACT, x, [weight], [bias], activation="identity")


def layer(seed=0):
    """A layer's input, weight and bias; the input takes no gradient."""
    x, (weight,), (bias,) = tensors(LINEAR_ACT, F32, seed=seed)
    return x.detach(), weight, bias
