"""8-bit training and 8-bit weights by torchao beside fused blocks."""

import pytest
import torch
from fusible import WIDTH
from precision_cases import batch, fused_model, stock_model
from support import each, like
from torch import nn

import fastbp

F32 = torch.float32


@pytest.fixture(scope="module")
def torchao():
    found = pytest.importorskip("torchao", reason="torchao is not installed")
    pytest.importorskip("torchao.float8", reason="this torchao has no float8 training")
    return found


def to_float8(model, only=""):
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=not torch.cuda.is_available())
    return convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name.startswith(only))


def to_int8(model, only=""):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def wanted(module, name):
        return isinstance(module, nn.Linear) and name.startswith(only)

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=wanted)
    return model


EIGHT_BITS = {"float8": to_float8, "int8": to_int8}


def step(model):
    """Output and the gradients of x and of what is trained."""
    x = batch(0, F32)[0].requires_grad_()
    y = model(x)
    return [y, *torch.autograd.grad(y, [x, *(p for p in model.parameters() if p.requires_grad)], like(y, 23))]


def assert_equal_steps(mine, theirs):
    found, expected = step(mine), step(theirs)
    assert len(found) > 2
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_blocks_of_eight_bits_are_left_alone(kind):
    """Converted, then fused: the others are fused, and what torchao computes stays as it is."""
    model, stock = (EIGHT_BITS[kind](stock_model(), only="0") for _ in range(2))
    report = fastbp.fuse(model)
    assert {site.name for site in report.fused} == {"1", "2"}
    assert_equal_steps(model[0], stock[0])
    for mine, theirs in zip(step(model), step(stock), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("kind", EIGHT_BITS)
@each("inside", [False, True])
def test_a_fused_block_that_is_converted_computes_what_torchao_does(kind, inside):
    """Fused, then converted; under autocast too."""
    model, stock, plain = EIGHT_BITS[kind](fused_model()), EIGHT_BITS[kind](stock_model()), stock_model()
    with torch.autocast("cpu", enabled=inside):
        assert_equal_steps(model, stock)
        assert not torch.equal(step(model)[0], step(plain)[0]), "nothing was converted"


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_fastbps_modules_that_are_converted(kind):
    """The linears of a block are converted and called as they are; LinearAct is no nn.Linear, and stays."""

    def make():
        torch.manual_seed(7)
        return nn.Sequential(
            fastbp.LinearAct(WIDTH, WIDTH),
            fastbp.MLP(WIDTH, 16, activation="relu"),
            fastbp.GatedMLP(WIDTH, 16, bias=True, activation="relu"),
        )

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make()

        def forward(self, x):
            layer, block, gated = self.inner
            h = block.fc2(block.fc1(layer(x)).relu())
            return gated.down_proj(gated.gate_proj(h).relu() * gated.up_proj(h))

    model, plain = EIGHT_BITS[kind](make()), EIGHT_BITS[kind](Plain())
    assert type(model[0]) is fastbp.LinearAct and type(model[0].weight) is nn.Parameter
    assert_equal_steps(model, plain)
