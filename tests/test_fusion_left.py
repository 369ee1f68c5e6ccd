"""fuse: what is left, and what is no block and not mentioned."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fusible import WIDTH, Own, TwoLinears, assert_same_training, two
from torch import Tensor, nn

import fastbp

pytestmark = pytest.mark.usefixtures("seeded")


def test_a_linear_that_trains_otherwise_is_left():
    class Noisy(Own):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if self.training else 1.0)

    for training in (True, False):
        report = fastbp.fuse(two(Noisy).train(training))
        assert not report.fused and "fc1, fc2 is not a plain" in report.left[0].reason


class Otherwise(TwoLinears):
    """Twice as much in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.training else 2 * y


class Factor(nn.Module):
    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return x * factor


class Given(TwoLinears):
    """A child gets more than the tensor."""

    def __init__(self, keyword):
        super().__init__(nn.GELU())
        self.keyword, self.behind = keyword, Factor()

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.behind(y, factor=3.0) if self.keyword else self.behind(y, 3.0)


class Plus(TwoLinears):
    """The gradients are those of a chain."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


class Detached(TwoLinears):
    """The values are those of a chain."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)).detach()) + 0 * (self.fc1.weight.sum() + self.fc1.bias.sum())


class Held(TwoLinears):
    """A tensor among the attributes, which is 1 now."""

    def __init__(self):
        super().__init__(nn.GELU())
        self.scale = torch.ones((), dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@pytest.mark.parametrize(
    "make",
    [
        lambda: Otherwise(nn.GELU()),
        lambda: Given(True),
        lambda: Given(False),
        Held,
        lambda: Plus(nn.GELU()),
        lambda: Detached(nn.GELU()),
    ],
)
def test_what_is_nearly_a_chain_goes_on_as_it_was(make):
    """Of these the pair inside may run fused."""
    model, x = make().double(), torch.randn(4, WIDTH, dtype=torch.float64)
    stock = copy.deepcopy(model)
    fastbp.fuse(model)
    assert_same_training(model, stock, x)
    for m in (model, stock):
        if hasattr(m, "scale"):
            m.scale.fill_(3.0)
    assert_same_training(model, stock, x)


def test_attention_is_no_block_and_not_mentioned():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.q_norm, self.drop = nn.Identity(), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.drop(self.proj(F.scaled_dot_product_attention(self.q_norm(q), k, v)))

    assert fastbp.fuse(Attention()).sites == []


@pytest.mark.parametrize("act", [nn.SiLU(), None])
def test_experts_with_deep_weights_are_named(act):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(2, 8, 4)), nn.Parameter(torch.randn(2, 4, 4))
            self.act_fn = act

    class Embeddings(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls_token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 9, 4))

    (site,) = fastbp.fuse(nn.Sequential(Experts(), Embeddings())).sites
    assert site.name == "0" and site.status == "left" and "3-D (gate_up_proj, down_proj)" in site.reason


def test_what_is_no_block_is_not_mentioned():
    """A network of another kind, with an activation here and a linear there; a norm behind two linears."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.fc = nn.Conv1d(4, 4, 3), nn.ReLU(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.act(self.conv(x)).mean(-1))

    class Normed(nn.Module):
        def __init__(self, behind):
            super().__init__()
            self.qkv, self.proj, self.behind = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), behind

        def forward(self, x: Tensor) -> Tensor:
            return self.behind(self.proj(self.qkv(x)[..., :WIDTH]))

    for sample in (torch.randn(2, 4, 9), None):
        assert fastbp.fuse(Net(), sample_inputs=sample).sites == []
    for behind in (nn.LayerNorm(WIDTH), nn.Softmax(-1), nn.MaxPool1d(3, 1, 1)):
        assert fastbp.fuse(Normed(behind)).sites == []


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_parameters_of_its_own_are_taken_for_more_than_their_values(scale):
    """A scale of 1 now is another when it has been trained; one that the forward does not use does not matter."""

    class Owner(TwoLinears):
        def __init__(self, used):
            super().__init__(nn.GELU())
            self.used, self.scale = used, nn.Parameter(torch.full((1,), scale))

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc2(self.act(self.fc1(x)))
            return y * self.scale if self.used == 1.0 else y + self.scale if self.used == 0.0 else y

    model, x = Owner(scale).double(), torch.randn(4, WIDTH, dtype=torch.float64)
    fastbp.fuse(model)
    with torch.no_grad():
        model.scale.add_(0.7)
    stock = Owner(scale).double()
    stock.load_state_dict(model.state_dict())
    assert_same_training(model, stock, x)
    assert [s.what for s in fastbp.fuse(Owner(None)).fused] == ["mlp, gelu"]
