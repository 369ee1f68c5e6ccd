"""A fused chain looks at each call whether it still is what it was when it was fused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fusible import WIDTH, Chain, Own, TwoLinears, two
from torch import Tensor, nn

import fastbp
from fastbp.fusion.surgery import is_fused

pytestmark = pytest.mark.usefixtures("seeded")


class Configured(TwoLinears):
    """Reads a number and a function from its attributes."""

    def __init__(self):
        super().__init__(F.silu)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x))) * self.scale


@pytest.mark.parametrize("change", ["number", "function", "of a linear", "dtype of one", "child"])
def test_what_changes_later_is_seen(change):
    model = {"of a linear": lambda: two(Own), "child": lambda: Chain(between=nn.Dropout(0.0))}.get(change, Configured)()
    x = torch.randn(4, WIDTH)
    assert fastbp.fuse(model).fused
    stock = copy.deepcopy(model)
    fastbp.unfuse(stock)
    for m in (model, stock):
        if change == "number":
            m.scale = 3.0
        elif change == "function":
            m.act = torch.tanh
        elif change == "of a linear":
            m.fc1.scale = 2.0
        elif change == "child":
            m.between = nn.Softmax(-1)
        else:
            m.fc2.double()
            m.fc2.register_forward_pre_hook(lambda _, args: args[0].double())
    assert is_fused(model)
    torch.testing.assert_close(model(x), stock(x))


def test_weights_of_two_dtypes_are_the_modules_own_affair():
    """As in a T5 whose last weight is kept in float32."""

    class Casting(TwoLinears):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(x)).to(self.fc2.weight.dtype))

    model = Casting(nn.ReLU())
    stock, x = copy.deepcopy(model), torch.randn(4, WIDTH)
    assert fastbp.fuse(model).fused
    for m in (model, stock):
        m.fc1.bfloat16()
    assert torch.equal(model(x.bfloat16()), stock(x.bfloat16())) and model(x.bfloat16()).dtype is torch.float32


@pytest.mark.parametrize("where", ["dropout between", "identity behind", "linear of its own"])
def test_a_hook_that_is_set_later_runs(where):
    """Also one on a child that hands on what it gets, and that a fused call passes over."""
    model = {
        "dropout between": lambda: Chain(between=nn.Dropout(0.0)),
        "identity behind": lambda: Chain(after=nn.Identity()),
        "linear of its own": lambda: two(Own),
    }[where]()
    stock, x = copy.deepcopy(model), torch.randn(4, WIDTH)
    assert fastbp.fuse(model).fused
    for m in (model, stock):
        child = {"dropout between": m.between, "identity behind": m.after}.get(where) if where[0] != "l" else m.fc1
        child.register_forward_hook(lambda module, args, output: output * 3)
    torch.testing.assert_close(model(x), stock(x))


def test_a_norm_between_that_is_taken_away():
    model = Chain(between=nn.LayerNorm(20))
    stock, x = copy.deepcopy(model), torch.randn(4, WIDTH)
    fastbp.fuse(model)
    for m in (model, stock):
        m.between = nn.Identity()
    torch.testing.assert_close(model(x), stock(x))
