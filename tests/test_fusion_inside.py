"""fuse: fc1, act, fc2 in the midst of a larger module's forward, found by a dry run."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from larger import HIDDEN, WIDTH, Layer, Model, X
from torch import Tensor, nn

import fastbp
from fastbp.fusion.surgery import is_fused

pytestmark = pytest.mark.usefixtures("seeded")


def run(model: nn.Module, *args) -> list[Tensor]:
    torch.manual_seed(1)
    y = model(*(args or (X,)))
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), list(model.parameters()))]


def assert_agree(model: nn.Module, stock: nn.Module, *args) -> None:
    for training in (False, True):
        for a, b in zip(run(model.train(training), *args), run(stock.train(training), *args), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def kept(model: nn.Module) -> int:
    with fastbp.SavedBytes(exclude=[X, model]) as saved:
        y = model(X)
    del y
    return saved.total


VARIANTS = {
    "module": {},
    "function": dict(activation=F.relu),
    "in place": dict(activation=nn.ReLU(inplace=True)),
    "dropout": dict(drop=0.4),
    "dropout by a function": dict(drop_by_function=0.4),
    "both": dict(drop=0.2, drop_by_function=0.4),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("sample", [True, False])
def test_found_and_exact(name, sample):
    model = Model(**VARIANTS[name]).double()
    stock, mask = copy.deepcopy(model), torch.zeros(5, 5, dtype=torch.float64)
    report = fastbp.fuse(model, sample_inputs=(X, mask) if sample else None)
    call = f"mlp, {'relu' if 'activation' in VARIANTS[name] else 'gelu'}"
    assert [(s.name, s.kind, s.what) for s in report.fused] == [
        (f"layers.{i}", "Layer [fc1, fc2]", call) for i in range(2)
    ], str(report)
    assert report.verified is (True if sample else None) and max(report.errors.values()) < 1e-12
    assert_agree(model, stock)
    assert_agree(model, stock, X, mask)


@pytest.mark.parametrize("name", ["module", "dropout", "dropout by a function"])
def test_one_call_where_nothing_drops_else_two(name):
    model = Model(**VARIANTS[name]).double()
    before = {training: kept(model.train(training)) for training in (False, True)}
    fastbp.fuse(model)
    hidden = 2 * 10 * HIDDEN * 8  # of both layers
    assert before[False] - kept(model.eval()) == hidden
    assert before[True] - kept(model.train()) == (hidden if name == "module" else 0)
    if name == "dropout":  # as soon as it drops no more
        for layer in model.layers:
            layer.drop.p = 0.0
        assert before[False] - kept(model.train()) == hidden


def test_nothing_else_about_the_model_changes():
    model = Model().double()
    names, objects = [n for n, _ in model.named_modules()], list(model.parameters())
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    fastbp.fuse(model)
    layer = model.layers[0]
    assert type(layer.fc1) is nn.Linear and layer.get_submodule("fc2") is layer._modules["fc2"]
    assert [n for n, _ in model.named_modules()] == names and list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    assert fastbp.unfuse(model) == ["layers.0", "layers.1"] and [type(m) for m in model.modules()] == kinds
    assert not any("fastbp" in key for m in model.modules() for key in m.__dict__)


def test_copies_and_files():
    model = Model().double()
    stock = copy.deepcopy(model)
    fastbp.fuse(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.layers[0].fc1.weight.add_(1.0)
    assert is_fused(twin.layers[0])
    assert_agree(twin, stock)  # and not the first one's weights
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded.layers[0]) is Layer and not any("fastbp" in key for key in loaded.layers[0].__dict__)
    assert_agree(loaded, model)


def test_a_shallow_copy_reads_its_own_attributes():
    """As the replicas of nn.DataParallel: another __dict__ with other children."""
    layer = Layer().double()
    fastbp.fuse(layer)
    replica = layer.__new__(type(layer))
    replica.__dict__ = layer.__dict__.copy()
    replica._modules = {**layer._modules, "fc1": copy.deepcopy(layer.fc1)}
    with torch.no_grad():
        replica.fc1.weight.mul_(-1.0)
    stock = copy.deepcopy(layer)
    fastbp.unfuse(stock)
    torch.testing.assert_close(layer(X)[0], stock(X)[0])
    with torch.no_grad():
        stock.fc1.weight.mul_(-1.0)
    torch.testing.assert_close(replica(X)[0], stock(X)[0])


@pytest.mark.parametrize("change", ["hook", "wrapped fc1", "wrapped fc2", "activation", "function", "number"])
def test_what_changes_later_is_seen(change):
    model = Layer(torch.tanh if change == "function" else nn.LeakyReLU(0.1)).double()
    stock = copy.deepcopy(model)
    assert fastbp.fuse(model).fused
    for m in (model, stock):
        if change == "hook":
            m.fc1.register_forward_hook(lambda module, args, output: output * 3)
        elif change == "wrapped fc1":
            m.fc1 = nn.Sequential(m.fc1, nn.Tanh())
        elif change == "wrapped fc2":
            m.fc2 = nn.Sequential(m.fc2, nn.Tanh())
        elif change == "activation":
            m.activation_fn.negative_slope = 0.7
        elif change == "function":
            m.activation_fn = F.silu
        else:
            m.activation_dropout = 0.5
    for training in (True, False):
        torch.manual_seed(0)
        mine = model.train(training)(X)[0]
        torch.manual_seed(0)
        torch.testing.assert_close(mine, stock.train(training)(X)[0])


ENCODERS = {
    f"{cls.__name__}, {act}, {norm_first=}": (cls, act, norm_first)
    for cls in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    for act in ("relu", "gelu")
    for norm_first in (False, True)
}


@pytest.mark.parametrize("name", ENCODERS)
def test_pytorchs_transformer_layers(name):
    cls, act, norm_first = ENCODERS[name]
    model = cls(WIDTH, 2, HIDDEN, 0.1, act, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    stock, args = copy.deepcopy(model), (X,) if cls is nn.TransformerEncoderLayer else (X, X.cos())
    (site,) = fastbp.fuse(model).sites
    assert (site.status, site.what) == ("fused", f"mlp, {act}")
    assert_agree(model, stock, *args)


def test_the_fast_path_of_an_encoder_goes_on(monkeypatch):
    """Evaluating without gradients PyTorch runs the whole layer in one operation, nested where there is padding."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, batch_first=True), 2).eval()
    stock, x = copy.deepcopy(model), X.float()
    fastbp.fuse(model)
    calls, op = [], torch._transformer_encoder_layer_fwd

    def counted(*args):
        calls.append(1)
        return op(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        torch.testing.assert_close(model(x), stock(x))
        torch.testing.assert_close(*(m(x, src_key_padding_mask=padding) for m in (model, stock)))
    assert len(calls) == 8
    again = copy.deepcopy(stock)  # which has no gradients in evaluation, where the dry run must see the children
    report = fastbp.fuse(again, sample_inputs=dict(src=x, src_key_padding_mask=padding))
    assert len(report.fused) == 2, str(report)


def test_compiled(fresh_dynamo):
    model = Model().double()
    stock = copy.deepcopy(model)
    fastbp.fuse(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_agree(compiled, stock)
    explained = torch._dynamo.explain(model)(X)
    assert explained.graph_break_count == 0
    assert sum(graph.print_readable(print_output=False).count("fastbp.mlp.default") for graph in explained.graphs) == 2
