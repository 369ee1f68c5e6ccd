"""fuse, unfuse and the report."""

import collections
import copy
import random
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbp
from fastbp.fusion.surgery import is_fused
from fastbp.linear import Linear, of_any_size
from fastbp.readers import reads

WIDTH = 12
pytestmark = pytest.mark.usefixtures("seeded")


class Gate(nn.Module):
    """A gated block whose forward does more than a fused call."""

    def __init__(self, hidden: int = 20, **factory) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, hidden, **factory) for _ in range(2))
        self.down = nn.Linear(hidden, WIDTH, **factory)
        self.norm, self.log = nn.LayerNorm(WIDTH, **factory), []
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        self.calls += 1
        h = F.silu(self.gate(x)) * self.up(x)
        self.log.append(float(h.detach().mean()))
        y = self.norm(x + self.down(h))
        return y if scale is None else y * scale


class Net(nn.Module):
    """Blocks of each kind: read by linears, known whole, and left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(WIDTH, WIDTH), Gate()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.mlp(self.block(self.first(x)))).clamp(max=2.0))


def step(model: nn.Module, *args) -> list[Tensor]:
    with of_any_size():
        y = model(*args)
    return [y, *torch.autograd.grad(y.square().sum(), [p for p in model.parameters() if p.requires_grad])]


def assert_same_step(model: nn.Module, stock: nn.Module, *args) -> None:
    for a, b in zip(step(model, *args), step(stock, *args), strict=True):
        torch.testing.assert_close(a, b)


def test_fuse_changes_classes_and_nothing_else():
    model = Net()
    stock = copy.deepcopy(model)
    before = {name: (module, dict(module._parameters)) for name, module in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    report = fastbp.fuse(model)
    assert {name: (module, dict(module._parameters)) for name, module in model.named_modules()} == before
    assert list(state) == list(model.state_dict())
    assert all(isinstance(m, nn.Linear) == isinstance(before[n][0], nn.Linear) for n, m in model.named_modules())
    assert [n for n, m in model.named_modules() if reads(m)] == [
        *("first", "block.gate", "block.up", "block.down", "mlp.0", "mlp.2", "head")
    ]
    assert report.linears == 7 and not report.ran and [s.name for s in report.sites] == ["mlp"]
    assert repr(model.first) == repr(stock.first) and type(model.first).__qualname__ == "Linear"
    x = torch.randn(9, WIDTH)
    assert_same_step(model, stock, x)
    with of_any_size():
        model(x).sum().backward()
    optimizer.step()
    assert any(not torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_unfuse_takes_it_back():
    model = Net()
    kinds = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    fastbp.fuse(model, sample_inputs=torch.randn(2, WIDTH))
    with of_any_size():
        model(torch.randn(2, WIDTH))
    changed = fastbp.unfuse(model)
    assert changed == ["first", "block.gate", "block.up", "block.down", "mlp", "mlp.0", "mlp.1", "mlp.2", "head"]
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert fastbp.unfuse(model) == []


def test_unfuse_leaves_the_classes_that_others_made():
    """As fully_shard makes one of a module's class; PyTorch computes."""
    model = Net()
    fastbp.fuse(model)
    for module in (model.block.down, model.mlp):
        module.__class__ = type("Sharded", (type(module),), {})
    assert fastbp.report(model).linears == 7
    fastbp.unfuse(model)
    assert type(model.block.down).__name__ == "Sharded" and not reads(model.block.down) and not is_fused(model.mlp)
    h = F.silu(torch.randn(3, 20, requires_grad=True))
    with of_any_size():
        assert type(model.block.down(h).grad_fn).__name__ == "AddmmBackward0"
    fastbp.fuse(model)
    assert reads(model.block.down)
    with of_any_size():
        assert type(model.block.down(h).grad_fn).__name__ == "ActLinearBackward"


def test_a_linear_made_by_hand_stays_one():
    model = nn.Sequential(Linear(WIDTH, WIDTH), nn.GELU())
    fastbp.fuse(model, save="fp8")
    fastbp.unfuse(model)
    assert type(model[0]) is Linear and not set(model[0].__dict__) & {"_fastbp_settings", "_fastbp_outcome"}


