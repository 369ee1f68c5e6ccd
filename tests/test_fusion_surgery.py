"""What fuse and unfuse leave as it was: state, copies, files; dry runs, verification, rollback, arguments."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from fusible import WIDTH, Gated, Residual, Scaled, TwoLinears, assert_same_step, sequential, step
from torch import Tensor, nn

import fastbp
from fastbp.fusion import templates
from fastbp.fusion.surgery import is_fused

pytestmark = pytest.mark.usefixtures("seeded")


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


def test_modules_of_fastbp_are_left_as_they_are():
    """They run fused, with settings of their own: a policy, a backend, gradients that are added to main_grad."""
    layers = [
        fastbp.LinearAct(WIDTH, WIDTH, gradient_accumulation_fusion=True),
        fastbp.GatedLinear(WIDTH, WIDTH, save="recompute"),
        fastbp.MLP(WIDTH, 20, gradient_accumulation_fusion=True),
        fastbp.GatedMLP(WIDTH, 20, backend="reference"),
    ]
    model = nn.Sequential(*layers, TwoLinears(nn.GELU()))
    assert [s.name for s in fastbp.fuse(model, sample_inputs=None).sites] == ["4"]
    assert not any(is_fused(layer) for layer in layers)


def test_the_name_of_the_class_stays():
    """Configs that are saved and policies that wrap layers go by it; repr tells that a module is fused."""
    model = nn.Sequential(TwoLinears(nn.GELU()), nn.TransformerEncoderLayer(WIDTH, 2, 16))
    names = [type(m).__name__ for m in model.modules()]
    fastbp.fuse(model)
    assert [type(m).__name__ for m in model.modules()] == names and type(model[0]).__qualname__ == "TwoLinears"
    assert repr(model).count("Fused") == 2 and "FusedTransformerEncoderLayer(" in repr(model)
    fastbp.unfuse(model)
    assert "Fused" not in repr(model)


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
    model = nn.Sequential(TwoLinears(nn.GELU()), Scaled(nn.GELU()))
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
    model = nn.Sequential(TwoLinears(nn.GELU()), Scaled(nn.GELU()))
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
