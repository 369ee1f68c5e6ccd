"""Copies and pickles of fused linears; transformers' Conv1D."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastbp
from fastbp.fusion.surgery import is_fused
from fastbp.linear import OUTCOME, SETTINGS, of_any_size
from fastbp.readers import reads

WIDTH = 12
pytestmark = pytest.mark.usefixtures("seeded")


def fused_net(**options) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH), nn.LayerNorm(WIDTH))
    fastbp.fuse(model, **options)
    with of_any_size():
        model(torch.randn(2, WIDTH)).sum().backward()
    return model


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_read_and_are_apart(how):
    model = fused_net(save="fp8")
    twin = COPIES[how](model)
    assert is_fused(twin) and reads(twin[0]) and reads(twin[2])
    assert twin[0].__dict__[SETTINGS] == ("fp8", None)
    x = torch.randn(4, WIDTH)
    assert torch.equal(twin(x), model(x))
    if how != "copy":
        with torch.no_grad():
            model[0].weight.add_(1.0)
        assert not torch.equal(twin(x), model(x))
    fastbp.unfuse(twin)
    assert reads(model[0]) == (how != "copy") and type(twin[0]) is nn.Linear


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy])
def test_a_copied_linear(how):
    layer = nn.Linear(WIDTH, WIDTH)
    fastbp.fuse(layer)
    with of_any_size():
        layer(F.silu(torch.randn(3, WIDTH, requires_grad=True)))
    twin = how(layer)
    assert type(twin) is type(layer) and OUTCOME not in twin.__dict__
    assert (twin.weight is layer.weight) == (how is copy.copy)
    by_hand = fastbp.Linear(WIDTH, WIDTH)
    assert type(how(by_hand)) is fastbp.Linear


def test_pickles_are_those_of_the_model_that_came():
    model = fused_net()
    stock = copy.deepcopy(model)
    fastbp.unfuse(stock)
    for module in (stock, model):
        for p in module.parameters():
            p.grad = None
    loaded = pickle.loads(pickle.dumps(model))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in stock.modules()]
    assert not any(name.startswith("_fastbp") for m in loaded.modules() for name in m.__dict__)
    assert type(model[0]) is not nn.Linear and reads(model[0])  # saving changes nothing
    x = torch.randn(3, WIDTH)
    assert torch.equal(loaded(x), stock(x))


def test_pickles_load_without_fastbp():
    buffer = io.BytesIO()
    torch.save(fused_net(), buffer)
    program = (
        "import io, sys, torch; sys.modules['fastbp'] = None\n"
        "model = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)\n"
        "print([type(m).__name__ for m in model])"
    )
    run = subprocess.run([sys.executable, "-c", program], input=buffer.getvalue(), capture_output=True, check=True)
    assert run.stdout.decode().strip() == "['Linear', 'GELU', 'Linear', 'LayerNorm']"


def test_weights_only():
    """A whole model, with the classes allowed that the model which came would need."""
    buffer = io.BytesIO()
    torch.save(fused_net(), buffer)
    buffer.seek(0)
    allowed = [nn.Sequential, nn.Linear, nn.GELU, nn.LayerNorm, set]
    with torch.serialization.safe_globals(allowed):
        loaded = torch.load(buffer, weights_only=True)
    assert type(loaded[0]) is nn.Linear
    state = io.BytesIO()
    torch.save(fused_net().state_dict(), state)
    state.seek(0)
    fastbp.Linear(WIDTH, 16).load_state_dict(
        {k.removeprefix("0."): v for k, v in torch.load(state, weights_only=True).items() if k.startswith("0.")}
    )


def test_own_state_is_honoured():
    """A linear as attribute of what has __getstate__ of its own."""

    model = Holder()
    fastbp.fuse(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded.lost is None and type(loaded.fc) is nn.Linear
    twin = copy.deepcopy(model)
    assert twin.lost is None and reads(twin.fc)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lost = nn.Linear(WIDTH, WIDTH), "handle"

    def __getstate__(self):
        return {**self.__dict__, "lost": None}


def derived(module, factor):
    """The module as somebody's own class that was made of its class since."""
    kind = type(module)
    module.__class__ = type("Mine", (kind,), {"forward": lambda self, x: kind.forward(self, x) * factor})


@pytest.mark.parametrize("name", ["linear", "sequential"])
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_class_that_was_derived_since_is_copied_as_it_is(name, how):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
    model = block if name == "sequential" else nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6))
    fastbp.fuse(model)
    module, x = (model, torch.randn(3, 6)) if name == "sequential" else (model[1], torch.randn(3, 6))
    derived(module, 5)
    copied = how(module)
    assert type(copied) is type(module)
    torch.testing.assert_close(copied(x), module(x))


def test_parametrized_after_fuse_and_copied():
    """As AveragedModel does it; parametrize makes a class of its own, and takes the methods of ours for the user's."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)), torch.randn(3, 6)
    fastbp.fuse(model)
    nn.utils.parametrizations.weight_norm(model[1])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.testing.assert_close(averaged(x), model(x))
    with torch.no_grad():
        model[1].parametrizations.weight.original0.mul_(2)
    assert not torch.allclose(averaged(x), model(x))