def test_fuse_again_changes_the_settings():
    model, x = Gate(hidden=64), torch.randn(64, WIDTH)

    def kept() -> int:
        with of_any_size(), fastbp.SavedBytes(exclude=[x, model]) as saved:
            y = model(x)
        return saved.total + 0 * y.numel()

    stock = kept()
    kinds = []
    sizes = []
    for options in ({}, {"save": "fp8"}, {"save": "fp8"}, {"save": "preact"}, {}):
        fastbp.fuse(model, **options)
        kinds.append(type(model.down))
        sizes.append(kept())
    assert len(set(kinds)) == 1
    hidden = 64 * 64 * 4
    assert stock - sizes[0] == 2 * hidden and sizes[0] == sizes[3] == sizes[4]
    assert sizes[1] == sizes[2] == sizes[0] - 2 * hidden + 2 * (hidden // 4 + hidden // 128)


def test_filter():
    model = Net()
    asked = []

    def choose(module, name):
        asked.append((name, type(module).__name__))
        return not name.startswith("block") and name != "mlp"

    report = fastbp.fuse(model, filter_fn=choose)
    assert [n for n, m in model.named_modules() if reads(m)] == ["first", "mlp.0", "mlp.2", "head"]
    assert not is_fused(model.mlp) and report.linears == 4
    assert [(s.name, s.status, s.reason) for s in report.sites] == [("mlp", "left", "filter_fn said no")]
    assert ("block.up", "Linear") in asked


@pytest.mark.parametrize("sample", [None, torch.randn(2, WIDTH)], ids=["without", "with sample"])
def test_dry_run_changes_nothing(sample):
    model = Net()
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    report = fastbp.fuse(model, dry_run=True, sample_inputs=sample)
    assert [(type(m), dict(m.__dict__)) for m in model.modules()] == before
    assert report.linears == 7
    found = [(s.name, s.status) for s in report.sites]
    left = [("head", "left")] if sample is not None else []
    gate = [("block.down", "would fuse")] if sample is not None else []
    assert sorted(found) == sorted([("mlp", "would fuse"), *gate, *left])
    assert report.fused and "would fuse" in str(report)


def test_strict():
    model, x = Net(), torch.randn(2, WIDTH)
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    with pytest.raises(RuntimeError, match=r"(?s)strict.*the model is as it was.*between gelu and this linear"):
        fastbp.fuse(model, sample_inputs=x, strict=True)
    assert [(type(m), dict(m.__dict__)) for m in model.modules()] == before
    assert fastbp.fuse(model.block, sample_inputs=x, strict=True).fused
    with pytest.raises(ValueError, match="strict needs sample_inputs"):
        fastbp.fuse(model, strict=True)


def test_strict_does_not_mind_where_nothing_is_to_be_gained():
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.one(x))
            return self.two(h) + h

    report = fastbp.fuse(Behind(), sample_inputs=torch.randn(2, WIDTH), strict=True)
    assert [(s.name, s.status) for s in report.sites] == [("two", "no gain")] and "kept once" in str(report)


def test_a_block_whose_own_code_ran_is_said_to():
    """After a hook on a child, for one: the report is of what happened."""
    model = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
    fastbp.fuse(model)
    model(torch.randn(2, WIDTH))
    assert [s.status for s in fastbp.report(model).sites] == ["fused"]
    handle = model[0].register_forward_hook(lambda *_: None)
    model(torch.randn(2, WIDTH))
    site, linear = fastbp.report(model).sites
    assert site.status == "left" and "its own code ran" in site.reason
    assert linear.name == "2" and "less than 2 MiB" in linear.reason
    handle.remove()
    model(torch.randn(2, WIDTH))
    assert [s.status for s in fastbp.report(model).sites] == ["fused"]


def test_strict_without_a_copy_takes_everything_back():
    model = Net()
    model.lock = threading.Lock()
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    with pytest.raises(RuntimeError, match="strict"):
        fastbp.fuse(model, sample_inputs=torch.randn(2, WIDTH), strict=True)
    assert [type(m) for m in model.modules()] == [kind for kind, _ in before]
    assert not any("_fastbp_settings" in m.__dict__ or "_fastbp_plan" in m.__dict__ for m in model.modules())


class Encoding(collections.UserDict):
    """What tokenizers give: a mapping that is no dict."""


SAMPLES = {
    "tensor": torch.randn(2, WIDTH),
    "tuple": (torch.randn(2, WIDTH), torch.ones(WIDTH)),
    "list": [torch.randn(2, WIDTH), torch.ones(WIDTH)],
    "dict": {"x": torch.randn(2, WIDTH), "scale": torch.ones(WIDTH)},
    "mapping": Encoding(x=torch.randn(2, WIDTH)),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_samples(kind):
    report = fastbp.fuse(Gate(), sample_inputs=SAMPLES[kind])
    assert report.ran and [(s.name, s.status, s.what) for s in report.sites] == [
        ("down", "fused", "gated_act_linear, silu")
    ]
    assert report.sites[0].unkept == 2 * 2 * 20 * 4


def test_the_sample_leaves_no_trace():
    model = Gate()
    model.drop = nn.Dropout(0.5)
    model.register_forward_hook(lambda m, a, y: m.drop(y) * random.random() * np.random.rand())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    fastbp.fuse(model, sample_inputs=torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[2], strict=True))
    assert model.log == [] and model.calls.item() == 0 and all(p.grad is None for p in model.parameters())
    assert "_fastbp_outcome" not in model.down.__dict__


def test_a_model_that_cannot_be_copied_runs_itself():
    """Buffers and random states are put back; that it ran is said."""
    model = Gate()
    model.lock = threading.Lock()
    state = torch.get_rng_state()
    report = fastbp.fuse(model, sample_inputs=torch.ones(2, WIDTH))
    assert [s.status for s in report.sites] == ["fused"] and "ran on the model itself" in str(report)
    assert model.calls.item() == 0 and torch.equal(torch.get_rng_state(), state) and reads(model.down)


