"""Known blocks and reading linears at the edges of Python: what stock does is done, to the error it raises."""

import copy
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from reading import WIDTH, assert_same, count_calls, draw, method, pair, written
from torch import nn

import fastbp
from fastbp import known

pytestmark = pytest.mark.usefixtures("seeded")

BEHIND = "return self.fc2(self.norm(self.act(self.fc1(x))))"
SPELLED = "return self.fc2(act(self.fc1(x)))"


def assert_raises_alike(fused, stock, *args):
    said = []
    for m in (stock, fused):
        with pytest.raises(Exception) as caught:
            m(*args)
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]


@pytest.mark.parametrize("where", ["_modules", "__dict__"])
def test_a_child_that_replaces_its_sibling_while_the_forward_runs_is_told(where):
    """Python may have looked the sibling up before or after, by how the forward is written."""
    _, fused = pair(written(BEHIND))

    def replace(*_):
        if where == "_modules":
            fused.fc2 = nn.Linear(20, WIDTH).double()
        else:
            fused.__dict__["fc2"] = nn.Identity()

    fused.norm.register_forward_hook(replace)
    with pytest.raises(RuntimeError, match="fc2 of Made was replaced while the forward ran"):
        fused(draw(3, WIDTH))


def test_a_name_that_is_an_attribute_and_a_child_is_the_attribute():
    module = written("return self.fn(self.fc2(self.act(self.fc1(x))))")
    module._modules["fn"] = nn.Tanh()
    assert isinstance(known.read(module), str)


class Odd(float):
    def __rmul__(self, other):
        return other * 0.0

    __mul__ = __rmul__


@pytest.mark.parametrize("half", [complex(1.702), Odd(1.702), Fraction(851, 500), True], ids=repr)
def test_constants_that_count_in_their_own_way_are_not_believed(half):
    names = {"torch": torch, "H": half}
    act = method("return x * torch.sigmoid(H * x)", names=names, head="def forward(x):")
    assert isinstance(known.read(written(SPELLED, names={"act": act})), str)


@pytest.mark.parametrize(
    "text", ["return self.drop(self.act(self.fc1(x)))", "return self.fc2(self.drop(self.act(self.fc1(x))))"]
)
def test_a_traced_graph_drops_when_it_trains(text):
    stock, fused = pair(written(text))
    found = []
    for m in (stock, fused):
        m.drop.p = 0.5
        graph = torch.fx.symbolic_trace(m.eval())
        torch.manual_seed(0)
        found.append(graph.train()(torch.ones(3, WIDTH, dtype=torch.float64)))
    torch.testing.assert_close(*found)
    assert (found[0] == 0).any() or "fc2" in text


@pytest.mark.parametrize("p", [1.5, -1, "a"])
@pytest.mark.parametrize(
    "text", ["return self.drop(self.act(self.fc1(x)))", "return self.fc2(self.drop(self.act(self.fc1(x))))"]
)
def test_a_dropout_that_cannot_drop_raises_in_evaluation_too(p, text):
    stock, fused = pair(written(text))
    for m in (stock.eval(), fused.eval()):
        m.drop.p = p
    assert_raises_alike(fused, stock, draw(3, WIDTH))


def test_a_dropout_behind_a_block_gets_what_comes():
    stock, fused = pair(written("return self.drop(self.norm(self.act(self.fc1(x))))"))
    for m in (stock.eval(), fused.eval()):
        m.norm.register_forward_hook(lambda module, args, y: (y,))
    assert_raises_alike(fused, stock, draw(3, WIDTH))


@pytest.mark.parametrize("x", [None, [1.0], 3], ids=repr)
def test_no_tensor_is_refused_as_stock_refuses_it(x):
    act = method(
        "return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))",
        names={"torch": torch},
        head="def forward(x):",
    )
    stock, fused = pair(written(SPELLED, names={"act": act}))
    assert_raises_alike(fused, stock, x)


@pytest.mark.parametrize(
    "text", ["return self.fc2(self.act(self.fc1(x)))", "return self.fc2(self.act(self.fc1(x * 1.0)))"]
)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_plain_attribute_hides_the_parameter(text, name, monkeypatch):
    stock = written(text)
    fused = copy.deepcopy(stock)
    fastbp.fuse(fused, save="preact")
    other = draw(WIDTH, 20) if name == "weight" else draw(WIDTH)
    for m in (stock, fused):
        object.__setattr__(m.fc2, name, other)
    torch.testing.assert_close(fused(x := draw(4, WIDTH)), stock(x))


SHAPES = {
    "a row": lambda m: setattr(m, "bias", nn.Parameter(m.bias.detach()[None])),
    "of each row": lambda m: setattr(m, "bias", nn.Parameter(draw(4, WIDTH))),
    "a vector for a weight": lambda m: (setattr(m, "bias", None), setattr(m, "weight", nn.Parameter(draw(20)))),
}


@pytest.mark.parametrize("what", SHAPES)
@pytest.mark.parametrize("made", [F.gelu, lambda z: F.gelu(z) * 0.5], ids=["read", "made again"])
def test_weights_and_biases_of_other_shapes_train_as_stock(what, made, monkeypatch):
    stock = written("return self.fc2(made(self.fc1(x)))", names={"made": made})
    SHAPES[what](stock.fc2)
    fused = copy.deepcopy(stock)
    fastbp.fuse(fused, save="preact")
    assert_same(fused, stock, draw(4, WIDTH))
    (site,) = (site for site in fastbp.report(fused).left if site.name == "fc2")
    assert "another shape or dtype" in site.reason


def test_patched_classes_of_transformers_are_called(monkeypatch):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    module = written("return self.fc2(self.act(self.fc1(x)))")
    module.fc1, module.fc2 = conv1d(20, WIDTH).double(), conv1d(WIDTH, 20).double()
    stock, fused = pair(module)
    calls, x, addmm = count_calls(monkeypatch), draw(4, WIDTH), torch.addmm
    with monkeypatch.context() as patched:
        patched.setattr(torch, "addmm", lambda *args: 2 * addmm(*args))
        assert_same(fused, stock, x)
    with monkeypatch.context() as patched:
        patched.setattr(conv1d, "__call__", lambda self, x: 2 * nn.Module.__call__(self, x))
        assert_same(fused, stock, x)
    assert calls == []
    assert_same(fused, stock, x)
    assert calls == ["mlp"]


@pytest.mark.parametrize(
    "change", [lambda m: setattr(m, "bias", None), lambda m: setattr(m, "nf", 3)], ids=["bias", "nf"]
)
def test_a_conv1d_that_cannot_run_raises_as_stock(change):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    module = written("return self.fc2(self.act(self.fc1(x)))")
    module.fc1, module.fc2 = conv1d(20, WIDTH).double(), conv1d(WIDTH, 20).double()
    stock, fused = pair(module)
    for m in (stock, fused):
        change(m.fc2)
    assert_raises_alike(fused, stock, draw(4, WIDTH))
