"""The dry run of fuse: a pair inside a forward counts where nothing else touches what passes, in every call."""

import copy

import pytest
import torch
from larger import HIDDEN, WIDTH, Layer, Model, X
from torch import Tensor, nn

import fastbp

pytestmark = pytest.mark.usefixtures("seeded")


class Peeking(nn.Module):
    """Something else looks at what passes between."""

    def __init__(self, what):
        super().__init__()
        self.fc1, self.act, self.fc2, self.what = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH), what
        self.fc3, self.other = nn.Linear(HIDDEN, WIDTH), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        z = self.fc1(x)
        if self.what == "scaled":
            z.mul_(2.0)
        if self.what == "scaled by an op":  # which is no torch function
            torch.ops.aten.mul_(z, 2.0)
        h = (self.other if self.what == "another in training" and self.training else self.act)(z)
        if self.what == "z returned":
            return x + self.fc2(h), z
        if self.what == "called again":
            return x + self.fc2(h) + self.fc2(self.act(self.fc1(x * 2)))
        if self.what == "fc2 again":
            return x + self.fc2(h) + self.fc2(x.new_ones(HIDDEN))
        if self.what == "h for two":
            return x + self.fc2(h) + self.fc3(h)
        if self.what == "h returned":
            return x + self.fc2(h), h
        if self.what == "h in place":
            h.mul_(2.0)
        return x + self.fc2(h) * (h.mean() if self.what == "h used" else 1.0)


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("nothing", "mlp, gelu"),
        ("h used", "linear_act, gelu"),
        ("h returned", "linear_act, gelu"),
        ("h in place", "linear_act, gelu"),
        ("h for two", "linear_act, gelu"),
        ("scaled by an op", None),
        ("another in training", None),
        ("fc2 again", "linear_act, gelu"),
        ("z returned", None),
        ("scaled", None),
        ("called again", None),
    ],
)
def test_a_pair_counts_where_nothing_else_touches_what_passes(what, call):
    model = Peeking(what).double()
    stock = copy.deepcopy(model)
    report = fastbp.fuse(model, sample_inputs=X)
    assert [s.what for s in report.fused] == ([] if call is None else [call]), str(report)
    assert call is not None or "computes something else" in report.left[0].reason
    for training in (True, False):
        found, wanted = (m.train(training)(X) for m in (model, stock))
        for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (found, wanted)), strict=True):
            torch.testing.assert_close(a, b)


def test_every_call_of_a_module_must_agree():
    """In one it hands out what passes between, in the other not."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Peeking("nothing")

        def forward(self, x: Tensor) -> Tensor:
            self.layer.what = "nothing"
            x = self.layer(x)
            self.layer.what = "h returned"
            x, h = self.layer(x)
            self.layer.what = "nothing"
            return x + h.mean()

    model = Twice().double()
    stock = copy.deepcopy(model)
    assert fastbp.fuse(model, sample_inputs=X).verified
    torch.testing.assert_close(model(X), stock(X))


def test_a_sample_says_what_it_does_not_reach():
    model = Model().double()
    model.spare = Layer().double()
    report = fastbp.fuse(model, sample_inputs=X)
    assert [s.name for s in report.left] == ["spare"] and "sample_inputs do not reach it" in report.left[0].reason

    class Needs(Layer):
        def forward(self, hidden_states: Tensor, position: int, mask: Tensor) -> tuple[Tensor]:
            return super().forward(hidden_states, mask, scale=float(position))

    (site,) = fastbp.fuse(Needs().double()).sites
    assert site.status == "left" and "pass sample_inputs" in site.reason
