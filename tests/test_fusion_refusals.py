"""fuse and unfuse given what they cannot serve: each with a clear answer, and nothing changed."""

import copy

import pytest
import torch
from fusible import WIDTH, TwoLinears, assert_same_step
from torch import Tensor, nn

import fastbp
from fastbp import functional
from fastbp.fusion.surgery import is_fused

pytestmark = pytest.mark.usefixtures("seeded")


def _graphs() -> dict[str, object]:
    model = TwoLinears(nn.GELU()).eval()
    x = torch.randn(2, WIDTH)
    traced = torch.jit.trace(model, x)
    exported = torch.export.export(model, (x,))
    return {
        "traced": (traced, TypeError, r"TorchScript module .*frozen.*give the nn\.Module it was made from"),
        "frozen": (torch.jit.freeze(traced), TypeError, "TorchScript module"),
        "symbolic": (torch.fx.symbolic_trace(model), ValueError, "captured graph .*fuse the model first"),
        "exported": (exported, TypeError, r"got ExportedProgram; fuse the model before torch\.export"),
        "unlifted": (exported.module(), ValueError, "captured graph .*fuse the model first"),
    }


@pytest.mark.parametrize("function", [fastbp.fuse, fastbp.unfuse])
def test_a_graph_is_refused(function):
    for given, kind, message in _graphs().values():
        with pytest.raises(kind, match=f"fastbp.{function.__name__}: model .*{message}"):
            function(given)


@pytest.mark.parametrize("function", [fastbp.fuse, fastbp.unfuse])
def test_no_module_is_refused(function):
    with pytest.raises(TypeError, match=f"fastbp.{function.__name__}: model must be an nn.Module, got type"):
        function(nn.Linear)


def test_a_graph_inside_a_model_is_left():
    model = nn.ModuleDict({"graph": torch.fx.symbolic_trace(TwoLinears(nn.GELU())), "block": TwoLinears(nn.GELU())})
    model["script"] = torch.jit.trace(TwoLinears(nn.GELU()), torch.randn(2, WIDTH))
    assert [s.name for s in fastbp.fuse(model).sites] == ["block"]


class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = TwoLinears(nn.GELU())

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return self.block(x) * scale


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.randn(3, WIDTH + 1), r"\(Tensor \(3, 13\) torch.float32\)"),
        ((torch.randn(3, WIDTH),), "TypeError: .*'scale'"),
        (dict(x=torch.randn(3, WIDTH), scales=2.0), "TypeError: .*'scales'"),
        ("text", r"\(str\): TypeError"),
    ],
    ids=["shape", "argument missing", "argument unknown", "no tensor"],
)
@pytest.mark.parametrize("verify", [True, False])
def test_sample_inputs_that_do_not_fit(sample, message, verify):
    model = Picky()
    model.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16)  # for which a dry run is made
    with pytest.raises(ValueError, match=f"the model does not run with sample_inputs.*{message}"):
        fastbp.fuse(model, sample_inputs=sample, verify=verify)
    assert not any(is_fused(m) for m in model.modules()) and all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_one_block_at_two_places():
    block = TwoLinears(nn.GELU())
    model = nn.ModuleDict({"a": block, "b": block})
    report = fastbp.fuse(model)
    assert [s.name for s in report.fused] == ["a"] and is_fused(model["b"])
    assert fastbp.unfuse(model) == ["a"] and not is_fused(model["b"])


def test_linears_shared_by_two_blocks():
    """Tied to each other or to an embedding: the gradients add up as before."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = TwoLinears(nn.GELU()), TwoLinears(nn.Tanh())
            self.b.fc1 = self.a.fc1
            self.embedding = nn.Embedding(20, WIDTH)
            self.embedding.weight = self.a.fc1.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + self.embedding(torch.arange(x.shape[0])))

    model = Two()
    stock, x = copy.deepcopy(model), torch.randn(5, WIDTH)
    assert [s.name for s in fastbp.fuse(model, sample_inputs=x).fused] == ["a", "b"]
    assert model.embedding.weight is model.b.fc1.weight
    assert_same_step(model, stock, x)


@pytest.mark.parametrize("make", [lambda: TwoLinears(nn.GELU()), lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16)])
def test_torchscript_of_a_fused_module_is_refused(make):
    model = nn.Sequential(make())
    fastbp.fuse(model)
    with pytest.raises(RuntimeError, match=r"fastbp\.fuse: torch\.jit\.script cannot.*fastbp\.unfuse\(model\)"):
        torch.jit.script(model)


def test_an_illegal_policy_is_named_at_each_site():
    model = nn.ModuleDict({"chain": TwoLinears(nn.GELU()), "inside": nn.TransformerEncoderLayer(WIDTH, 2, 16)})
    model["inside"].activation = torch.nn.functional.gelu
    report = fastbp.fuse(model, save="output")
    assert [(s.name, s.status) for s in report.sites] == [("chain", "left"), ("inside", "left")]
    assert all("does not determine its slope" in s.reason for s in report.sites)
    assert not any(is_fused(m) for m in model.modules())


@pytest.mark.parametrize(
    ("make", "sample"),
    [
        (lambda: TwoLinears(nn.GELU()), True),
        (lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16), True),
        (lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16), False),
    ],
    ids=["chain", "inside", "inside, no sample"],
)
def test_what_fails_once_it_is_fused_is_rolled_back(make, sample, monkeypatch):
    model, x = make(), torch.randn(3, 4, WIDTH)
    found = fastbp.fuse(copy.deepcopy(model), sample_inputs=x if sample else None).fused
    assert len(found) == 1
    call = functional.call

    def broken(form, x, *args, **kwargs):
        if x.dtype is torch.float32:
            raise RuntimeError("no memory")
        return call(form, x, *args, **kwargs)

    monkeypatch.setattr(functional, "call", broken)
    report = fastbp.fuse(model, sample_inputs=x if sample else None)
    assert not report.fused and "failed once it was fused: no memory" in report.left[0].reason, str(report)
    assert report.verified is (False if sample else None)
    assert not is_fused(model)


def test_a_model_without_data_inside_a_layer():
    with torch.device("meta"):
        model = nn.ModuleDict({"chain": TwoLinears(nn.GELU()), "inside": nn.TransformerEncoderLayer(WIDTH, 2, 16)})
    report = fastbp.fuse(model)
    assert [s.name for s in report.fused] == ["chain"]
    assert "pass sample_inputs" in report.left[0].reason
