"""fuse: one linear and its activation, gate and up in one linear, dropouts and norms in the chain, other linears."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fusible import (
    WIDTH,
    Chain,
    Dense,
    Gated,
    Own,
    Packed,
    Swish,
    Transposed,
    TwoLinears,
    assert_same_step,
    assert_same_training,
    two,
)  # fmt: skip
from torch import Tensor, nn

import fastbp
from fastbp import functional

pytestmark = pytest.mark.usefixtures("seeded")


def _shared() -> nn.Module:
    model = TwoLinears(nn.Tanh(), hidden=WIDTH)
    model.fc2 = model.fc1
    return model


def _tied() -> nn.Module:
    model = TwoLinears(nn.Tanh(), hidden=WIDTH)
    model.fc2.weight = model.fc1.weight
    return model


class Quiet(nn.Module):
    """The activation is a function in the forward of a module of one linear."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(self.fc(x))


class Again(TwoLinears):
    """One dropout, called before and between; the activation is written."""

    def __init__(self):
        super().__init__(None, dropout=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(torch.tanh(self.fc1(self.dropout(x)))))


CASES = {
    "one dropout twice": (Again, "mlp, tanh"),
    "dense/act": (Dense, "linear_act, gelu"),
    "dense/act/norm": (lambda: Dense(nn.LayerNorm(20)), "linear_act, gelu"),
    "one linear, written": (Quiet, "linear_act, mish"),
    "dropout between": (lambda: Chain(between=nn.Dropout(0.4)), "mlp, gelu"),
    "norm between": (lambda: Chain(between=nn.LayerNorm(20)), "linear_act, gelu"),
    "all around": (lambda: Chain(nn.LayerNorm(WIDTH), nn.Dropout(0.4), nn.Dropout(0.2)), "mlp, gelu"),
    "transposed weights": (lambda: two(lambda i, o: Transposed(o, i)), "mlp, gelu"),
    "linears of their own": (lambda: two(Own), "mlp, gelu"),
    "one linear twice": (_shared, "mlp, tanh"),
    "two linears with one weight": (_tied, "mlp, tanh"),
    "gated, no down": (lambda: Packed(False, True, down=False), "gated_linear_act, silu"),
    "hidden half as wide as the input": (lambda: Packed(False, True, width=32, hidden=16), "gated_mlp, silu"),
} | {
    f"packed, {'interleaved' if i else 'halves'}, gate {'first' if g else 'last'}, {bias=}": (
        lambda i=i, g=g, bias=bias: Packed(i, g, bias=bias),
        "gated_mlp, silu",
    )
    for i in (False, True)
    for g in (False, True)
    for bias in (False, True)
}


@pytest.mark.parametrize("case", CASES)
def test_chain_is_found_and_agrees(case):
    make, call = CASES[case]
    model = make().double()
    stock = copy.deepcopy(model)
    linear = next(m for m in model.modules() if isinstance(m, (nn.Linear, Transposed)))
    width = linear.weight.shape[0 if isinstance(linear, Transposed) else 1]
    x = torch.randn(3, 5, width, dtype=torch.float64)
    report = fastbp.fuse(model, sample_inputs=x)
    assert [(s.what, s.status) for s in report.fused] == [(call, "fused")] and report.verified, str(report)
    assert_same_training(model, stock, x)
    assert fastbp.unfuse(model) == [""] and type(model) is type(stock)


def test_bytes_with_a_dropout_between():
    """Evaluating, where it drops nothing, the block is one call and keeps z alone; training it is two."""
    rows, hidden = 50, 20
    model, x = Chain(between=nn.Dropout(0.4)), torch.randn(rows, WIDTH)
    fastbp.fuse(model)
    kept = []
    for training in (False, True):
        model.train(training)
        with fastbp.SavedBytes(exclude=[x, model]) as saved:
            model(x)
        kept.append(saved.total)
    assert kept[0] == rows * hidden * 4 < kept[1]


class Functional(TwoLinears):
    """Drops by a function."""

    def __init__(self, p):
        super().__init__(nn.GELU())
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc2(self.act(self.fc1(x))), self.p, self.training)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_by_a_function_goes_on_dropping(p):
    model = Functional(p).double()
    stock, x = copy.deepcopy(model), torch.randn(6, WIDTH, dtype=torch.float64)
    assert [s.what for s in fastbp.fuse(model, sample_inputs=x).fused] == ["mlp, gelu"]
    assert_same_training(model, stock, x)
    for m in (model, stock):
        m.p = 0.6
    assert_same_training(model, stock, x)


@pytest.mark.parametrize("make", [lambda: TwoLinears(nn.GELU()), lambda: nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh())])
def test_the_argument_by_its_name(make, monkeypatch):
    model, x, calls = make(), torch.randn(4, WIDTH), []
    fastbp.fuse(model)
    name, call = "input" if isinstance(model, nn.Sequential) else "x", functional.call
    monkeypatch.setattr(functional, "call", lambda *args, **kwargs: calls.append(1) or call(*args, **kwargs))
    assert torch.equal(model(**{name: x}), model(x)) and len(calls) == 2
    with pytest.raises(TypeError):
        model(**{"another": x})


@pytest.mark.parametrize("training", [True, False])
def test_finding_leaves_modes_and_state_alone(training):
    model = nn.ModuleDict({"a": Packed(False, True), "b": TwoLinears(Swish(), dropout=0.1), "c": Gated()}).train(
        training
    )
    model["b"].act.eval()
    before = {n: (m.training, list(m._modules), len(m._forward_hooks)) for n, m in model.named_modules()}
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert len(fastbp.fuse(model).fused) == 3
    assert before == {n: (m.training, list(m._modules), len(m._forward_hooks)) for n, m in model.named_modules()}
    assert all(torch.equal(a, model.state_dict()[k]) for k, a in state.items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_sequential_with_dropouts_between():
    """As torchvision's MLP: all one call where they are idle, else up to the next that drops."""
    a, b, c = nn.Linear(WIDTH, 16), nn.Linear(16, 18), nn.Linear(18, 5)
    model = nn.Sequential(a, nn.GELU(), nn.Dropout(0.3), b, nn.GELU(), nn.Dropout(0.2), c).double()
    stock, x = copy.deepcopy(model), torch.randn(7, WIDTH, dtype=torch.float64)
    assert [(s.kind, s.what) for s in fastbp.fuse(model).fused] == [("Sequential [0:6]", "mlp, gelu")]
    assert_same_training(model, stock, x)
    model.eval()
    with fastbp.SavedBytes(exclude=[x, model]) as saved:
        model(x)
    assert saved.total == 7 * (16 + 18) * 8
    assert_same_step(model, stock.eval(), x)
