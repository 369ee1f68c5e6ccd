"""fuse: one linear and its activation, gate and up in one linear, dropouts and norms in the chain, other linears."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fusible import WIDTH, Gated, Swish, TwoLinears, assert_same_step
from torch import Tensor, nn

import fastbp
from fastbp import functional
from fastbp.fusion.surgery import is_fused

pytestmark = pytest.mark.usefixtures("seeded")


class Dense(nn.Module):
    """A linear and its activation."""

    def __init__(self, behind=None):
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(WIDTH, 20), nn.GELU()
        if behind is not None:
            self.behind = behind

    def forward(self, hidden_states: Tensor) -> Tensor:
        h = self.intermediate_act_fn(self.dense(hidden_states))
        return self.behind(h) if hasattr(self, "behind") else h


class Packed(nn.Module):
    """Gate and up in one linear."""

    def __init__(self, interleaved, gate_first, down=True, bias=True, width=WIDTH, hidden=16):
        super().__init__()
        self.interleaved, self.gate_first = interleaved, gate_first
        self.Wi = nn.Linear(width, 2 * hidden, bias=bias)
        self.act, self.drop = nn.SiLU(), nn.Dropout(0.3)
        if down:
            self.Wo = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.Wi(x)
        a, b = (h[..., ::2], h[..., 1::2]) if self.interleaved else h.chunk(2, dim=-1)
        h = self.drop(self.act(a) * b if self.gate_first else a * self.act(b))
        return self.Wo(h) if hasattr(self, "Wo") else h


class Chain(TwoLinears):
    """Norms and dropouts before, between and after."""

    def __init__(self, before=None, between=None, after=None):
        super().__init__(nn.GELU())
        self.before, self.between, self.after = (m or nn.Identity() for m in (before, between, after))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.fc2(self.between(self.act(self.fc1(self.before(x))))))


class Transposed(nn.Module):
    """Keeps its weight as (in, out), as the first GPT-2 did."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


class Own(nn.Linear):
    """The same product, written otherwise; and twice that, if asked."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T + self.bias) * self.scale


def _two(make) -> nn.Module:
    model = TwoLinears(nn.GELU())
    model.fc1, model.fc2 = make(WIDTH, 20), make(20, WIDTH)
    return model


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


CASES = {
    "dense/act": (Dense, "linear_act, gelu"),
    "dense/act/norm": (lambda: Dense(nn.LayerNorm(20)), "linear_act, gelu"),
    "one linear, written": (Quiet, "linear_act, mish"),
    "dropout between": (lambda: Chain(between=nn.Dropout(0.4)), "mlp, gelu"),
    "norm between": (lambda: Chain(between=nn.LayerNorm(20)), "linear_act, gelu"),
    "all around": (lambda: Chain(nn.LayerNorm(WIDTH), nn.Dropout(0.4), nn.Dropout(0.2)), "mlp, gelu"),
    "transposed weights": (lambda: _two(lambda i, o: Transposed(o, i)), "mlp, gelu"),
    "linears of their own": (lambda: _two(Own), "mlp, gelu"),
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


def assert_same_training(model: nn.Module, stock: nn.Module, x: Tensor) -> None:
    """Steps evaluating and training; dropouts draw the same numbers."""
    for training in (False, True):
        for m in (model, stock):
            m.train(training)
        torch.manual_seed(3)
        state = torch.get_rng_state()
        mine = steps(model, x)
        torch.set_rng_state(state)
        for a, b in zip(mine, steps(stock, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def steps(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    parameters = list({id(p): p for p in model.parameters()}.values())
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), parameters)]


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


class Configured(TwoLinears):
    """Reads a number and a function from its attributes."""

    def __init__(self):
        super().__init__(F.silu)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x))) * self.scale


@pytest.mark.parametrize("change", ["number", "function", "of a linear", "dtype of one", "child"])
def test_what_changes_later_is_seen(change):
    model = {"of a linear": lambda: _two(Own), "child": lambda: Chain(between=nn.Dropout(0.0))}.get(
        change, Configured
    )()
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


class Functional(TwoLinears):
    """Drops by a function."""

    def __init__(self, p):
        super().__init__(nn.GELU())
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc2(self.act(self.fc1(x))), self.p, self.training)


def test_a_linear_that_trains_otherwise_is_left():
    class Noisy(Own):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if self.training else 1.0)

    for training in (True, False):
        report = fastbp.fuse(_two(Noisy).train(training))
        assert not report.fused and "fc1, fc2 is not a plain" in report.left[0].reason


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_by_a_function_goes_on_dropping(p):
    model = Functional(p).double()
    stock, x = copy.deepcopy(model), torch.randn(6, WIDTH, dtype=torch.float64)
    assert [s.what for s in fastbp.fuse(model, sample_inputs=x).fused] == ["mlp, gelu"]
    assert_same_training(model, stock, x)
    for m in (model, stock):
        m.p = 0.6
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
            self.used, self.scale = used, nn.Parameter(torch.full((WIDTH,), scale))

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
