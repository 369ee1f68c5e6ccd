"""What the tests of blocks whose code is known share: forwards, a Sequential, and what somebody may patch."""

import pytest
import torch
import torch.nn.functional as F
from reading import WIDTH
from torch import nn

PLAIN = "return self.fc2(self.drop(self.act(self.idle(self.fc1(x)))))"
FUNCTION = "return self.fc2(F.gelu(self.fc1(x)))"
ATTRIBUTE = "return self.fc2(self.fn(self.fc1(x)))"
GATED = "return self.fc2(self.act(self.fc1(x)) * self.up(x))"


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def activations_of_transformers():
    pytest.importorskip("transformers", reason="the activations are transformers'")
    import transformers.activations as theirs

    return theirs


def twice(module, args, output):
    return 2 * output


def old_gelu(self, x):
    return 2 * F.gelu(x)


PATCHES = {
    "class's forward": (PLAIN, lambda m: (type(m), "forward", lambda self, x: self.norm.weight[:12] * x)),
    "class attribute": (PLAIN, lambda m: (type(m), "act", staticmethod(torch.tanh))),
    "class attribute of a function": (ATTRIBUTE, lambda m: (type(m), "fn", property(lambda self: torch.tanh))),
    "class finds attributes": (
        PLAIN,
        lambda m: (
            type(m),
            "__getattr__",
            lambda self, name: torch.tanh if name == "act" else nn.Module.__getattr__(self, name),
        ),
    ),
    "activation's __call__": (PLAIN, lambda m: (nn.GELU, "__call__", lambda self, x: 2 * x)),
    "everybody's __call__": (PLAIN, lambda m: (nn.Module, "__call__", lambda self, x: 2 * self.forward(x))),
    "activation's forward": (PLAIN, lambda m: (nn.GELU, "forward", old_gelu)),
    "function of the activation": (PLAIN, lambda m: (F, "gelu", lambda x, approximate: torch.tanh(x))),
    "function in the forward": (FUNCTION, lambda m: (F, "gelu", torch.tanh)),
    "nn.Linear.forward": (PLAIN, lambda m: (nn.Linear, "forward", lambda self, x: x @ self.weight.T)),
    "F.linear": (PLAIN, lambda m: (F, "linear", lambda x, w, b: x @ w.T)),
    "nn.Identity.forward": (PLAIN, lambda m: (nn.Identity, "forward", lambda self, x: 2 * x)),
    "nn.Dropout.forward": (PLAIN, lambda m: (nn.Dropout, "forward", lambda self, x: 2 * x)),
    "F.dropout": (PLAIN, lambda m: (F, "dropout", lambda x, *_: 2 * x)),
}


def stack(*more):
    return nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Dropout(0.0), nn.Linear(20, WIDTH), *more).double()
