"""Linears that transformers has in nn.Linear's place: Conv1D and FalconLinear, by their exact classes."""

import copy
import importlib
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision_ops
from torch import Tensor, nn

import fastbp
from fastbp import readers
from fastbp.fusion.surgery import is_fused
from fastbp.linear import of_any_size
from fastbp.readers import reads

pytestmark = pytest.mark.usefixtures("seeded")

WIDTH = 6
CLASSES = {"Conv1D": "transformers.pytorch_utils", "FalconLinear": "transformers.models.falcon.modeling_falcon"}


class Block(nn.Module):
    """An MLP with more in its forward than a fused call."""

    def __init__(self, kind, bias=True) -> None:
        super().__init__()
        if kind.__name__ == "Conv1D":  # out, in
            self.fc, self.proj = kind(4 * WIDTH, WIDTH), kind(WIDTH, 4 * WIDTH)
        else:
            self.fc, self.proj = kind(WIDTH, 4 * WIDTH, bias=bias), kind(4 * WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.fc(x), approximate="tanh")
        self.seen = h.detach().mean()
        return self.proj(h)


@pytest.fixture(params=CLASSES)
def kind(request):
    pytest.importorskip("transformers")
    torchvision_ops.declare()
    return getattr(importlib.import_module(CLASSES[request.param]), request.param)


def step(model, x):
    """Bytes kept, output and gradients."""
    with of_any_size(), fastbp.SavedBytes(exclude=[x, model]) as saved:
        y = model(x)
    return saved.total, y, torch.autograd.grad(y.float().square().sum(), list(model.parameters()))


def assert_as(model, stock, x):
    (_, y, grads), (_, expected, theirs) = step(model, x), step(stock, x)
    assert y.dtype is expected.dtype and torch.equal(y, expected)
    for a, b in zip(grads, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(5, WIDTH), (2, 3, WIDTH)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_half_is_kept_and_all_else_is_equal(kind, shape, bias):
    stock = Block(kind, bias)
    model = copy.deepcopy(stock)
    assert fastbp.fuse(model).linears == 2
    x = torch.randn(shape)
    assert_as(model, stock, x)
    assert step(stock, x)[0] - step(model, x)[0] == 4 * 4 * x.numel()
    assert [(s.name, s.status, s.what) for s in fastbp.report(model).sites] == [
        ("proj", "fused", "act_linear, gelu_tanh")
    ]
    assert isinstance(copy.deepcopy(model).proj, kind) and reads(copy.deepcopy(model).proj)
    assert type(pickle.loads(pickle.dumps(model.proj))) is kind
    fastbp.unfuse(model)
    assert type(model.proj) is kind


def test_under_autocast(kind):
    """FalconLinear's sum with a bias in float32 is in float32 there."""
    stock = Block(kind)
    model = copy.deepcopy(stock)
    fastbp.fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_as(model, stock, torch.randn(5, WIDTH))


@pytest.mark.parametrize("when", ["before fuse", "after fuse"])
def test_a_patched_forward_is_called(kind, when, monkeypatch):
    theirs = kind.forward
    stock = Block(kind)
    model = copy.deepcopy(stock)
    if when == "after fuse":
        fastbp.fuse(model)
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * theirs(self, x))
    if when == "before fuse":
        readers._foreign_reader.cache_clear()  # as in a process that has fused none before
        fastbp.fuse(model)
    assert_as(model, stock, torch.randn(5, WIDTH))
    monkeypatch.undo()
    assert_as(model, stock, torch.randn(5, WIDTH))
    fastbp.unfuse(model)
    assert not any(map(is_fused, model.modules())) and type(model.proj) is kind


def test_a_subclass_is_left(kind):
    class Mine(kind):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    stock = Block(kind)
    stock.proj.__class__ = Mine
    model = copy.deepcopy(stock)
    fastbp.fuse(model)
    assert type(model.proj) is Mine
    assert_as(model, stock, torch.randn(5, WIDTH))


def test_under_fp8(kind):
    """The weight of a call may be a view of the parameter; that is no reader of h."""
    model = Block(kind)
    fastbp.fuse(model, save="fp8")
    x = torch.randn(64, WIDTH)
    with of_any_size(), fastbp.SavedBytes(exclude=[x, model]) as saved:
        y = model(x)
    assert saved.total == pytest.approx(64 * 4 * WIDTH, rel=0.1) and y.requires_grad
