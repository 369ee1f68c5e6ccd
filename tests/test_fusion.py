"""fuse, unfuse and the report: what is found, what is left and why, and that nothing else about the model changes."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbp
from fastbp.activations import ROWS, bind
from fastbp.fusion import templates
from fastbp.fusion.surgery import is_fused

WIDTH = 12


class TwoLinears(nn.Module):
    """fc1, activation, fc2 under the names the subclass or caller chooses."""

    def __init__(self, activation, names=("fc1", "fc2"), hidden=20, out=WIDTH, dropout=None):
        super().__init__()
        self.names = names
        setattr(self, names[0], nn.Linear(WIDTH, hidden))
        setattr(self, names[1], nn.Linear(hidden, out))
        self.act = activation
        if dropout is not None:
            self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = getattr(self, self.names[1])(self.act(getattr(self, self.names[0])(x)))
        return self.dropout(y) if hasattr(self, "dropout") else y


class Written(TwoLinears):
    """The activation stands in the forward."""

    def __init__(self):
        super().__init__(None)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Residual(TwoLinears):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Gated(nn.Module):
    def __init__(self, names=("gate_proj", "up_proj", "down_proj"), swap=False):
        super().__init__()
        self.names, self.swap = names, swap
        for name, sizes in zip(names, ((WIDTH, 16), (WIDTH, 16), (16, WIDTH)), strict=True):
            setattr(self, name, nn.Linear(*sizes, bias=False))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (getattr(self, name) for name in self.names)
        return c(a(x) * self.act_fn(b(x))) if self.swap else c(self.act_fn(a(x)) * b(x))


class Swish(nn.Module):
    """A stranger's name for silu."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and every gradient."""
    x = x.clone().requires_grad_()
    y = model(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], dy)]


def assert_same_step(model: nn.Module, stock: nn.Module, x: Tensor) -> None:
    for a, b in zip(step(model, x), step(stock, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


BLOCKS = {
    "fc1/fc2": (lambda: TwoLinears(nn.GELU()), "mlp, gelu"),
    "other names, second first": (lambda: TwoLinears(nn.ReLU(), ("a_out", "b_in")), "mlp, relu"),
    "square": (lambda: TwoLinears(nn.Tanh(), hidden=WIDTH), "mlp, tanh"),
    "idle dropout": (lambda: TwoLinears(nn.GELU(), dropout=0.0), "mlp, gelu"),
    "function attribute": (lambda: TwoLinears(F.silu), "mlp, silu"),
    "stranger's module": (lambda: TwoLinears(Swish()), "mlp, silu"),
    "parameters": (lambda: TwoLinears(nn.LeakyReLU(0.2)), "mlp, leaky_relu(negative_slope=0.2)"),
    "written in forward": (Written, "mlp, gelu_tanh"),
    "gated": (Gated, "gated_mlp, silu"),
    "gated, other names": (lambda: Gated(("w1", "w3", "w2")), "gated_mlp, silu"),
    "gated, gate second": (lambda: Gated(swap=True), "gated_mlp, silu"),
}


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
    model = TwoLinears(nn.GELU())
    model.scale = nn.Parameter(torch.ones(1))
    return model


def _with(attribute: str, value: nn.Module) -> nn.Module:
    model = TwoLinears(nn.GELU())
    setattr(model, attribute, value)
    return model


LEFT = {
    "residual": (lambda: Residual(nn.GELU()), "computes something else"),
    "dropout": (lambda: TwoLinears(nn.GELU(), dropout=0.1), "drops"),
    "subclass of Linear": (lambda: _with("fc1", Subclass(WIDTH, 20)), "fc1 is not a plain"),
    "hook": (_hooked, "fc1 is not a plain"),
    "own parameter": (_own_parameter, "parameters or buffers of its own"),
    "unknown activation": (lambda: TwoLinears(nn.LogSigmoid()), "LogSigmoid is no activation"),
    "two activations": (lambda: _with("act2", nn.ReLU()), "more than one activation"),
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


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, 18), nn.GELU(), nn.Linear(18, WIDTH),
        nn.Linear(WIDTH, 8), Swish(), nn.Dropout(0.0),
        nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5),
        nn.Linear(5, 5),
    )  # fmt: skip