def test_a_sample_that_does_not_fit():
    model = Net()
    with pytest.raises(ValueError, match=r"does not run with sample_inputs \(Tensor \(2, 5\) torch.float32\)"):
        fastbp.fuse(model, sample_inputs=torch.randn(2, 5))
    assert not any(reads(m) or is_fused(m) for m in model.modules())


def test_report_of_the_last_call():
    """Of what happened in it, in words and bytes."""
    model = Net()
    fastbp.fuse(model)
    assert not fastbp.report(model).ran and "once the model has run" in str(fastbp.report(model))
    x = torch.randn(2, WIDTH)
    model(x)
    rows = {s.name: s for s in fastbp.report(model).sites}
    assert list(rows) == ["block.down", "mlp", "head"]
    assert rows["block.down"].status == "left" and "less than 2 MiB" in rows["block.down"].reason
    with of_any_size():
        model(x)
    report = fastbp.report(model)
    rows = {s.name: s for s in report.sites}
    assert (rows["block.down"].status, rows["block.down"].what) == ("fused", "gated_act_linear, silu")
    assert rows["block.down"].unkept == 2 * 2 * 20 * 4
    assert rows["head"].reason == "between gelu and this linear there is clamp"
    assert [s.name for s in report.fused] == ["block.down", "mlp"] and [s.name for s in report.left] == ["head"]
    text = str(report)
    assert "320 B" in text and "2 fused, 1 left; 7 linears look at their input" in text
    fastbp.unfuse(model)
    assert not fastbp.report(model).sites and not fastbp.report(model).linears


def test_subclasses_of_linear_are_left_and_named():
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Inherits(nn.Linear):
        """Has nothing of its own, and is not a plain one all the same."""

    model = Gate()
    model.down, model.up = Own(20, WIDTH), Inherits(WIDTH, 20)
    stock, x = copy.deepcopy(model), torch.randn(2, WIDTH)
    report = fastbp.fuse(model, sample_inputs=x)
    assert [(s.name, s.status) for s in report.sites] == [("down", "left")]
    assert "a Own, which has a forward of its own" in report.sites[0].reason
    assert type(model.down) is Own and type(model.up) is Inherits
    assert_same_step(model, stock, x)


def test_experts_with_weights_of_three_dimensions_are_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(2, 4, 8)), nn.Parameter(torch.randn(2, 8, 4))

        def forward(self, x):
            return F.silu(x @ self.up) @ self.down

    report = fastbp.fuse(nn.ModuleList([Experts()]))
    assert [(s.name, s.status) for s in report.sites] == [("0", "left")]
    assert "weights of three dimensions" in report.sites[0].reason


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: fastbp.fuse(step), TypeError, "fastbp.fuse: model must be an nn.Module, got function"),
        (lambda: fastbp.unfuse(3), TypeError, "fastbp.unfuse: model must be an nn.Module, got int"),
        (lambda: fastbp.report("x"), TypeError, "fastbp.report: model must be an nn.Module, got str"),
        (lambda: fastbp.fuse(nn.Linear(2, 2), save="prect"), ValueError, "did you mean 'preact'"),
        (lambda: fastbp.fuse(nn.Linear(2, 2), backend="nativ"), ValueError, "did you mean 'native'"),
        (lambda: fastbp.fuse(torch.jit.script(nn.Linear(2, 2))), TypeError, "TorchScript"),
        (lambda: fastbp.fuse(torch.fx.symbolic_trace(nn.Linear(2, 2))), ValueError, "captured graph"),
    ],
)
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_captured_graphs_inside_are_left():
    model = nn.ModuleDict({"graph": torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))})
    assert fastbp.fuse(model).linears == 0


class LlamaLike(nn.Module):
    """A decoder of 7 B parameters, without its attention's products."""

    def __init__(self, layers: int = 32, hidden: int = 4096, wide: int = 11008) -> None:
        super().__init__()
        self.embed = nn.Embedding(32000, hidden)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            layer = nn.ModuleDict({n: nn.Linear(hidden, hidden, bias=False) for n in "qkvo"})
            layer["gate"], layer["up"] = (nn.Linear(hidden, wide, bias=False) for _ in range(2))
            layer["down"], layer["act"] = nn.Linear(wide, hidden, bias=False), nn.SiLU()
            layer["norm"], layer["norm2"] = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
            self.layers.append(layer)
        self.head = nn.Linear(hidden, 32000, bias=False)


def test_seven_billion_parameters_take_less_than_a_second():
    with torch.device("meta"):
        model = LlamaLike()
    assert sum(p.numel() for p in model.parameters()) > 6.5e9
    begin = time.process_time()
    report = fastbp.fuse(model)
    assert time.process_time() - begin < 1.0
    assert report.linears == 32 * 7 + 1
