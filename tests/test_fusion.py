"""fuse, unfuse and the report: what is found, and what is left and why."""

import copy

import pytest
import torch
from fusible import BLOCKS, WIDTH, Scaled, Swish, TwoLinears, assert_same_step, sequential, with_child
from torch import Tensor, nn

import fastbp
from fastbp.activations import ROWS, bind
from fastbp.fusion.surgery import is_fused

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("case", BLOCKS)
def test_block_is_found_and_agrees(case):
    make, call = BLOCKS[case]
    model = nn.ModuleDict({"block": make()})["block"]
    stock = copy.deepcopy(model)
    x = torch.randn(3, 5, WIDTH)
    report = fastbp.fuse(model, sample_inputs=x)
    assert [(s.name, s.what, s.status) for s in report.fused] == [("", call, "fused")], str(report)
    assert report.verified is True and max(report.errors.values()) < 1e-5
    assert_same_step(model, stock, x)


@pytest.mark.parametrize("name", [n for n in ROWS if n not in ("identity", "celu")])  # celu(1) is elu(1)
def test_every_activation_is_told_apart_by_values(name):
    class Block(TwoLinears):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(bind(name)(self.fc1(x)))

    (site,) = fastbp.fuse(Block(None), dry_run=True).sites
    assert (site.status, site.what) == ("would fuse", f"mlp, {name}")


def test_fused_block_keeps_half_the_bytes():
    model, x = TwoLinears(nn.GELU(), hidden=64), torch.randn(50, WIDTH)
    kept = []
    for fuse in (False, True):
        if fuse:
            fastbp.fuse(model)
        with fastbp.SavedBytes(exclude=[x, model]) as saved:
            model(x)
        kept.append(saved.total)
    assert kept == [2 * 50 * 64 * 4, 50 * 64 * 4]


class Subclass(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _hooked() -> nn.Module:
    model = TwoLinears(nn.GELU())
    model.fc1.register_forward_hook(lambda m, i, o: o + 1)
    return model


def _own_parameter() -> nn.Module:
    model = Scaled(nn.GELU())
    model.scale = nn.Parameter(torch.ones(1))
    return model


def _own_buffer() -> nn.Module:
    model = Scaled(nn.GELU())
    model.register_buffer("mask", torch.ones(1))
    return model


LEFT = {
    "between linear and activation": (lambda: Scaled(nn.GELU()), "computes something else"),
    "subclass of Linear": (lambda: with_child("fc1", Subclass(WIDTH, 20)), "fc1 is not a plain"),
    "hook": (_hooked, "fc1 is not a plain"),
    "own parameter": (_own_parameter, "computes something else"),
    "own buffer": (_own_buffer, "buffers or tensors of its own"),
    "unknown activation": (lambda: TwoLinears(nn.LogSigmoid()), "LogSigmoid is no activation"),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_with_the_reason_and_unchanged(case):
    make, reason = LEFT[case]
    model = make()
    report = fastbp.fuse(model)
    assert not report.fused and reason in report.left[0].reason, str(report)
    assert not any(is_fused(m) for m in model.modules())


def test_prelu_is_left():
    assert not fastbp.fuse(nn.Sequential(nn.Linear(4, 4), nn.PReLU(), nn.Linear(4, 4))).fused
    assert not fastbp.fuse(TwoLinears(nn.PReLU())).fused


def test_sequential_runs():
    model, x = sequential(), torch.randn(7, WIDTH)
    stock = copy.deepcopy(model)
    report = fastbp.fuse(model, sample_inputs=x)
    assert [(s.kind, s.what) for s in report.fused] == [
        ("Sequential [1:5]", "mlp, gelu"),
        ("Sequential [6:9]", "mlp, silu"),
        ("Sequential [11:13]", "mlp, tanh"),
    ], str(report)
    assert_same_step(model, stock, x)


def test_a_child_that_stands_in_a_sequential_twice_runs_twice():
    linear, relu, swish = nn.Linear(WIDTH, WIDTH), nn.ReLU(), Swish()
    model = nn.Sequential(
        linear, relu, nn.Linear(WIDTH, WIDTH), relu, nn.LayerNorm(WIDTH), linear, swish, linear, swish
    )
    stock, x = copy.deepcopy(model), torch.randn(7, WIDTH)
    report = fastbp.fuse(model)
    assert [s.kind for s in report.fused] == ["Sequential [0:2]", "Sequential [5:7]"], str(report)
    assert_same_step(model, stock, x)


def test_sequential_follows_its_children():
    """Appended, replaced and hooked children are seen by the next call."""
    model, x = sequential(), torch.randn(7, WIDTH)
    fastbp.fuse(model)
    model.append(nn.ReLU())
    model[2] = nn.Tanh()
    model[5] = Subclass(18, WIDTH)
    calls = []
    model[10].register_forward_hook(lambda m, i, o: calls.append(1))
    model[7] = nn.Sigmoid()
    stock = nn.Sequential(*model)
    assert_same_step(model, stock, x)
    assert len(calls) == 2


def test_linears_of_a_sequential_that_are_not_plain_are_named():
    model = sequential()
    model[1], model[9] = Subclass(WIDTH, 16), nn.Sequential(model[9])  # the second says nothing of its own
    model[6].register_forward_hook(lambda m, i, o: o + 1)
    report = fastbp.fuse(model, sample_inputs=torch.randn(7, WIDTH))
    assert [(s.kind, s.what) for s in report.fused] == [
        ("Sequential [3:5]", "mlp, gelu"),
        ("Sequential [11:13]", "mlp, tanh"),
    ], str(report)
    assert [s.reason.split(" is not")[0] for s in report.left] == ["1, 6"]
    fastbp.unfuse(model)
    reasons = [s.reason.split(" is not")[0] for s in fastbp.fuse(model, filter_fn=lambda module, name: False).left]
    assert reasons == ["filter_fn said no", "filter_fn said no", "1, 6"]
    with pytest.raises(RuntimeError, match=r"(?s)strict, and not.*1, 6 is not a plain nn.Linear"):
        fastbp.fuse(model, strict=True)
    assert len(fastbp.fuse(nn.Sequential(Subclass(4, 4), nn.ReLU())).left) == 1


def test_sequential_subclass_with_its_own_forward_is_left():
    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = Doubled(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    (site,) = fastbp.fuse(model).sites
    assert site.status == "left" and "a forward of its own" in site.reason


@pytest.mark.parametrize("change", ["hook", "subclass", "activation", "dropout", "keyword", "activation hook"])
def test_block_runs_its_own_forward_when_it_changed(change):
    model, x = TwoLinears(nn.LeakyReLU(0.1), dropout=0.0), torch.randn(4, WIDTH)
    fastbp.fuse(model)
    stock = TwoLinears(nn.LeakyReLU(0.1), dropout=0.0)
    stock.load_state_dict(model.state_dict())
    calls = []
    for m in (model, stock):
        if change == "hook":
            m.fc1.register_forward_hook(lambda module, i, o: o * 3)
        elif change == "subclass":
            m.fc2 = Subclass(20, WIDTH)
        elif change == "activation":
            m.act.negative_slope = 0.7
        elif change == "dropout":
            m.dropout.p = 0.5
        elif change == "activation hook":
            m.act.register_forward_hook(lambda module, i, o: calls.append(o))
    if change == "subclass":
        stock.fc2.load_state_dict(model.fc2.state_dict())
    results = []
    for m in (model, stock):
        torch.manual_seed(1)
        results.append(m(x=x) if change == "keyword" else m(x))
    torch.testing.assert_close(*results)
    assert change != "activation hook" or len(calls) == 2