def test_sequential_runs():
    model, x = sequential(), torch.randn(7, WIDTH)
    stock = copy.deepcopy(model)
    report = fastbp.fuse(model, sample_inputs=x)
    assert [(s.kind, s.what) for s in report.fused] == [
        ("Sequential [1:5]", "mlp, gelu"),
        ("Sequential [6:7]", "linear_act, silu"),
        ("Sequential [9:11]", "mlp, relu"),
    ], str(report)
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


def test_nothing_else_about_the_model_changes():
    model = nn.Sequential(TwoLinears(nn.GELU()), Gated(), sequential())
    keys, objects, names = list(model.state_dict()), list(model.parameters()), [n for n, _ in model.named_modules()]
    kinds = [type(m) for m in model.modules()]
    fastbp.fuse(model)
    assert list(model.state_dict()) == keys and [n for n, _ in model.named_modules()] == names
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))
    assert fastbp.unfuse(model) == ["0", "1", "2"]
    assert [type(m) for m in model.modules()] == kinds
    assert not any("fastbp" in key for m in model.modules() for key in m.__dict__)
    assert fastbp.unfuse(model) == []


def test_optimizer_made_before_stays_valid():
    model, x = TwoLinears(nn.GELU()), torch.randn(9, WIDTH)
    stock = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, stock)]
    fastbp.fuse(model)
    for _ in range(3):
        for m, optimizer in zip((model, stock), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_idempotent_and_copies_stay_fused():
    model, x = nn.Sequential(TwoLinears(nn.GELU())), torch.randn(4, WIDTH)
    fastbp.fuse(model)
    again = fastbp.fuse(model)
    assert [s.reason for s in again.fused] == ["fused before"] and type(model[0]).__mro__[1] is TwoLinears
    twin = copy.deepcopy(model)
    assert is_fused(twin[0]) and twin[0].fc1.weight is not model[0].fc1.weight
    assert_same_step(twin, model, x)
    fastbp.unfuse(twin)
    assert is_fused(model[0]) and not is_fused(twin[0])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_as_the_stock_class(protocol):
    model, x = TwoLinears(nn.GELU()), torch.randn(4, WIDTH)
    fastbp.fuse(model)
    loaded = pickle.loads(pickle.dumps(model, protocol))
    assert type(loaded) is TwoLinears and is_fused(model)
    assert_same_step(loaded, model, x)


def test_saved_model_loads_without_fastbp(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    fastbp.fuse(model)
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; sys.modules['fastbp'] = None\n"
        f"m = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert type(m) is torch.nn.Sequential, type(m); print(m(torch.ones(1, 3)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), model(torch.ones(1, 3)).detach())


def test_dry_run_changes_nothing():
    model = nn.Sequential(TwoLinears(nn.GELU()), Residual(nn.GELU()))
    report = fastbp.fuse(model, dry_run=True)
    assert [s.status for s in report.sites] == ["would fuse", "left"] and report.verified is None
    assert not any(is_fused(m) for m in model.modules())
    assert "1 would be fused, 1 left" in str(report)


def test_filter_sees_module_and_name():
    model = nn.ModuleDict({"a": TwoLinears(nn.GELU()), "b": TwoLinears(nn.GELU())})
    seen = []
    report = fastbp.fuse(model, filter_fn=lambda module, name: seen.append((type(module), name)) or name == "b")
    assert seen == [(TwoLinears, "a"), (TwoLinears, "b")]
    assert [s.name for s in report.fused] == ["b"] and report.left[0].reason == "filter_fn said no"
    assert is_fused(model["b"]) and not is_fused(model["a"])


def test_strict_raises_and_leaves_the_model():
    model = nn.Sequential(TwoLinears(nn.GELU()), Residual(nn.GELU()))
    with pytest.raises(RuntimeError, match=r"(?s)strict=True.*computes something else"):
        fastbp.fuse(model, strict=True)
    assert not any(is_fused(m) for m in model.modules())


def test_mismatch_is_rolled_back(monkeypatch):
    """A wrong plan that slips through is caught on the caller's inputs."""
    monkeypatch.setattr(templates, "computes", lambda module, plan: True)
    model, x = Residual(nn.GELU()), torch.randn(6, WIDTH)
    before = step(model, x)
    report = fastbp.fuse(model, sample_inputs=x)
    assert report.verified is False and not is_fused(model) and report.sites[0].status == "rolled back"
    assert "DIFFER" in str(report) and max(report.errors.values()) > 0.01
    assert all(torch.equal(a, b) for a, b in zip(before, step(model, x), strict=True))
    unverified = fastbp.fuse(model, sample_inputs=x, verify=False)
    assert unverified.verified is None and is_fused(model)


def test_verifying_leaves_no_trace():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), TwoLinears(nn.GELU()))
    model[0].weight.grad = torch.ones(WIDTH, WIDTH)
    buffers = [b.clone() for b in model.buffers()]
    state = torch.get_rng_state()
    fastbp.fuse(model, sample_inputs=torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(model[0].weight.grad, torch.ones(WIDTH, WIDTH)) and model[2].fc1.weight.grad is None


@pytest.mark.parametrize("sample", ["tensor", "tuple", "dict"])
def test_sample_inputs_are_called_as_given(sample):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = TwoLinears(nn.GELU())

        def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
            return self.block(x) * scale, {"x": x}

    x = torch.randn(4, WIDTH)
    given = {"tensor": x, "tuple": (x, 2.0), "dict": {"x": x, "scale": 3.0}}[sample]
    assert fastbp.fuse(Two(), sample_inputs=given).verified is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_verified_too(dtype):
    model = nn.Sequential(TwoLinears(nn.GELU()), Gated()).to(dtype)
    assert fastbp.fuse(model, sample_inputs=torch.randn(16, WIDTH, dtype=dtype)).verified is True


def test_meta_model_is_fused_without_data():
    with torch.device("meta"):
        model = TwoLinears(nn.GELU(), hidden=4096)
    assert len(fastbp.fuse(model).fused) == 1
    assert model(torch.empty(2, WIDTH, device="meta")).shape == (2, WIDTH)


def test_policy_and_backend_reach_the_call():
    model, x = TwoLinears(nn.ReLU()), torch.randn(50, WIDTH)
    fastbp.fuse(model, save="recompute", backend="reference")
    with fastbp.SavedBytes(exclude=[x, model]) as saved:
        model(x)
    assert saved.total == 0
    model = nn.ModuleList([TwoLinears(nn.GELU()), TwoLinears(nn.ReLU()), nn.Sequential(nn.Linear(2, 2), nn.GELU())])
    report = fastbp.fuse(model, save="output")
    assert [s.status for s in report.sites] == ["left", "fused", "left"]
    assert "does not determine its slope" in report.left[0].reason


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"model": 3}, TypeError, "model must be an nn.Module, got int"),
        ({"save": "outptu"}, ValueError, "did you mean 'output'"),
        ({"backend": "tritn"}, ValueError, "did you mean 'triton'"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        fastbp.fuse(**{"model": nn.Linear(2, 2), **arguments})


def test_unfuse_wants_a_module():
    with pytest.raises(TypeError, match=r"fastbp.unfuse: model must be an nn.Module, got str"):
        fastbp.unfuse("model")


@pytest.mark.parametrize("dynamic", [False, True])
def test_fused_model_compiles_in_one_graph(dynamic):
    torch._dynamo.reset()
    model, x = nn.Sequential(TwoLinears(nn.GELU()), Gated(), sequential()), torch.randn(6, WIDTH)
    stock = copy.deepcopy(model)
    fastbp.fuse(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for a, b in zip(step(compiled, x), step(stock, x), strict=True):
        torch.testing.assert_close(a, b)
