"""Each module beside the PyTorch module it replaces, made from one seed, and how the two are compared."""

import io
import pickle

import torch
import torch.nn.functional as F
from support import assert_close, each
from torch import nn

import fastbp

K, H, OUT = 5, 7, 3


class StockLinearAct(nn.Linear):
    activation = nn.GELU()

    def forward(self, input):
        return self.activation(super().forward(input))


class StockGated(nn.Module):
    """gate and up, and down where ``out`` is given: the feed-forward block as Llama writes it."""

    def __init__(self, size, hidden, out=None, bias=True, device=None, dtype=None):
        super().__init__()
        options = dict(bias=bias, device=device, dtype=dtype)
        self.gate_proj = nn.Linear(size, hidden, **options)
        self.up_proj = nn.Linear(size, hidden, **options)
        self.down_proj = nn.Identity() if out is None else nn.Linear(hidden, out, **options)

    def forward(self, input):
        return self.down_proj(F.silu(self.gate_proj(input)) * self.up_proj(input))


class StockMLP(nn.Module):
    def __init__(self, size, hidden, out, bias=True, device=None, dtype=None):
        super().__init__()
        self.fc1 = nn.Linear(size, hidden, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, bias=bias, device=device, dtype=dtype)

    def forward(self, input):
        return self.fc2(F.gelu(self.fc1(input)))


# Each module with the one it replaces; both take nn.Linear's options.
PAIRS = {
    "Linear": (lambda **o: fastbp.Linear(K, OUT, **o), lambda **o: nn.Linear(K, OUT, **o)),
    "LinearAct": (lambda **o: fastbp.LinearAct(K, OUT, **o), lambda **o: StockLinearAct(K, OUT, **o)),
    "GatedLinear": (lambda **o: fastbp.GatedLinear(K, OUT, **o), lambda **o: StockGated(K, OUT, **o)),
    "MLP": (lambda **o: fastbp.MLP(K, H, OUT, **o), lambda **o: StockMLP(K, H, OUT, **o)),
    "GatedMLP": (
        lambda **o: fastbp.GatedMLP(K, H, OUT, **{"bias": True} | o),
        lambda **o: StockGated(K, H, OUT, **{"bias": True} | o),
    ),
}
BLOCKS = {name: PAIRS[name] for name in ("GatedLinear", "MLP", "GatedMLP")}
each_pair = each("name", PAIRS)


def make(name, **options):
    """Ours and the stock module, each made from the same seed."""
    made = []
    for constructor in PAIRS[name]:
        torch.manual_seed(3)
        made.append(constructor(**options))
    return made


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def run(module, x):
    """Output, and gradients of the input and of every parameter, by name."""
    x = x.detach().clone().requires_grad_()
    y = module(x)
    parameters = dict(module.named_parameters())
    dy = draw(*y.shape, dtype=y.dtype, seed=1)
    grads = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return {"y": y} | dict(zip(["x", *parameters], grads, strict=True))


def assert_same_run(ours, theirs, x):
    mine, expected = run(ours, x), run(theirs, x)
    assert mine.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(mine[key], value, msg=lambda text, key=key: f"{key}: {text}")


def assert_equal_states(mine, expected):
    """The same keys in the same order, the same bits."""
    assert list(mine) == list(expected)
    for key, value in expected.items():
        assert torch.equal(mine[key], value), key


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def through_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))
