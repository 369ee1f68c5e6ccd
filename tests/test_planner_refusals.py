"""What plan_memory refuses, and in which words."""

import pytest
import torch
import torch.nn.functional as F
from planned_models import Chain, NoGradInside, least
from torch import nn

import fastbp

REFUSED = [
    (0.0, "fraction"), (1.5, "above 0 and at most 1"), (-0.5, "fraction"), (float("nan"), "fraction"),
    (-3, "0 bytes or more"),
]  # fmt: skip


@pytest.mark.parametrize(("budget", "words"), REFUSED)
def test_budgets_out_of_range(budget, words):
    with pytest.raises(ValueError, match=words):
        fastbp.plan_memory(fastbp.MLP(4, 8), torch.randn(2, 4), budget)


def test_refusals():
    model, x = fastbp.MLP(4, 8), torch.randn(2, 4)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fastbp.plan_memory(F.gelu, x, 1.0)
    for budget in (True, "1 GiB", None):
        with pytest.raises(TypeError, match="bytes"):
            fastbp.plan_memory(model, x, budget)
    with pytest.raises(ValueError, match="nothing that fuse can fuse"):
        fastbp.plan_memory(nn.Linear(4, 4), x, 1.0)
    with pytest.raises(ValueError, match="does not run with sample_inputs"):
        fastbp.plan_memory(model, torch.randn(2, 5), 1.0)
    with pytest.raises(ValueError, match="does not run with sample_inputs"):
        fastbp.plan_memory(model, {"nonsense": x}, 1.0)
    with torch.no_grad(), pytest.raises(ValueError, match="no_grad"):
        fastbp.plan_memory(model, x, 1.0)
    with pytest.raises(ValueError, match="no output of the model requires a gradient"):
        fastbp.plan_memory(fastbp.MLP(4, 8).requires_grad_(False), x, 1.0)
    with pytest.raises(ValueError, match="no output of the model requires a gradient"):
        fastbp.plan_memory(NoGradInside(), x, 1.0)
    with pytest.raises(ValueError, match="compile it then"):
        fastbp.plan_memory(torch.compile(model, backend="eager"), x, 1.0)
    assert model.save == "auto"


def test_what_left_the_reasons_of_fuse_are_passed_on():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"(?s)nothing that fuse can fuse.*filter_fn said no"):
        fastbp.plan_memory(model, torch.randn(2, 4), 1.0, filter_fn=lambda module, name: False)


def test_models_of_which_no_two_runs_are_equal():
    class Unsteady(Chain):
        runs = 0

        def forward(self, x):
            self.runs += 1
            return super().forward(x).exp() if self.runs % 2 else super().forward(x)

    model = Unsteady()
    with pytest.raises(ValueError, match="something else in every run"):
        fastbp.plan_memory(model, torch.randn(4, 16), 1.0)
    assert [layer.save for layer in model.layers] == ["auto"] * len(model.layers)


def test_gradients_inside_the_forward():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = fastbp.MLP(4, 8)

        def forward(self, x):
            y = self.block(x.requires_grad_())
            return y + torch.autograd.grad(y.sum(), x, create_graph=True)[0]

    with pytest.raises(ValueError, match="takes gradients inside its forward"):
        fastbp.plan_memory(Inner(), torch.randn(2, 4), 1.0)


def test_a_plan_that_does_not_hold_is_never_handed_out():
    """What is kept beside the layers may not depend on their policies; here it does."""

    class Sly(Chain):
        def forward(self, x):
            y = super().forward(x)
            return y.exp() if self.layers[3].save == "recompute" else y

    model, sample = Sly(), torch.randn(4, 16)
    with pytest.raises(AssertionError, match=r"predicted .* measured"):
        least(model, sample)
    assert [layer.save for layer in model.layers] == ["auto"] * 4
